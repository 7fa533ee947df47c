"""Odd metadata and marks inside pictures: what they mean, or one line that says so."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from bascule.main import main
from tests.vla.data.odd_recordings import KEY, train_arguments, write_dataset
from vla.checking.check import check_dataset
from vla.data.lerobot_dataset import load_dataset

WIDE = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)  # (H, W, 3)
UPRIGHT = {1: WIDE, 2: WIDE[:, ::-1], 3: WIDE[::-1, ::-1], 6: np.rot90(WIDE, -1), 8: np.rot90(WIDE)}


def marked(orientation, kind="PNG", picture=WIDE):
    """A picture whose Exif data says how it lies."""
    about, out = Image.Exif(), io.BytesIO()
    about[0x0112] = orientation
    Image.fromarray(picture).save(out, kind, exif=about)
    return {"bytes": out.getvalue(), "path": None}


@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "streamed"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_as_exif_says(tmp_path, orientation, lazy):
    """A picture whose Exif tag says that it lies turned is read upright, as LeRobot's reader gives it."""
    data = load_dataset(write_dataset(tmp_path, cell=lambda row: marked(orientation)), lazy=lazy)
    np.testing.assert_array_equal(data.images["front"][np.array([3])][0], UPRIGHT[orientation])


def test_check_knows_the_size_of_turned_pictures(tmp_path):
    """All episodes are 20 pixels wide when upright: there is no second size."""
    upright = np.zeros((12, 20, 3), np.uint8)

    def cell(row):
        return marked(6, "JPEG", upright.transpose(1, 0, 2)) if row < 6 else marked(1, "JPEG", upright)

    found = check_dataset(write_dataset(tmp_path, cell=cell)).findings
    assert not [finding for finding in found if finding.code == "picture_sizes"]


@pytest.mark.parametrize("names", [["dx", None, "gripper"], [None, None, None], ["dx", "", "gripper"]])
def test_a_component_without_a_name_is_told_as_such(tmp_path, names):
    data = load_dataset(write_dataset(tmp_path, names=names))
    assert data.action_names == ("action_0", "action_1", "action_2")
    assert data.warnings() == [
        "feature 'action' has components without a name in meta/info.json: its names are not used"
    ]


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("v2.1", "convert it with the conversion script of a LeRobot that writes v3"),
        ("v4.0", "write it anew with a LeRobot that writes v3"),
        ("v12.0", "write it anew with a LeRobot that writes v3"),
        ("unknown", "convert it with the conversion script of a LeRobot that writes v3"),
    ],
)
def test_another_format_is_refused_with_what_helps(tmp_path, version, remedy):
    info = write_dataset(tmp_path) / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"codebase_version": version}))
    with pytest.raises(ValueError) as problem:
        load_dataset(tmp_path)
    assert str(problem.value) == f"{tmp_path} is a LeRobotDataset {version}, not v3: {remedy}"


def test_a_number_beyond_32_bits_is_told_as_recorded(tmp_path):
    state = np.zeros((11, 2))
    state[7, 1] = 1e300
    with pytest.raises(ValueError) as problem:
        load_dataset(write_dataset(tmp_path, state=state))
    told = "feature 'observation.state' holds 1e+300, more than 32-bit numbers hold at episode 1, frame 1 (component 1)"
    assert str(problem.value) == told


@pytest.mark.parametrize("command", ["train --dataset", "check"])
def test_a_name_on_the_hub_is_no_folder(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "lerobot/pusht"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lerobot/pusht does not exist; no dataset is fetched: `hf download lerobot/pusht" in line


def test_parts_of_the_action_in_features_of_their_own_are_told(tmp_path):
    """A gripper beside the arm: a policy learns `action` alone, and its robot would never close its hand."""

    def features(about):
        about["action.gripper"] = {"dtype": "float32", "shape": [1], "names": None}
        about["actions"] = {"dtype": "float32", "shape": [3], "names": None}
        about["observation.velocity"] = {"dtype": "float32", "shape": [2], "names": None}
        about["observation.state.gripper"] = {"dtype": "float32", "shape": [1], "names": None}
        about["observation.intrinsics.front"] = {"dtype": "float32", "shape": [9], "names": None}

    root = write_dataset(tmp_path, features=features)
    warnings = load_dataset(root).warnings()
    assert "these are left out: action.gripper, actions; join into 'action'" in warnings[0]
    assert "are left out: observation.state.gripper; join into 'observation.state'" in warnings[1]
    assert warnings[2:] == []
    found = {(one.code, one.severity): one.text for one in check_dataset(root, pictures=0).findings}
    assert ("action_left_out", "warning") in found and ("state_left_out", "warning") in found
    assert "are left out: observation.velocity; join" in found["state_left_out", "note"]


def test_cameras_may_be_given_as_their_features_are_called(tmp_path, capsys):
    arguments = train_arguments(tmp_path / "policy", write_dataset(tmp_path / "data"), "--cameras", KEY)
    assert main(arguments) == 0
    kept = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert kept["processor"]["cameras"] == ["front"]


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_learning_rate_that_is_none_is_told_alone(tmp_path, capsys, rate):
    assert main(train_arguments(tmp_path / "policy", write_dataset(tmp_path / "data"), "--lr", rate)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"vla: error: lr must be a positive number, got {float(rate)}"


@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "streamed"])
def test_pictures_of_another_size_than_declared_count_as_they_are(tmp_path, lazy):
    """The policy remembers how wide its training pictures were, and asks its robot for such."""
    data = load_dataset(write_dataset(tmp_path, cell=lambda row: marked(1)), lazy=lazy)
    assert data.aspects == {"front": 20 / 12}
    told = "camera 'front' has pictures of 12x20 pixels, meta/info.json declares 16x16"
    assert [warning for warning in data.warnings() if warning.startswith(told)]


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (
            {"observation.state": "observation.state.joints", "observation.state.hand": None},
            "join observation.state.joints and observation.state.hand into 'observation.state', one vector for every",
        ),
        ({"action": "action.arm"}, "rename action.arm into 'action', one vector for every frame"),
        ({"action": "actions"}, "rename 'actions' into it if that is meant"),
        ({"observation.state": "state"}, "rename 'state' into it if that is meant"),
        ({"observation.state": "effort"}, "a policy learns from 'observation.state' and 'action'"),
    ],
)
def test_a_vector_that_is_missing_comes_with_a_remedy(tmp_path, names, remedy):
    def renamed(features):
        for old, new in names.items():
            features[new or old] = features.pop(old) if new else {"dtype": "float32", "shape": [1], "names": None}

    (key,) = (old for old, new in names.items() if new)
    with pytest.raises(ValueError, match=f"^the dataset has no feature '{key}'; it has: .*; {remedy}"):
        load_dataset(write_dataset(tmp_path, features=renamed))


FRAMES = np.array([*range(6), *range(5)]) / 10


@pytest.mark.parametrize(
    ("stamps", "after", "before", "told"),
    [
        (
            128e7 + FRAMES,
            "1280000000",
            "1280000000",
            "so far from zero 32-bit numbers are 128 s apart and tell no frames",
        ),
        (0 * FRAMES, "0", "0", "was the time recorded? LeRobot writes frame_index / fps, seconds from the episode's"),
        (-FRAMES, "-0.1", "-0", "is this the order of recording?"),
    ],
)
def test_time_stamps_that_do_not_rise_say_why(tmp_path, stamps, after, before, told):
    (line,) = load_dataset(write_dataset(tmp_path, stamps=stamps)).warnings()
    place = f"the timestamp of episode 0, frame 1 ({after} s) is not after that of the frame before it ({before} s)"
    assert line.startswith(f"{place}: {told}") and line.endswith("(9 in all)")


def test_training_tells_of_one_camera_recorded_twice(tmp_path):
    """Two names for one view: the copy costs memory, and what it should have shown is not there."""
    rng = np.random.default_rng(3)
    noise = [marked(1, picture=rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(22)]

    def recorded(root, wrist):
        about = {f"{KEY[:-5]}wrist": {"dtype": "image", "shape": [16, 16, 3], "names": None}}
        columns = {f"{KEY[:-5]}wrist": wrist}
        data = load_dataset(write_dataset(root, cell=noise.__getitem__, data=lambda into: into.update(columns),
                                          features=lambda into: into.update(about)))  # fmt: skip
        return data.warnings()

    (warning,) = recorded(tmp_path / "twice", noise[:11])
    assert warning.startswith("cameras 'front' and 'wrist' show the same pictures in all of ")
    assert recorded(tmp_path / "two", noise[11:]) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--image-size 100000", "--image-size must be at most 4,096, got 100000"),
        ("--image-size 0", "--image-size must be at least 8, got 0"),
        ("--steps 9999999999999999999999", "--steps must be at most 1,000,000,000, got 9999999999999999999999"),
        (
            "--head os:path",
            "head 'os:path' cannot be made (width, action_dim given): TypeError: 'module' object is not",
        ),
        ("--head os:getcwd", "head 'os:getcwd' cannot be made (width, action_dim given): TypeError: "),
        ("--backbone os:getcwd", "backbone 'os:getcwd' cannot be made"),
    ],
)
def test_flags_that_make_no_policy_are_one_line(tmp_path, capsys, flags, told):
    assert main(train_arguments(tmp_path / "policy", write_dataset(tmp_path / "data"), *flags.split())) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"vla: error: {told}")
