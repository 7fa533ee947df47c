"""A black box that could not be written to its end: the robot goes on, the run says so, and so does the log."""

import json
import resource

import numpy as np
import pytest

from bascule.main import main
from policies.control.controller import ControlConfig, control
from policies.control.flight_log import BlackBox, LogIncomplete, frames_file, incomplete, pictures_lost, replay
from policies.control.guards import GuardConfig
from policies.lerobot.recording import to_dataset
from tests.policies.control.own_robots import Right
from tests.policies.control.toy_robot import STEADY, Clock, Says, Slide, drive
from vla.data.lerobot_dataset import load_dataset


def test_a_full_disk_lets_the_robot_go_on_and_the_log_says_that_it_is_incomplete(tmp_path, capsys):
    path, before = tmp_path / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        with pytest.raises(LogIncomplete, match=r"log\.jsonl is incomplete: no space left on the device holding"):
            with BlackBox(path) as box:
                robot, report = drive(STEADY, log=box)
        with pytest.raises(LogIncomplete):
            box.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert report.ended == "time" and report.ticks == len(robot.sent) == 50
    assert capsys.readouterr().err.count("is incomplete: no space left") == 1
    kept = len(replay(path))
    assert 0 < kept < 50 and f"breaks off after {kept} ticks" in incomplete(path)


def test_a_run_that_was_refused_leaves_no_log_in_the_way_of_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    for kept in (False, True):
        with pytest.raises(ValueError, match="refused"), BlackBox(path) as box:
            if kept:  # it had begun
                drive(STEADY, log=box)
            raise ValueError("refused")
        assert path.exists() == frames_file(path).exists() == kept


def test_a_log_that_a_crash_cut_is_incomplete_and_one_of_before_is_not(tmp_path):
    path = tmp_path / "log.jsonl"
    with BlackBox(path) as box:
        drive(STEADY, log=box)
    lines = path.read_text().splitlines(keepends=True)
    assert incomplete(path) is None and json.loads(lines[-1]) == {"end": 50}
    path.write_text("".join(lines[:-1]))
    assert "before the run ended" in incomplete(path)
    path.write_text("".join([*lines[:20], *lines[21:]]))
    assert "49 of 50 ticks" in incomplete(path)
    old = [lines[0].replace(', "ends": true', ""), *lines[1:-1]]
    path.write_text("".join(old))
    assert incomplete(path) is None
    path.write_text("".join(old)[:-5])
    assert "its last line is cut" in incomplete(path)


@pytest.mark.parametrize("content", [b'{\n  "fps": 20\n}\n', b"\xff\xfe\x00\x01\n", b"[1, 2]\n"])
@pytest.mark.parametrize("reading", [["--replay"], ["--to-dataset", "made"]])
def test_what_is_no_log_is_named(tmp_path, capsys, monkeypatch, content, reading):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "info.json").write_bytes(content)
    assert main(["control", "info.json", *reading]) == 2
    line = "vla: error: info.json is no log of `vla control --log`, or is damaged: line 1 is no JSON object\n"
    assert capsys.readouterr().err == line


def test_a_log_is_replayed_or_turned_into_a_dataset_but_not_both(tmp_path, capsys):
    """The second would be left out, and exit code 0 says that every decision is as logged."""
    assert main(["control", str(tmp_path / "log.jsonl"), "--replay", "--to-dataset", str(tmp_path / "made")]) == 2
    assert "--replay and --to-dataset" in capsys.readouterr().err


def test_a_dataset_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, capsys):
    log, out, before = tmp_path / "log.jsonl", tmp_path / "made", resource.getrlimit(resource.RLIMIT_FSIZE)
    with BlackBox(log) as box:
        drive(STEADY, log=box)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        assert main(["control", str(log), "--to-dataset", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"vla: error: no space left on the device holding {out}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "log.jsonl.frames"]
    assert main(["control", str(log), "--to-dataset", str(out)]) == 0 and (out / "meta" / "info.json").is_file()


def test_logs_put_together_are_told_apart_from_one_that_is_incomplete(tmp_path, capsys):
    for name in ("one", "two"):
        with BlackBox(tmp_path / name) as box:
            drive(STEADY, log=box)
    both = tmp_path / "both.jsonl"
    both.write_text((tmp_path / "one").read_text() + (tmp_path / "two").read_text())
    for reading in (["--replay"], ["--to-dataset", str(tmp_path / "made")]):
        assert main(["control", str(both), *reading]) == 2
        line = f"vla: error: {both} holds the logs of 2 runs, put together: give each by itself\n"
        assert capsys.readouterr().err == line
    assert not (tmp_path / "made").exists()


def test_a_log_that_an_editor_on_windows_saved_is_read(tmp_path, capsys):
    with BlackBox(tmp_path / "log.jsonl") as box:
        drive(STEADY, log=box)
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-8-sig", newline="\r\n")
    assert main(["control", str(tmp_path / "log.jsonl"), "--replay"]) == 0
    assert capsys.readouterr().out == "50 ticks, 50 decided as logged\n"


def test_pictures_that_are_cut_are_told_in_a_dataset_of_the_log(tmp_path, capsys):
    log, out = tmp_path / "log.jsonl", tmp_path / "made"
    with BlackBox(log) as box:
        drive(STEADY, log=box)
    pictures = frames_file(log).read_bytes()
    one = 4 * 4 * 3
    assert len(pictures) == 50 * one and pictures_lost(log) is None
    frames_file(log).write_bytes(pictures[: 30 * one + 7])
    assert main(["control", str(log), "--to-dataset", str(out)]) == 1
    line = "log.jsonl.frames is cut, of 50 ticks the pictures of 20 are missing"
    assert line in capsys.readouterr().err and load_dataset(out).num_frames == 30
    assert main(["control", str(log), "--replay"]) == 0, "which needs no pictures"


def test_a_dry_run_becomes_no_recording(tmp_path, capsys):
    """Its actions were never sent, whatever else the log holds."""
    log, out = tmp_path / "log.jsonl", tmp_path / "made"
    with BlackBox(log) as box:
        drive(STEADY, log=box, dry_run=True)
    assert main(["control", str(log), "--to-dataset", str(out)]) == 2
    assert "--dry-run: the robot was sent none of its actions" in capsys.readouterr().err and not out.exists()


def test_a_dataset_of_a_run_holds_what_the_robot_took_where_it_cut_a_command_short(tmp_path):
    """The robot moves at most 0.04 of x a tick, as with `max_relative_target`, and `send` returns what it took."""

    class Slow(Slide):
        def send(self, action_A):
            took = np.array([np.clip(action_A[0], *(self.position[0] + np.array([-0.04, 0.04]))), *action_A[1:]])
            super().send(took.astype(np.float32))
            return None if took[0] == action_A[0] else tuple(took.tolist())

    with BlackBox(tmp_path / "log.jsonl") as box:
        robot, _ = drive(STEADY, robot=Slow(Clock()), log=box, seconds=0.1)
    data = load_dataset(to_dataset(tmp_path / "log.jsonl", tmp_path / "made"))
    np.testing.assert_array_equal(data.action, np.array(robot.sent))
    np.testing.assert_allclose(data.action[:, 0], [0.04, 0.08, 0.1, 0.1, 0.1], atol=1e-6)


def test_lines_in_another_order_are_told(tmp_path, capsys):
    """A dataset of them would hold motions that never were; as many ticks as there were are there."""
    log = tmp_path / "log.jsonl"
    with BlackBox(log) as box:
        drive(STEADY, log=box)
    lines = log.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if '"tick": 20' in line)
    for changed in ([lines[first + 1], lines[first]], [lines[first], lines[first]]):
        log.write_text("".join([*lines[:first], *changed, *lines[first + 2 :]]))
        for reading in (["--replay"], ["--to-dataset", str(tmp_path / "made")]):
            assert main(["control", str(log), *reading]) == 2
            assert "was changed after its run: behind tick 2" in capsys.readouterr().err


def test_pictures_of_another_run_are_told_and_never_written_over(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    with BlackBox(log) as box:
        drive(STEADY, log=box)
    frames_file(log).write_bytes(bytes(60 * 48))
    assert main(["control", str(log), "--to-dataset", str(tmp_path / "made")]) == 1
    assert "holds 60 views, and the log" in capsys.readouterr().err
    log.unlink()
    with pytest.raises(ValueError, match=r"log.jsonl.frames holds the pictures of a log: choose another file"):
        BlackBox(log)
    assert frames_file(log).stat().st_size == 60 * 48 and not log.exists()


def test_a_dataset_says_of_a_tick_that_sent_nothing_what_was_in_effect(tmp_path):
    """0 is a place, too: of an arm that stood at 0.7 when the e-stop was pressed it would teach a motion to 0."""
    log = tmp_path / "log.jsonl"

    def start(robot):
        robot.position[0] = 0.7 if robot.looks < 3 else robot.position[0]

    looks = []
    with BlackBox(log) as box:
        clock = Clock()
        robot = Slide(clock, start)
        settings = ControlConfig(duration_s=1.0, asynchronous=False)
        pressed = lambda: looks.append(0) or len(looks) > 40  # noqa: E731
        report = control(robot, Says([[0.7, 0.01, -1.0]] * 8), settings, log=box, pressed=pressed, clock=clock,
                         sleep=clock.sleep)  # fmt: skip
    assert report.ended == "disconnect"
    data = load_dataset(to_dataset(log, tmp_path / "made"))
    np.testing.assert_allclose(data.action[-1], [0.7, 0.0, -1.0], atol=1e-6)


def test_the_log_of_a_robot_without_bounds_or_a_known_switch_replays(tmp_path):
    """Infinity and NaN are words in its file."""

    class Free(Right):
        low, high = (-np.inf,) * 3, (np.inf,) * 3

        def rest(self):
            return 0.0, 0.0, np.nan

    clock = Clock()
    settings = ControlConfig(duration_s=0.5, asynchronous=False, guards=GuardConfig(velocity={"dx": np.inf}))
    with BlackBox(tmp_path / "log.jsonl") as box:
        control(Free(clock=clock), Says(np.zeros((8, 3))), settings, log=box, clock=clock, sleep=clock.sleep)
    pairs = replay(tmp_path / "log.jsonl")
    assert len(pairs) == 25 and all(logged == again for logged, again in pairs)


@pytest.mark.parametrize("part", ["decision", "sent", "inputs", "frame"])
def test_a_log_that_was_edited_is_told_and_one_that_is_damaged_refused(tmp_path, capsys, part):
    log = tmp_path / "log.jsonl"
    with BlackBox(log) as box:
        drive(STEADY, log=box, seconds=0.3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (tick,) = (line for line in lines if line.get("tick") == 8)

    def converted(name):
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return main(["control", str(log), "--to-dataset", str(tmp_path / name)])

    if part == "sent":
        tick["sent"] = [0.5, 0.0, -1.0]
    elif part == "decision":
        tick["decision"]["action"] = [0.5, 0.0, -1.0]
    if part in ("sent", "decision"):
        assert converted("made") == 1
        assert "does not agree with itself at 1 ticks, first at tick 8" in capsys.readouterr().err
    else:
        tick[part] = None
        assert converted("damaged") == 2
        assert "log.jsonl is damaged, was changed after its run, or is of another" in capsys.readouterr().err
