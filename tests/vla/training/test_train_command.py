"""`vla train` on folders that the stock recorder wrote: whatever cameras, sizes, widths and tasks, and no code."""

import json

import numpy as np
import pytest

from bascule.commands.learning.train import Train
from tests.vla.data.odd_recordings import edited
from tests.vla.data.test_data import lerobot  # noqa: F401 (fixture)
from vla.core.checkpoint import load_checkpoint
from vla.core.types import executed
from vla.data.lerobot_dataset import load_dataset
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

LENGTHS = (7, 5)


def record(lerobot, root, kind, cameras, state, action, tasks, fps=10):  # noqa: F811
    """`cameras`: feature name -> (H, W)."""
    features = {
        key: {"dtype": kind, "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for key, size in cameras.items()
    }
    features["observation.state"] = {"dtype": "float32", "shape": (len(state),), "names": list(state)}
    features["action"] = {"dtype": "float32", "shape": (len(action),), "names": list(action)}
    recorder = lerobot.LeRobotDataset.create(
        "local/x", fps=fps, root=root, features=features, use_videos=kind == "video"
    )
    rng = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        for _ in range(length):
            frame = {key: rng.integers(0, 256, (*size, 3), np.uint8) for key, size in cameras.items()}
            frame["observation.state"] = rng.normal(size=len(state)).astype(np.float32)
            frame["action"] = rng.normal(size=len(action)).astype(np.float32)
            recorder.add_frame(frame | {"task": tasks[episode % len(tasks)]})
        recorder.save_episode()
    recorder.finalize()
    return root


@pytest.fixture(scope="module")
def arm(lerobot, tmp_path_factory):  # noqa: F811
    """One camera of an odd name and shape; one task."""
    cameras = {"observation.image": (48, 64)}
    root = tmp_path_factory.mktemp("arm") / "arm"
    return record(lerobot, root, "image", cameras, ("x", "y"), ("dx", "dy", "gripper"), ["push the tee"])


@pytest.fixture(scope="module")
def bimanual(lerobot, tmp_path_factory):  # noqa: F811
    """Three cameras as video, fourteen joints, two long tasks."""
    cameras = {f"observation.images.{name}": (64, 96) for name in ("high", "left_wrist", "right_wrist")}
    joints = [f"joint{i}.pos" for i in range(13)] + ["gripper"]
    words = "take the small red block out of the left drawer and hand it over to the other arm which puts it down"
    tasks = [f"{words} on the plate beside the bowl", "close the drawer"]
    root = tmp_path_factory.mktemp("bimanual") / "bimanual"
    return record(lerobot, root, "video", cameras, joints, joints, tasks, fps=30)


def command(out, *datasets, **changes):
    """`backbone` None: the recipe's; otherwise the one that costs least."""
    given = {"steps": 4, "batch_size": 4, "backbone": "tiny"} | changes
    return Train(dataset=datasets, out=out, recipe="smoke", **given)


@pytest.mark.parametrize("kind", ["arm", "bimanual"])
def test_any_folder_trains_into_a_policy_that_acts(request, tmp_path, capsys, kind):
    root = request.getfixturevalue(kind)
    command(tmp_path, root, backbone=None).run()
    said = " ".join(capsys.readouterr().err.split())
    data = load_dataset(root)
    policy = VLAPolicy.load(tmp_path)
    action = policy.act(data.observation(slice(0, 3)))
    assert action.shape == (3, 8, data.action.shape[1]) and policy.vla.config.backbone == "small"
    assert (action >= data.action.min(0)).all() and (action <= data.action.max(0)).all()
    assert policy.spec.cameras == tuple(data.images) and policy.spec.action_spec.names == data.action_names
    if kind == "arm":
        assert policy.spec.cameras == ("observation.image",) and "12 frames at 10 Hz, 'push the tee'" in said
        assert "cameras observation.image 48x64; state 2; action dx, dy, gripper" in said
    else:
        assert len(policy.spec.cameras) == 3 and policy.vla.processor.config.max_text_tokens > 24
        assert "2 tasks" in said and "state 14" in said
    assert "parameters learn" in said and "activations" in said and "features in memory" in said
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_adapters_augmentation_and_streaming_from_the_command_line(arm, tmp_path):
    asked = {"tune": "lora", "augment": True, "stream": True, "accumulate": 2, "checkpointing": True, "num_threads": 3}
    command(tmp_path, arm, **asked).run()
    assert VLA.load(tmp_path, merge=False).config.lora is not None
    assert load_checkpoint(tmp_path).trainer_state["threads"] == 3
    command(tmp_path, arm, **asked, resume=True).run()  # nothing left to do, and nothing in its way
    assert VLA.load(tmp_path).config.lora is None


def test_a_run_keeps_the_backbone_that_it_was_begun_on(arm, tmp_path, capsys):
    """A recipe's default may be another one by the time the run is resumed."""
    command(tmp_path, arm).run()
    assert "note: the backbone tiny is retired" in " ".join(capsys.readouterr().err.split())
    command(tmp_path, arm, backbone=None, resume=True).run()
    assert VLA.load(tmp_path).config.backbone == "tiny" and "retired" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="was trained with model.backbone='tiny', not 'tiny-goals'"):
        command(tmp_path, arm, backbone="tiny-goals", resume=True).run()


def test_short_chunks_with_fewer_actions_played_of_each(arm, tmp_path):
    command(tmp_path, arm, chunk_size=3, n_action_steps=2).run()
    policy = VLAPolicy.load(tmp_path)
    chunk = policy.act(load_dataset(arm).observation(slice(0, 2)))
    assert chunk.shape == (2, 3, 3) and executed(policy.spec, chunk).shape == (2, 2, 3)


def test_a_chunk_longer_than_every_episode_is_told(arm, tmp_path, capsys):
    longest = max(np.bincount(load_dataset(arm).episode_index))
    command(tmp_path, arm, chunk_size=int(longest) + 1).run()
    told = " ".join(capsys.readouterr().err.split())
    assert f"a chunk of {longest + 1} actions is longer than any episode ({longest} frames)" in told
    command(tmp_path / "b", arm, chunk_size=int(longest)).run()
    assert "longer than any episode" not in capsys.readouterr().err


def test_a_loss_that_has_risen_is_told(arm, tmp_path, capsys):
    for lr, told in ((1e-4, False), (30.0, True)):
        Train((arm,), tmp_path / f"lr{lr}", recipe="smoke", backbone="tiny", steps=12, lr=lr).run()
        assert ("the loss has risen from" in capsys.readouterr().err) is told


def test_fewer_threads_than_none_are_an_error(arm, tmp_path):
    with pytest.raises(ValueError, match="num_threads must be at least 1, or 0"):
        command(tmp_path, arm, num_threads=-1).run()


def test_numbers_that_would_fill_the_memory_are_an_error(arm, tmp_path):
    for flag in ("batch_size", "accumulate", "num_threads", "memory_frames", "align_steps", "n_action_steps"):
        with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} must be at most .*, got {10**21}"):
            command(tmp_path, arm, **{flag: 10**21}).run()


def test_two_robots_make_one_policy(arm, bimanual, tmp_path):
    command(tmp_path, arm, bimanual, weights=(1.0, 3.0)).run()
    for name, root in (("arm", arm), ("bimanual", bimanual)):
        data, vla = load_dataset(root), VLA.load(tmp_path, member=name)
        assert vla.processor.stats == data.stats()
        action = VLAPolicy(vla).act(data.observation(slice(0, 2)))
        assert action.shape == (2, 8, data.action.shape[1]) and np.isfinite(action).all()
    with pytest.raises(ValueError, match=r"unknown member 'leg'.*arm, bimanual"):
        VLA.load(tmp_path, member="leg")


def test_one_robot_named_in_two_ways_is_told_before_training(arm, tmp_path, capsys):
    renamed = edited(arm, tmp_path, lambda features: features["action"].update(names=["dx.pos", "dy.pos", "gripper"]))
    command(tmp_path / "out", arm, renamed).run()
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: arm and edited name components of 'action' differently ('dx', 'dx.pos'): these are" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("action"), "no feature 'action'; it has: .*observation.image"),
        (lambda f: f["observation.state"].update(shape=[2, 2]), r"'observation.state' must be a vector .*\(2, 2\)"),
        (lambda f: f["action"].update(dtype="string"), "feature 'action' must be a vector of numbers, it is string"),
        (lambda f: f.pop("observation.image"), "has no camera: no feature is an image or a video"),
        (lambda f: f["action"].update(shape=[4]), "feature 'action' should have 4 components but has 3"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named_before_training(arm, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        command(tmp_path / "out", edited(arm, tmp_path, change)).run()
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_named(arm, bimanual, tmp_path):
    with pytest.raises(ValueError, match="no camera 'observation.imag'; did you mean 'observation.image'"):
        command(tmp_path, arm, cameras=("observation.imag",)).run()
    with pytest.raises(ValueError, match="2 datasets need 2 weights, got 1"):
        command(tmp_path, arm, bimanual, weights=(1.0,)).run()
    with pytest.raises(ValueError, match="arm is named twice: name each folder once"):
        command(tmp_path, arm, arm).run()
    with pytest.raises(ValueError, match="language and checkpointing are for a backbone that learns"):
        command(tmp_path, arm, checkpointing=True).run()
