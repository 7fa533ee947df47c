"""`vla check` finds each planted fault and names its episodes."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.vla.checking.recordings import FPS, FRONT, WRIST, Arm
from tests.vla.data.odd_recordings import png
from vla.checking.check import check_dataset

FAULTS = {}


def fault(code, *episodes, **parts):
    """Register a function that plants a fault in an `Arm`: the code it must be found by, its episodes (none: all or not
    said), and "components" or "cameras" that must be named."""

    def register(plant):
        FAULTS[plant.__name__] = (plant, code, episodes, parts)
        return plant

    return register


@fault("rate")
def another_rate_than_declared(arm):
    arm.stamps = [part * 0.8 for part in arm.stamps]


@fault("rate_differs", 3)
def one_episode_at_half_the_rate(arm):
    arm.stamps[3] = arm.stamps[3] * 2


@fault("jitter", 1, 4)
def uneven_time_stamps(arm):
    for episode in (1, 4):
        arm.stamps[episode] = arm.stamps[episode] + np.where(np.arange(len(arm.stamps[episode])) % 4 == 1, 0.03, 0)


@fault("pause", 2)
def a_jump_in_time(arm):
    arm.stamps[2] = arm.stamps[2] + 4.0 * (np.arange(len(arm.stamps[2])) > 20)


@fault("time_backwards", 5)
def time_that_runs_backwards(arm):
    arm.stamps[5][[10, 11]] = arm.stamps[5][[11, 10]]


@fault("idle_ends", 0, 6)
def waiting_at_start_and_end(arm):
    for episode, before, after in ((0, 50, 0), (6, 0, 40)):
        hold(arm, episode, before, after)


@fault("no_motion", 4)
def an_episode_in_which_nothing_happens(arm):
    for part in (arm.state, arm.action):
        part[4] = np.repeat(part[4][:1], len(part[4]), axis=0)


@fault("actions_late")
def actions_that_repeat_the_past(arm):
    for episode, action in enumerate(arm.action):
        arm.action[episode] = np.concatenate([action[:1].repeat(4, 0), action[:-4]])


@fault("delay")
def a_state_that_lags_far_behind(arm):
    for episode, state in enumerate(arm.state):
        arm.state[episode] = np.concatenate([state[:1].repeat(10, 0), state[:-10]])


@fault("delay_differs", 5)
def one_episode_out_of_step(arm):
    arm.state[5] = np.concatenate([arm.state[5][:1].repeat(8, 0), arm.state[5][:-8]])


@fault("gripper_polarity", 3, components=("action gripper",))
def a_gripper_upside_down(arm):
    arm.action[3][:, 6] = 1 - arm.action[3][:, 6]


@fault("gripper_range", 2, components=("action gripper",))
def a_gripper_of_another_range(arm):
    arm.action[2][:, 6] = 2 * arm.action[2][:, 6] - 1


@fault("sign_differs", 6, components=("action joint_2",))
def a_joint_reversed(arm):
    arm.action[6][:, 1] = -arm.action[6][:, 1]


@fault("units_differ", 1)
def degrees_among_radians(arm):
    for part in (arm.state, arm.action):
        part[1][:, :6] = np.degrees(part[1][:, :6])


@fault("units_mixed")
def actions_in_degrees_beside_a_state_in_radians(arm):
    for action in arm.action:
        action[:, :6] = np.degrees(action[:, :6])


@fault("component_dead", components=("observation.state joint_4",))
def a_dead_encoder(arm):
    for state in arm.state:
        state[:, 3] = 0.25


@fault("component_dead", 2, components=("observation.state joint_1",))
def an_encoder_dead_in_one_episode(arm):
    arm.state[2][:, 0] = 0.5


@fault("saturated", components=("action joint_3",))
def an_action_cut_off(arm):
    for action in arm.action:
        action[:, 2] = np.maximum(action[:, 2], 0.3)


@fault("length", 7)
def an_episode_much_too_long(arm):
    for _ in range(3):
        for part in (arm.state, arm.action, arm.task):
            part[7] = np.concatenate([part[7], part[7][::-1]])
        arm.pictures[7] = {key: np.concatenate([p, p[::-1]]) for key, p in arm.pictures[7].items()}
    arm.stamps[7] = np.arange(len(arm.state[7])) / FPS


@fault("jerk", 1)
def a_shaking_episode(arm):
    arm.state[1][:, :6] += np.random.default_rng(5).normal(0, 0.06, arm.state[1][:, :6].shape)


@fault("wild_frame", 4, components=("observation.state joint_2",))
def one_wild_frame(arm):
    arm.state[4][30, 1] += 4


@fault("wild_frame", 0, components=("action joint_5",))
def a_wild_first_action(arm):
    arm.action[0][0, 4] += 5


@fault("one_frame", 2)
def an_episode_of_one_frame(arm):
    for part in (arm.state, arm.action, arm.stamps, arm.task):
        part[2] = part[2][:1]
    arm.pictures[2] = {key: part[:1] for key, part in arm.pictures[2].items()}


@fault("duplicate", 1, 6)
def an_episode_twice(arm):
    for part in (arm.state, arm.action, arm.stamps, arm.pictures):
        part[6] = part[1]
    arm.task[6] = arm.task[1]


@fault("camera_black", 3, cameras=("front",))
def a_camera_that_goes_black(arm):
    arm.pictures[3][FRONT][10:] = 2


@fault("camera_white", 0, 5, cameras=("wrist",))
def a_camera_that_goes_white(arm):
    for episode in (0, 5):
        arm.pictures[episode][WRIST][:] = 255


@fault("camera_still", cameras=("wrist",))
def a_camera_frozen_throughout(arm):
    for part in arm.pictures:
        part[WRIST][:] = arm.pictures[0][WRIST][0]


@fault("camera_frozen", 2, cameras=("front",))
def a_camera_that_freezes(arm):
    arm.pictures[2][FRONT][20:] = arm.pictures[2][FRONT][20]


@fault("camera_dark", 4, 7, cameras=("front",))
def an_underexposed_camera(arm):
    for episode in (4, 7):
        arm.pictures[episode][FRONT] = arm.pictures[episode][FRONT] // 8


@fault("camera_bright", 6, cameras=("front",))
def an_overexposed_camera(arm):
    arm.pictures[6][FRONT] = np.clip(arm.pictures[6][FRONT] * 1.9, 0, 255).astype(np.uint8)


@fault("cameras_swapped", 1, 5, cameras=("front", "wrist"))
def two_cameras_exchanged(arm):
    for episode in (1, 5):
        part = arm.pictures[episode]
        part[FRONT], part[WRIST] = part[WRIST], part[FRONT]


@fault("cameras_identical", *range(8), cameras=("front", "wrist"))
def one_camera_recorded_twice(arm):
    for part in arm.pictures:
        part[WRIST] = part[FRONT]


def row_of(arm, episode, frame):
    return sum(len(part) for part in arm.state[:episode]) + frame


@fault("pictures_unreadable", 2, cameras=("front",))
def a_picture_cut_short(arm):
    arm.cells[FRONT, row_of(arm, 2, 3)] = png(arm.pictures[2][FRONT][3])[:-60]


@fault("pictures_unreadable", 1, 4, cameras=("wrist",))
def pictures_that_are_missing(arm):
    for episode in (1, 4):
        arm.cells[WRIST, row_of(arm, episode, 7)] = None


@fault("pictures_unreadable", 3, cameras=("front",))
def a_picture_of_sixteen_bits(arm):
    arm.cells[FRONT, row_of(arm, 3, 5)] = png(np.full((48, 48), 1500, np.uint16))


@fault("picture_sizes", 5, cameras=("wrist",))
def pictures_of_two_sizes(arm):
    for frame in range(len(arm.state[5])):
        arm.cells[WRIST, row_of(arm, 5, frame)] = png(
            np.kron(arm.pictures[5][WRIST][frame], np.ones((2, 2, 1), np.uint8))
        )


@fault("picture_shape", cameras=("front",))
def pictures_of_another_shape_than_declared(arm):
    arm.shape = [480, 640, 3]


@fault("angle_wraps", 2, components=("observation.state joint_2", "action joint_2"))
def an_angle_that_starts_anew(arm):
    for part in (arm.state, arm.action):
        turning = part[2][:, 1] + np.linspace(0, 6, len(part[2]))
        part[2][:, 1] = (turning + np.pi) % (2 * np.pi) - np.pi


@fault("task_spelling", *range(8))
def tasks_that_differ_in_case_and_spaces(arm):
    arm.texts = ["pick up the red cube", "Pick up  the red cube."]


@fault("task_empty", 1, 3, 5, 7)
def an_empty_task(arm):
    arm.texts[1] = "  "


@fault("task_characters", 0, 2, 4, 6)
def broken_characters(arm):
    arm.texts[0] = "nimm den gr\u00c3\u00bcnen W\ufffdrfel"


@fault("task_words", 1, 3, 5, 7)
def words_that_the_backbone_does_not_know(arm):
    arm.texts[1] = "glorfindle the brzqwk"


@fault("depth_left_out")
def a_camera_that_sees_depth(arm):
    arm.marks[WRIST] = {"is_depth_map": True}


@fault("task_changes", 4)
def two_tasks_in_an_episode(arm):
    arm.task[4][30:] = 1


@fault("not_finite", 2, components=("observation.state",))
def a_nan(arm):
    arm.state[2][7, 3] = np.nan


@fault("not_finite", 0, 3, components=("action",))
def infinities(arm):
    for episode in (0, 3):
        arm.action[episode][5, 0] = np.inf


@fault("motion_lost", components=("observation.state joint_6",))
def an_absolute_encoder(arm):
    for state in arm.state:
        state[:, 5] = 1e10 + state[:, 5]


@fault("too_large", 1, components=("action",))
def a_number_beyond_32_bits(arm):
    arm.action[1][9, 2] = 1e300


@fault("episode_count")
def another_number_of_episodes_in_meta(arm):
    arm.info["total_episodes"] = 9


def hold(arm, episode, before, after):
    """Let an episode wait for so many frames before and after."""

    def longer(part):
        return np.concatenate([part[:1].repeat(before, 0), part, part[-1:].repeat(after, 0)])

    for part in (arm.state, arm.action, arm.task):
        part[episode] = longer(part[episode])
    arm.pictures[episode] = {key: longer(part) for key, part in arm.pictures[episode].items()}
    arm.stamps[episode] = np.arange(len(arm.state[episode])) / FPS


def told(report):
    """The findings that a person should act on."""
    return [finding for finding in report.findings if finding.severity != "note"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_its_episodes_named(tmp_path, name):
    plant, code, episodes, parts = FAULTS[name]
    arm = Arm()
    plant(arm)
    report = check_dataset(arm.write(tmp_path, dtype=np.float64))
    found = [finding for finding in report.findings if finding.code == code]
    assert found, [finding.code for finding in report.findings]
    assert any(finding.episodes == episodes for finding in found), [(f.text, f.episodes) for f in found]
    for part, names in parts.items():
        assert any(getattr(finding, part) == names for finding in found), found
    assert all("\n" not in finding.text for finding in found)
    if found[0].severity != "note":
        assert not report.clean and report.verdict.startswith(("do not train on it", "look at it before"))


def test_the_guide_lists_every_code():
    """docs/train.md is where a person looks up what a finding means."""
    root = Path(__file__).resolve().parents[3]
    files = [
        *(root / "vla" / "data").glob("*.py"),
        *(root / "vla" / "checking").glob("*.py"),
        root / "policies/open_loop.py",
    ]
    codes = {code for file in files for code in re.findall(r'Finding\(\s*"(\w+)"', file.read_text())}
    codes |= {code for _, code, *_ in FAULTS.values()}
    assert len(codes) > 45, "the scan found nothing: it is broken"
    listed = set(re.findall(r"`(\w+)`", (root / "docs" / "train.md").read_text()))
    assert codes - listed == set()


@pytest.mark.parametrize("length", [40, 160])
def test_actions_that_are_the_next_state_are_not_late(tmp_path, length):
    """Slow motion to the very ends of short episodes: the frames that meet none there must not count as a delay."""
    arm = Arm(episodes=4)
    for episode in range(4):
        at = np.arange(length + 1)[:, None] / 12 * (1 + np.arange(7) / 6)
        path = 40 * np.sin(np.random.default_rng(episode).uniform(0, 6, 7) + at)
        arm.state[episode], arm.action[episode] = path[:-1], path[1:]
        arm.stamps[episode] = np.arange(length) / FPS
        arm.task[episode] = np.full(length, episode % 2)
        arm.pictures[episode] = {key: part[[0] * length] for key, part in arm.pictures[episode].items()}
    report = check_dataset(arm.write(tmp_path / "next", dtype=np.float64), pictures=0)
    assert "actions_late" not in {finding.code for finding in report.findings}
    assert any("in the next frame" in f.text for f in report.findings if f.code == "delay_usual")
    arm.action = [np.concatenate([part[:1].repeat(3, 0), part[:-3]]) for part in arm.action]
    late = check_dataset(arm.write(tmp_path / "late", dtype=np.float64), pictures=0)
    assert any("frames before the action" in f.text for f in late.findings)


def test_a_word_without_end_is_cut(tmp_path):
    arm = Arm(episodes=4)
    arm.texts[0] = "lift " + "xq" * 2500
    (said,) = (f.text for f in check_dataset(arm.write(tmp_path), pictures=0).findings if f.code == "task_words")
    assert "'xqxqxq" in said and "..." in said and len(said) < 400


def test_units_that_differ_are_told_once(tmp_path):
    """Ranges of two units would make the other episodes idle and the one jerky."""
    arm = Arm()
    degrees_among_radians(arm)
    assert {finding.code for finding in told(check_dataset(arm.write(tmp_path), pictures=0))} == {"units_differ"}


def test_files_out_of_order_read_the_same(tmp_path):
    """Rows in any order within the files: episodes are those that `index` says."""
    arm = Arm(episodes=4)
    a_wild_first_action(arm)
    root = arm.write(tmp_path)
    path = root / "data" / "chunk-000" / "file-000.parquet"
    plain = [(finding.code, finding.text) for finding in check_dataset(root).findings]
    table = pq.read_table(path)
    half = len(table) // 2
    pq.write_table(table.slice(half), path)
    pq.write_table(table.slice(0, half), path.with_name("file-001.parquet"))
    assert [(finding.code, finding.text) for finding in check_dataset(root).findings] == plain
