"""The checkpoint folder: exact round trips, and one valid checkpoint whatever moment a save is cut at."""

import json
import os

import pytest
import torch

from vla.core import checkpoint as module
from vla.core.checkpoint import (
    checkpoint_files,
    load_checkpoint,
    load_tensors,
    read_config,
    save_checkpoint,
    save_tensors,
)


def save(folder, version, trainer=True, **kwargs):
    save_checkpoint(
        folder,
        config={"version": version},
        tensors={"w": torch.full((3, 2), float(version)), "n": torch.tensor(version)},
        stats={"mean": [version / 2]},
        trainer_state={"step": version, "optimiser": {"m": torch.ones(2) * version}} if trainer else None,
        files={"tokenizer/words.json": b"words %d" % version},
        **kwargs,
    )


def version_in(folder):
    """The version of every part, which must agree."""
    c = load_checkpoint(folder)
    words = checkpoint_files(folder, "tokenizer/")["tokenizer/words.json"]
    parts = {c.config["version"], int(c.tensors["w"][0, 0]), int(c.tensors["n"]), int(c.stats["mean"][0] * 2)}
    parts |= {int(words.split()[1]), c.trainer_state["step"], int(c.trainer_state["optimiser"]["m"][0])}
    assert len(parts) == 1, parts
    return parts.pop()


def test_a_configuration_that_was_changed_by_hand_is_told_once(tmp_path, caplog):
    save_checkpoint(tmp_path, config={"cameras": ("front", "wrist"), 3: 0.1}, tensors={}, stats={})
    read_config(tmp_path)
    assert not caplog.records
    changed = json.loads((tmp_path / "config.json").read_text()) | {"cameras": ["wrist", "front"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    for _ in range(2):
        assert read_config(tmp_path)["cameras"] == ["wrist", "front"]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'config.json'} was changed after it was saved")


def test_round_trip(tmp_path):
    save(tmp_path / "a" / "ckpt", 3)
    assert version_in(tmp_path / "a" / "ckpt") == 3
    assert sorted(p.name for p in (tmp_path / "a" / "ckpt").iterdir()) == [
        "config.json",
        "model.safetensors",
        "stats.json",
        "tokenizer",
        "trainer",
    ]


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "tied": base,
        "turned": base.T,
        "row": base[1],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "t.safetensors", tensors, {"source": "test"})
    back = load_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.detach()) and back[name].dtype == tensor.dtype, name
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_save_cut_anywhere_leaves_one_whole_checkpoint(tmp_path, monkeypatch):
    """Stop a save before each of its file operations in turn, as a power cut would: nothing afterwards runs."""
    operations = 0

    class PowerCut(BaseException):
        pass

    def counted(original, stop_at):
        def call(*args, **kwargs):
            nonlocal operations
            operations += 1
            if operations == stop_at:
                raise PowerCut
            return original(*args, **kwargs)

        return call

    def run(folder, stop_at):
        nonlocal operations
        operations = 0
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "replace", counted(os.replace, stop_at))
            for name in ("_write_tensors", "_write_bytes", "_write_trainer", "_sync_folder"):
                patch.setattr(module, name, counted(getattr(module, name), stop_at))
            save(folder, 2)

    reference = tmp_path / "reference"
    save(reference, 1)
    run(reference, None)
    total = operations
    assert total >= 10
    found = []
    for stop_at in range(1, total + 1):
        folder = tmp_path / str(stop_at)
        save(folder, 1)
        with pytest.raises(PowerCut):
            run(folder, stop_at)
        found.append(version_in(folder))
        save(folder, 3)  # and the next save copes with what is left
        assert version_in(folder) == 3 and not list(folder.rglob("*.next"))
    assert found == sorted(found) and set(found) == {1, 2}


def test_half_written_first_file_is_never_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors.next").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json"):
        load_checkpoint(tmp_path)
    save(tmp_path, 1)
    assert version_in(tmp_path) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "stats.json", "trainer/state.pt"])
def test_changed_and_missing_files_are_named(tmp_path, name):
    save(tmp_path, 1)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is not the file that was saved"):
        load_checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_checkpoint(tmp_path)


def test_trainer_state_is_optional_and_never_stale(tmp_path):
    save(tmp_path, 1)
    assert load_checkpoint(tmp_path, trainer=False).trainer_state is None
    save(tmp_path, 2, trainer=False)
    assert load_checkpoint(tmp_path).trainer_state is None and not (tmp_path / "trainer").exists()


def test_trainer_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    save_checkpoint(tmp_path / "c", config={}, tensors={}, stats={}, trainer_state={"x": Evil()})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_foreign_folders_are_refused_and_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    for act in (lambda: load_checkpoint(tmp_path), lambda: save(tmp_path, 1)):
        with pytest.raises(ValueError, match="does not describe a Bascule checkpoint"):
            act()
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "other"}
    save(tmp_path / "c", 1)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["checkpoint"]["format"] = 99
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="checkpoint format 99; this version reads format 1"):
        load_checkpoint(tmp_path / "c")


def test_a_damaged_config_is_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{\n")
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\): copy the checkpoint again or load another"):
        read_config(tmp_path)


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(
        ValueError, match=r"config\.json is a file; a checkpoint is the folder with config\.json in it$"
    ):
        read_config(file)


def test_weights_that_are_not_numbers_are_named(tmp_path):
    """Every command fell over them in its own way, some with a traceback."""
    tensors = {"head.bias": torch.zeros(3), "head.weight": torch.tensor([1.0, float("nan")])}
    save_checkpoint(tmp_path, config={}, tensors=tensors, stats={})
    words = r"model\.safetensors holds NaN, in head\.weight: load a checkpoint of before its weights were spoilt"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path)
