"""Faults that would show at the end of a run are told at its start: devices, and policies that could not be loaded."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bascule import main as cli
from tests.vla.toy_backbone import SPEC
from tests.vla.training.test_train import CONFIG, demos, fresh
from vla.backbones.lora import LoRAConfig
from vla.model.config import BridgeConfig, VLAConfig, check_loads, model_problem
from vla.model.model import VLA
from vla.runtime.devices import check_device, choose_device
from vla.training.train import TrainingDiverged, build_vla, train

COMMANDS = {
    "train": ("train", "--dataset", "nowhere"),
    "rl": ("rl", "tabletop-pick", "--init", "nowhere"),
    "eval": ("eval", "nowhere", "--backend", "warp"),
    "bench": ("bench", "sim", "--backend", "warp"),
}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("vla.runtime.devices._has_driver", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; did you mean 'cuda'? (known: auto, cpu, cuda, cuda:1 and so on, mps)"),
        ("cuda", "--device cuda: this machine has no GPU driver; --device cpu runs without one"),
        ("cuda:3", "--device cuda:3: this machine has no GPU driver; --device cpu runs without one"),
        ("cuda:x", "unknown device 'cuda:x'"),
        ("tpu", "unknown device 'tpu'"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(command, device, message, no_gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*COMMANDS[command], "--device", device]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_wrong_name_costs_no_torch():
    code = (
        "import sys\nfrom bascule.main import main\nassert main(['train', '--dataset', 'x', '--device', 'gpu']) == 2\n"
        "assert not {'torch', 'transformers', 'mujoco'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr("vla.runtime.devices._has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match=r"cuda:2: this machine has 2 GPU"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU"):
        check_device("cuda")
    check_device(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 3, "n_action_steps": 4}, r"n_action_steps must be in 1..3 .*--n-action-steps 3"),
        ({"chunk_size": 3, "n_action_steps": 0}, r"got 0: play fewer .*--n-action-steps 1"),
        ({"head": "l3"}, "unknown head 'l3'"),
        ({"refiner_width": -1}, "refiner_width must be 0"),
        ({"lora": LoRAConfig(), "freeze_backbone": False}, "leave freeze_backbone on"),
        ({"lora": LoRAConfig(rank=0)}, "lora rank"),
        ({"bridge": BridgeConfig(width=33)}, "not a multiple of heads"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_refused_by_the_recipe(change, message, tmp_path):
    model = replace(VLAConfig(), **change)
    with pytest.raises(ValueError, match=message):
        raise ValueError(model_problem(model))
    assert replace(CONFIG, model=model).problem() == model_problem(model)
    with pytest.raises(ValueError, match=message):
        train(replace(CONFIG, model=model), fresh(), demos(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model_problem(VLAConfig()) is None


def test_the_command_refuses_before_it_reads_the_dataset(tmp_path, capsys):
    assert cli.main(["train", "--dataset", str(tmp_path), "--out", str(tmp_path / "out"), "--chunk-size", "3"]) == 2
    error = capsys.readouterr().err
    assert "in 1..3 (the chunk size), got 4: play fewer actions of each chunk (--n-action-steps 3)" in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_what_json_cannot_hold_is_told_before_training(tmp_path):
    vla = fresh()
    vla.processor.config = replace(vla.processor.config, action_low=(-np.inf, -1.0, -1.0, -1.0))
    with pytest.raises(ValueError, match="not saved and loaded: its processor"):
        check_loads(vla)
    with pytest.raises(ValueError, match="not saved and loaded: its processor"):
        train(CONFIG, vla, demos(), tmp_path / "out")
    check_loads(fresh())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": float("inf")}, "must be a positive number"),
        ({"lr": -1.0}, "must be a positive"),
        ({"weights": (1.0, float("inf"))}, "weights of datasets must be positive numbers"),
        ({"weights": (1.0, float("nan"))}, "weights of datasets must be positive numbers"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"lr": 1e300}, "lr must be at most 1e+30, got 1e+300"),
    ],
)
def test_numbers_that_make_no_run(change, message):
    assert message.split(", got")[0] in (replace(CONFIG, **change).problem() or "")


def test_a_diverged_run_is_the_users_to_mend(tmp_path):
    with pytest.raises(TrainingDiverged, match="lower lr") as caught:
        train(replace(CONFIG, lr=1e30, warmup_steps=0, grad_clip=1e30), fresh(), demos(), tmp_path)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FloatingPointError)


def test_refining_checks_the_chunk_too(tmp_path):
    from rl.configs.run import RunnerConfig
    from rl.runner import Runner

    class Env:
        num_envs, horizon, action_spec = 4, 10, SPEC

    vla = fresh()
    assert isinstance(vla, VLA)
    config = RunnerConfig(num_envs=4, n_action_steps=vla.chunk_size + 1)
    with pytest.raises(ValueError, match=f"must be in 1..{vla.chunk_size}"):
        Runner(vla, Env(), config, tmp_path)


def test_more_memory_than_there_is_is_one_line(capsys):
    from vla.runtime.console import run_guarded

    def body():
        torch.empty(1 << 56, dtype=torch.uint8)

    assert run_guarded(body, kept=lambda: "") == 2
    error = capsys.readouterr().err
    assert error.startswith("vla: error: out of memory: ") and "ask for less" in error
    assert len(error.strip().splitlines()) == 1

    def defect():
        raise RuntimeError("of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        run_guarded(defect, kept=lambda: "")


@pytest.mark.parametrize("datasets", [1, 2])
def test_weights_are_one_for_each_dataset(datasets):
    parts = demos() if datasets == 1 else {"a": demos(), "b": demos()}
    with pytest.raises(ValueError, match=f"{datasets} datasets? needs? {datasets} weights?, got 3"):
        build_vla(replace(CONFIG, weights=(1.0, 2.0, 3.0)), parts, backbone=fresh().backbone)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--retain", "tabletop-pick", "nosuch"), "unknown suite 'nosuch'"),
        (("--retain-episodes", "0"), "--retain-episodes must be at least 1, got 0"),
        (("--num-envs", "0"), "--num-envs must be at least 1, got 0"),
        (("--workers", "0"), "--workers must be at least 1, got 0"),
        (("--horizon", "0"), "--horizon must be at least 1, got 0"),
        (("--late-steps", "-1"), "--late-steps must be at least 0, got -1"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--minutes", "nan"), "--minutes must be at least 0.01, got nan"),
        (("--minutes", "-1"), "--minutes must be at least 0.01, got -1"),
    ],
)
def test_numbers_that_no_refinement_has(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "config.json").write_text("{}")
    assert cli.main(["rl", "tabletop-pick", "--init", "init", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
