"""`vla check --fix` writes a copy that both readers take: idle ends cut, episodes left out, cameras renamed."""

import numpy as np
import pytest

from bascule.main import main
from envs.demos.record import record
from tests.vla.checking.recordings import FPS, FRONT, Arm
from tests.vla.checking.test_check import hold, told
from tests.vla.data.odd_recordings import png
from vla.checking.check import check_dataset
from vla.checking.fix import _as_declared, outcome_kept, plan
from vla.data.lerobot_dataset import load_dataset


def test_a_cleaned_copy_passes_and_keeps_the_rest_as_it_was(tmp_path, capsys):
    arm = Arm(episodes=5)
    hold(arm, 1, 40, 30)
    arm.state[3][12, 2] = np.nan
    root = arm.write(tmp_path / "data")
    out = tmp_path / "clean"
    command = ["check", str(root), "--fix", str(out), "--drop", "3", "--rename", "front=cam_high"]
    assert main(command) == 1
    err = " ".join(capsys.readouterr().err.split())
    kept = plan(check_dataset(root, pictures=0), [3], {}).kept[1]
    first, last = (edge - len(arm.state[0]) for edge in (kept.start, kept.stop))
    rest = round(0.25 * FPS)
    assert 0 <= first - (40 - rest) <= 5 and 0 <= len(arm.state[1]) - 30 + rest - last <= 5, (
        "a quarter of a second stays"
    )
    count = sum(len(arm.state[i]) for i in (0, 2, 4)) + last - first
    assert err.startswith(f"4 episodes, {count} frames in {out}: 1 episode left out"), "and no bars"
    report = check_dataset(out)
    assert told(report) == [] and report.recording.cameras.keys() == {"cam_high", "wrist"}
    data = load_dataset(out)
    parts = [arm.state[0], arm.state[1][first:last], arm.state[2], arm.state[4]]
    np.testing.assert_allclose(data.proprio, np.concatenate(parts), atol=1e-6)
    np.testing.assert_array_equal(data.images["cam_high"][: len(arm.state[0])], arm.pictures[0][FRONT])
    assert list(dict.fromkeys(data.instruction)) == arm.texts

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    stock = LeRobotDataset("local/clean", root=out)
    assert stock.num_episodes == 4 and stock.num_frames == data.num_frames


def test_what_the_simulator_knew_stays_beside_the_frames(tmp_path):
    root = record("tabletop-pick", 3, tmp_path / "demos", num_workers=1)
    assert main(["check", str(root), "--fix", str(tmp_path / "two"), "--drop", "1"]) == 0
    before, after = load_dataset(root).subset([0, 2]), load_dataset(tmp_path / "two")
    np.testing.assert_array_equal(after.privileged, before.privileged)
    np.testing.assert_array_equal(after.action, before.action)
    np.testing.assert_array_equal(after.images["wrist"], before.images["wrist"])


def test_what_is_cut_off_an_end_still_counts_for_the_outcome():
    late, early = np.array([[0], [0], [1]], bool), np.array([[0], [1], [0]], bool)
    assert outcome_kept(late, 2).ravel().tolist() == [False, True]
    assert outcome_kept(early, 2).ravel().tolist() == [False, True] == outcome_kept(early[:2], 2).ravel().tolist()
    assert outcome_kept(np.array([[1.0], [2.0], [4.0], [8.0]], np.float32), 2).ravel().tolist() == [1.0, 14.0]


def test_numbers_that_the_declared_kind_cannot_hold_are_not_rounded():
    halves = np.array([[0.5, 2.0]], np.float32)
    assert _as_declared("action", halves, "float64").dtype == np.float64
    assert _as_declared("action", halves[:, 1:], "int64").tolist() == [[2]]
    with pytest.raises(ValueError, match="'action' holds float32 that int64, which .* declares, cannot hold"):
        _as_declared("action", halves, "int64")


def test_pictures_of_two_sizes_are_brought_to_one(tmp_path):
    arm = Arm(episodes=3)
    for frame in range(5):
        arm.cells[FRONT, frame] = png(np.kron(arm.pictures[0][FRONT][frame], np.ones((2, 2, 1), np.uint8)))
    root = arm.write(tmp_path / "data")
    assert main(["check", str(root), "--fix", str(tmp_path / "one"), "--image-size", "24"]) == 1
    assert told(check_dataset(tmp_path / "one")) == []
    assert load_dataset(tmp_path / "one").images["front"].shape[1:] == (24, 24, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--drop", "1"], "give --fix"),
        (["--image-size", "64"], "give --fix"),
        (["--fix", "out", "--image-size", "2"], "--image-size must be at least 8, got 2"),
        (["--fix", "{root}"], "is already there"),
        (["--fix", "out"], "there is nothing to mend"),
        (["--fix", "out", "--drop", "9"], "there is no episode 9 to leave out, the dataset has 0 to 2"),
        (["--fix", "out", "--drop", "0", "1", "2"], "nothing remains to be written"),
        (["--fix", "out", "--rename", "frnt=a"], "did you mean 'front'?"),
        (["--fix", "out", "--rename", "front"], "--rename front must be OLD=NEW"),
        (["--fix", "out", "--rename", "front=wrist"], "two cameras would have one name"),
        (
            ["--fix", "out", "--rename", "front=cam/high"],
            "no '/' in a camera's name, as in 'cam/high': --rename 'front=NEW'",
        ),
        (["--fix", "{root}/videos/x"], "is a part of the dataset"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(tmp_path, arguments, words, capsys, monkeypatch):
    root = Arm(episodes=3).write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(root), "--pictures", "0", *(part.format(root=root) for part in arguments)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["data"]
