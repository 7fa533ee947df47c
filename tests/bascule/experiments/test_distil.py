"""Teachers by their folder, and `vla experiment distil` through the real path."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bascule.experiments.distillation.students import FreshDecoder, Shuffled
from bascule.main import main
from bascule.teachers import PrivilegedTeacher, load_teacher
from rl.configs.teacher import TeacherConfig
from rl.teacher.state_teacher import Teacher as StateNetwork
from tests.vla.toy_backbone import SPEC, toy_backbone, toy_vla
from tests.vla.training.test_train import demos
from vla.core.checkpoint import save_checkpoint
from vla.core.config import encode, save_json
from vla.model.config import BridgeConfig, VLAConfig
from vla.training.distillation.student import student_config, take_decoder, teacher_latents
from vla.training.train import build_vla
from vla.training.train_config import DistillationConfig, TrainConfig

STATE, CHUNK = 7, 4


def network():
    torch.manual_seed(3)
    teacher = StateNetwork(STATE + 5, CHUNK, 4, TeacherConfig(count=2, width=16))
    teacher.view.copy_(torch.randn_like(teacher.view))
    teacher.shift.copy_(torch.randn_like(teacher.shift))
    teacher.divide.copy_(torch.rand_like(teacher.divide) + 0.5)
    return teacher.requires_grad_(False).eval()


def privileged_demos():
    data = demos()
    rng = np.random.default_rng(1)
    state = rng.normal(size=(data.num_frames, STATE)).astype(np.float32)
    return replace(data, privileged=state, exact_proprio=data.proprio + 0.25)


def test_the_privileged_teachers_decoder_is_the_mean_of_its_networks():
    data, net = privileged_demos(), network()
    teacher = PrivilegedTeacher(net, toy_vla(seed=4).processor)
    cfg = TrainConfig(model=VLAConfig(backbone="toy", bridge=BridgeConfig(width=32), chunk_size=CHUNK), image_size=16)
    cfg = student_config(cfg, teacher, data, DistillationConfig("run", 1))
    student = build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))
    take_decoder(student, teacher)
    with torch.no_grad():
        told = student.processor.unnormalise_action(student.head.decode(teacher_latents(teacher, data, batch_size=5)))
        state = torch.from_numpy(np.concatenate([data.privileged, data.exact_proprio], 1))
        own = toy_vla(seed=4).processor.unnormalise_action(net(state))
    torch.testing.assert_close(told, own, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="record them with `vla demos`"):
        teacher.latents(demos(), slice(0, 2))
    with pytest.raises(ValueError, match="reads 12 numbers of the simulator's state, the demonstrations hold 10"):
        teacher.latents(replace(data, privileged=data.privileged[:, :5]), slice(0, 2))
    reads = PrivilegedTeacher(net, build_vla(cfg, data, backbone=toy_backbone(point_dim=6)).processor)
    assert torch.equal(reads.latents(data, slice(0, 2)), teacher.latents(data, slice(0, 2)))
    with pytest.raises(ValueError, match=r"the state as a, b, c, d, e, the .* as b, a, c, d, e: give dem"):
        reads.latents(replace(data, proprio_names=tuple("bacde")), slice(0, 2))


def test_a_shuffled_teacher_says_the_same_of_other_frames_and_a_fresh_decoder_is_none_of_its():
    data = privileged_demos()
    teacher = PrivilegedTeacher(network(), toy_vla(seed=4).processor)
    plain, mixed = (teacher_latents(one, data) for one in (teacher, Shuffled(teacher, data, seed=0)))
    assert not torch.equal(plain, mixed) and torch.equal(plain.sort(0).values, mixed.sort(0).values)
    fresh = FreshDecoder(teacher, seed=0)
    torch.testing.assert_close(teacher_latents(fresh, data), plain)
    assert fresh.decoder.tensors["weight"].shape == teacher.decoder.tensors["weight"].shape
    assert not torch.equal(fresh.decoder.tensors["weight"], teacher.decoder.tensors["weight"])


def run_folder(folder: Path, tensors: dict) -> Path:
    """The folder of an RL run with a privileged teacher."""
    from rl.recipes import tabletop_pick_guided

    config = encode(tabletop_pick_guided())
    config["guide"]["teacher"] |= {"count": 2, "width": 16}
    save_checkpoint(folder / "last", config=config, tensors={"x": torch.zeros(1), **tensors}, stats={})
    return folder


def test_the_folder_of_an_rl_run_is_its_privileged_teacher(tmp_path):
    from tests.vla.small_policy import small_policy

    torch.manual_seed(3)
    net = StateNetwork(STATE + 5, 8, 4, TeacherConfig(count=2, width=16))
    folder = run_folder(tmp_path / "run", {f"teacher.{name}": t for name, t in net.state_dict().items()})
    with pytest.raises(ValueError, match="has not kept a policy yet"):
        load_teacher(folder)
    small_policy(folder / "best")
    teacher = load_teacher(folder)
    assert isinstance(teacher, PrivilegedTeacher) and teacher.chunk_size == 8
    torch.testing.assert_close(teacher.network.state_dict(), net.state_dict())
    assert load_teacher(folder / "best").decoder.reads == "head", "the run's policy is another teacher"
    bare = run_folder(tmp_path / "bare", {})
    with pytest.raises(ValueError, match="had no privileged teacher: give its policy"):
        load_teacher(bare)


def test_folders_that_hold_no_teacher_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_teacher(tmp_path / "nothing")
    (tmp_path / "export").mkdir()
    save_json(tmp_path / "export" / "config.json", {"export": {}})
    with pytest.raises(ValueError, match="graph without latents"):
        load_teacher(tmp_path / "export")
    (tmp_path / "unheard").mkdir()
    save_json(tmp_path / "unheard" / "config.json", {"type": "nothing-of-the-kind"})
    with pytest.raises(ValueError, match="is a policy of type 'nothing-of-the-kind', which"):
        load_teacher(tmp_path / "unheard")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align-steps", "3"], "--align-steps aligns the policy with a teacher"),
        (["--teacher", "x", "--head", "flow"], "--head changes nothing beside --teacher"),
        (["--teacher", "x", "--dataset", "a", "b"], "give one --dataset beside --teacher"),
        (["--teacher", "x", "--steps", "5", "--align-steps", "5"], "less than the run's 5 steps"),
        (["--teacher", "x", "--tune", "full", "--language", "q"], "leave out --language"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_once(flags, message, capsys):
    given = flags if "--dataset" in flags else ["--dataset", "nowhere", *flags]
    assert main(["train", *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_the_experiment_reports_every_share_of_the_steps(tmp_path):
    small = ["--demos", "1", "--steps", "10", "--align-steps", "2", "--episodes", "2", "--num-envs", "2"]
    small += ["--seeds", "0", "--workers", "1", "--arms", "align-tune", "teacher"]
    out = tmp_path / "out"
    assert main(["experiment", "distil", *small, "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["arms"]) == ["align-tune", "teacher"]
    for arm in result["arms"].values():
        assert arm["episodes"] == 2 and len(arm["after_10_wilson95"]) == 2 and "0" in arm["after_30_per_seed"]
    steps = [json.loads((out / "align-tune-0" / "metrics.jsonl").read_text().splitlines()[-1])["step"]]
    assert steps == [10] and (out / "align-tune-0-after-10" / "config.json").is_file()
    assert main(["experiment", "distil", "--arms", "algin-tune"]) == 2
