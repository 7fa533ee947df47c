"""`vla train --init --advantage`: a policy improved on logs of the stock recorder, and who takes it then."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bascule.commands.learning.train import Train
from policies.export.exporter import Decision
from policies.load import load_policy
from tests.vla.data.test_data import lerobot  # noqa: F401 (fixture)
from tests.vla.training.test_train_command import arm, command  # noqa: F401 (fixture)
from vla.checking.check import check_dataset
from vla.core.checkpoint import load_tensors
from vla.core.config import load_json, save_json
from vla.data.lerobot_dataset import load_dataset
from vla.model.advantage import BAD
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.training.advantage.labels import LABELS


@pytest.fixture(scope="module")
def trained(arm, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    command(folder, arm).run()
    return folder


@pytest.fixture(scope="module")
def logs(lerobot, tmp_path_factory):  # noqa: F811
    """Twelve episodes of the same robot, of which every second succeeds."""
    root = tmp_path_factory.mktemp("logs") / "logs"
    features = {
        "observation.image": {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "gripper"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    recorder = lerobot.LeRobotDataset.create("local/l", fps=10, root=root, features=features, use_videos=False)
    rng = np.random.default_rng(1)
    for episode in range(12):
        for step in range(3):
            frame = {"observation.image": rng.integers(0, 256, (48, 64, 3), np.uint8)}
            frame["observation.state"] = rng.normal(size=2).astype(np.float32)
            frame["action"] = rng.normal(size=3).astype(np.float32)
            frame["next.success"] = np.array([step == 2 and episode % 2 == 0])
            recorder.add_frame(frame | {"task": "push the tee"})
        recorder.save_episode()
    recorder.finalize()
    return root


def improve(out, data, init, **changes):
    Train(dataset=data, out=out, recipe="smoke", init=init, steps=3, batch_size=4, advantage=True, **changes).run()


def test_an_improved_policy_is_asked_for_good_actions_by_everyone(
    arm, logs, trained, tmp_path, monkeypatch, capsys,  # noqa: F811
):  # fmt: skip
    for name in ("_WIDTH", "_BATCH"):  # a small value model
        monkeypatch.setattr(f"vla.training.advantage.value.{name}", 8)
    out = tmp_path / "out"
    improve(out, (arm, logs), trained)
    told = " ".join(capsys.readouterr().err.split())
    assert "logs: 6 of 12 episodes succeeded" in told and "record more episodes" in told, "of noise nothing is learnt"
    improve(out, (arm, logs), trained, resume=True)  # nothing left to do
    with pytest.raises(ValueError, match="begun with another --guidance than 3"):
        improve(out, (arm, logs), trained, resume=True, guidance=3.0)
    label = load_tensors(out / LABELS)["label"]
    assert (label[:12] == 1).all() and len(label) == 12 + 36 and set(label[12:].tolist()) == {1.0, -1.0}
    vla, obs = VLA.load(out), load_dataset(arm).observation(slice(0, 3))
    told = load_policy(out).act(obs)
    assert np.array_equal(VLAPolicy(vla).act(obs), told)
    vla.bridge.advantage.asked = BAD
    assert not np.array_equal(VLAPolicy(vla).act(obs), told)
    inp, vla = vla.processor.prepare(obs), VLA.load(out)
    with torch.no_grad():  # what an export makes a graph of
        exported = Decision(vla)(inp.images_BVHWC, inp.token_ids_BT, inp.token_mask_BT, inp.proprio_BP)
    np.testing.assert_allclose(vla.to_actions(exported), told, atol=1e-5)
    improve(tmp_path / "again", (logs,), out, good=0.3, steps_ahead=2)  # a second iteration
    before, after = (
        VLA.load(folder).state_dict()["bridge.advantage.good.weight"] for folder in (out, tmp_path / "again")
    )
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"advantage": True}, "name it with --init"),
        ({"good": 0.3}, "go with --advantage"),
        ({"init": True, "advantage": True, "modulators": 2}, "give one of them"),
        ({"init": True, "advantage": True, "augment": True}, "leave out --tune, --augment"),
        ({"init": True, "advantage": True, "good": 1.5}, "good must be in"),
        ({"init": True, "memory": "bank"}, "keeps the shape of its policy: leave out --memory"),
        ({"init": True, "recipe": "lora"}, "recipe lora trains the backbone, and --init keeps"),
        ({"init": True, "modulate": "decoder"}, "--modulate goes with --modulators"),
        ({"init": True, "known": True, "modulators": 2}, "both --known and --dataset"),
        ({"init": True, "advantage": True}, "none of the datasets .arm. says which episodes succeeded"),
    ],
)
def test_flags_that_do_not_go_together(arm, trained, tmp_path, changes, says):  # noqa: F811
    if changes.get("init"):
        changes = changes | {"init": trained}
    if changes.get("known"):
        changes = changes | {"known": (arm,)}
    with pytest.raises(ValueError, match=says):
        Train(dataset=(arm,), out=tmp_path / "x", **{"recipe": "smoke"} | changes).run()


def test_a_label_of_whole_episodes_is_told_by_check_and_before_training(
    arm, logs, trained, tmp_path, monkeypatch, capsys,  # noqa: F811
):  # fmt: skip
    for name in ("_WIDTH", "_BATCH"):
        monkeypatch.setattr(f"vla.training.advantage.value.{name}", 8)
    assert not [f for f in check_dataset(logs, pictures=0).findings if f.code == "success_spread"]
    root = tmp_path / "spread"
    shutil.copytree(logs, root)
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        won = pa.array((table.column("episode_index").to_numpy() % 2 == 0).tolist())
        pq.write_table(table.set_column(table.column_names.index("next.success"), "next.success", won), path)
    (finding,) = (f for f in check_dataset(root, pictures=0).findings if f.code == "success_spread")
    assert finding.severity == "note" and finding.episodes == (0, 2, 4, 6, 8, 10)
    improve(tmp_path / "out", (arm, root), trained)
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: spread: feature next.success is true all through episodes 0, 2, 4" in told
    labels = [load_tensors(tmp_path / "out" / LABELS)]
    improve(tmp_path / "last", (arm, logs), trained)
    assert "all through" not in capsys.readouterr().err
    labels.append(load_tensors(tmp_path / "last" / LABELS))
    assert torch.equal(labels[0]["label"], labels[1]["label"]), "as if the last frame were the success"


def test_an_export_is_named_as_one(arm, trained, tmp_path):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(trained, export)
    (export / "model.safetensors").unlink()
    save_json(export / "config.json", load_json(export / "config.json") | {"export": {"format": "onnx"}})
    with pytest.raises(ValueError, match="is a folder of `vla export`: give the checkpoint it was made from"):
        improve(tmp_path / "out", (arm,), export)
