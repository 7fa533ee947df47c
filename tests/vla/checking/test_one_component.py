"""Faults of one component alone, marks for no value and another unit; and actions that are exactly late."""

import numpy as np
import pytest

from tests.vla.checking.recordings import FRONT, Arm
from tests.vla.checking.test_check import told
from vla.checking.check import check_dataset
from vla.checking.scales import stray_values


def arm_in_degrees(episodes=6, frames=60, offset=0.0):
    """Joints in sines of 0.3 Hz at 30 Hz with the noise of an encoder, around `offset`; a gripper from 0 to 1."""
    arm, rng = Arm(episodes=0), np.random.default_rng(1)
    arm.shape = [4, 4, 3]
    for _ in range(episodes):
        at = 2 * np.pi * 0.3 * np.arange(frames)[:, None] / 30 * (1 + np.arange(6) / 12) + rng.uniform(0, 6, 6)
        action = np.column_stack([30 * np.sin(at) + offset, (1 + np.sin(2 * at[:, 0])) / 2])
        state = np.concatenate([action[:1], action[:-1]]) + rng.normal(0, 0.05, action.shape) * [*[1] * 6, 0.02]
        arm.state.append(state)
        arm.action.append(action)
        arm.pictures.append({FRONT: np.zeros((frames, 4, 4, 3), np.uint8)})
        arm.stamps.append(np.arange(frames) / 20)
        arm.task.append(np.zeros(frames, np.int64))
    return arm


def findings(arm, root):
    return told(check_dataset(arm.write(root), pictures=0))


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_the_arm_as_it_is_has_no_finding(tmp_path, offset):
    assert findings(arm_in_degrees(offset=offset), tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value", "share", "run"),
    [("observation.state", -999.0, 0.03, 1), ("observation.state", 65535.0, 0.05, 3), ("action", -999.0, 0.2, 1),
     ("observation.state", 0.0, 0.04, 1), ("observation.state", -999.0, 0.01, 1)],
)  # fmt: skip
def test_a_mark_for_no_value_is_named_whatever_its_share(tmp_path, key, value, share, run):
    arm, rng = arm_in_degrees(offset=50.0 if value == 0 else 0.0), np.random.default_rng(0)
    for part in arm.state if key == "observation.state" else arm.action:
        for start in rng.choice(np.arange(2, 54, 2 + run), max(1, round(share * 60 / run)), replace=False):
            part[start : start + run, 2] = value
    found = [finding for finding in findings(arm, tmp_path) if finding.code == "wild_frame"]
    assert [finding.components for finding in found] == [(f"{key} joint_3",)]
    assert f"is exactly {value:.6g} in " in found[0].text and found[0].episodes == tuple(range(6))


def test_what_rests_and_what_switches_holds_no_mark(tmp_path):
    """A joint that rests at its end for a second, and a nameless opening of two levels that bounces."""
    arm = arm_in_degrees(offset=50.0)
    for state, action in zip(arm.state, arm.action, strict=True):
        for part in (state, action):
            part[:, 1] = np.minimum(part[:, 1], 65)
            part[:, 2] = np.where(np.arange(60) % 8 < 4, 0.0, 70.0)
    assert {finding.code for finding in findings(arm, tmp_path)} <= {"saturated", "units_mixed"}


def test_actions_that_repeat_the_last_state_exactly_are_late(tmp_path):
    arm = arm_in_degrees()
    for state, action in zip(arm.state, arm.action, strict=True):
        action[1:] = state[:-1]
    report = check_dataset(arm.write(tmp_path), pictures=0)
    codes = {finding.code: finding.text for finding in report.findings}
    assert "the state changes 2 frames before" in codes["actions_late"] and "delay_usual" not in codes


@pytest.mark.parametrize(
    ("component", "factor", "offset"), [(2, np.pi / 180, 0.0), (2, np.pi / 180, 50.0), (6, 100.0, 0.0)]
)
def test_one_component_in_another_unit_is_named(tmp_path, component, factor, offset):
    arm = arm_in_degrees(offset=offset)
    for number in (1, 3):
        for part in (arm.state, arm.action):
            part[number][:, component] *= factor
    found = findings(arm, tmp_path)
    assert {finding.code for finding in found} <= {"units_differ", "gripper_range"}
    assert {finding.episodes for finding in found} == {(1, 3)}
    assert {part for finding in found for part in finding.components} == {
        f"{key} {arm.names[component]}" for key in ("observation.state", "action")
    }


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_small_motion_is_no_other_unit(tmp_path, noise):
    """A joint that rests near its zero in two episodes, by a hundredth of its range; and one that rests elsewhere."""
    arm, rng = arm_in_degrees(), np.random.default_rng(0)
    for number in (1, 3):
        rest = rng.normal(0, noise, (60, 1)) if noise else 0.3 * np.sin(np.arange(60) / 9)[:, None] + 20
        arm.state[number][:, 2:3] = arm.action[number][:, 2:3] = rest
    assert "units_differ" not in {finding.code for finding in findings(arm, tmp_path)}


def test_what_every_episode_starts_with_is_no_mark(tmp_path):
    """The very same value in the first frame, left by a jump, as that of a gripper before it was read."""
    arm = arm_in_degrees()
    for state in arm.state:
        state[:, 6] = 0.1 + state[:, 6] / 100
        state[0, 6] = 5.0
    assert not any("mark for no value" in finding.text for finding in findings(arm, tmp_path))


def test_an_encoder_that_starts_anew_holds_no_mark():
    """Its ends are reached from the other end, time and again."""
    walk = np.random.default_rng(0).normal(0, 1, 20_000).cumsum()
    rows = (np.round(walk / 4) % 1024)[:, None]
    assert stray_values(rows, np.zeros(len(rows)), "observation.state", ["joint"]) == {}
    rows[50::90] = 5000
    assert stray_values(rows, np.zeros(len(rows)), "observation.state", ["joint"]) == {0: (5000.0,)}


def displacements(arm):
    """The same arm, commanded by displacements: each action is the way to the next position."""
    for state, action in zip(arm.state, arm.action, strict=True):
        action[:, :6] = np.diff(action[:, :6], axis=0, append=action[-1:, :6])
        state[:, :6] = state[0, :6] + np.cumsum(action[:, :6], axis=0)
    return arm


@pytest.mark.parametrize("change", [lambda arm: arm, displacements])
@pytest.mark.parametrize(
    ("columns", "value", "words"),
    [
        (slice(0, 7), 0.0, "all components of the state hold exactly one value for 25 frames from frame 35 of"),
        (slice(2, 3), 0.0, "state component 'joint_3' holds exactly one value for 25 frames from frame 35 of"),
        (slice(2, 3), None, "state component 'joint_3' holds exactly one value for 26 frames from frame 34 of"),
    ],
)
def test_a_state_that_stops_measuring_is_named(tmp_path, change, columns, value, words):
    """From one frame on it is 0, or what it was before, while the robot goes on."""
    arm = change(arm_in_degrees(offset=50.0))
    for episode in (1, 4):
        arm.state[episode][35:, columns] = arm.state[episode][34, columns] if value is None else value
    dead = [finding for finding in findings(arm, tmp_path) if finding.code == "component_dead"]
    assert [finding.episodes for finding in dead] == [(1, 4)]
    assert dead[0].text.startswith(f"{words} episode 1 (and in episode 4)")


def test_a_joint_at_its_end_and_one_that_rests_have_not_stopped(tmp_path):
    """One is commanded beyond its end, where the robot holds it; nobody moves the other one for a second."""
    arm = arm_in_degrees(offset=50.0)
    for state, action in zip(arm.state, arm.action, strict=True):
        state[:, 1] = np.minimum(state[:, 1], 65)
        for part in (state, action):
            part[20:40, 2] = part[20, 2]
            part[40:, 2] = part[20, 2] + np.linspace(0, 10, 20)
    assert "component_dead" not in {finding.code for finding in findings(arm, tmp_path)}


@pytest.mark.parametrize("odd", [(1, 3, 5, 7), (6,)])
def test_red_and_blue_exchanged_in_some_episodes(tmp_path, odd):
    arm = Arm()
    for episode in odd:
        arm.pictures[episode][FRONT] = arm.pictures[episode][FRONT][..., ::-1]
    found = told(check_dataset(arm.write(tmp_path)))
    assert [(one.code, one.episodes, one.cameras) for one in found] == [("colours_swapped", odd, ("front",))]


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_one_episode_is_enough_where_state_and_action_disagree(tmp_path, key):
    arm = arm_in_degrees()
    (arm.state if key == "observation.state" else arm.action)[3][:, 2] *= np.pi / 180
    found = [finding for finding in findings(arm, tmp_path) if finding.code == "units_differ"]
    assert [(finding.episodes, finding.components) for finding in found] == [((3,), (f"{key} joint_3",))]


def test_one_episode_of_small_motion_is_no_other_unit(tmp_path):
    arm = arm_in_degrees()
    for part in (arm.state, arm.action):
        part[3][:, 2] *= np.pi / 180
    assert "units_differ" not in {finding.code for finding in findings(arm, tmp_path)}


def of_code(found, code):
    return [(finding.episodes, finding.components) for finding in found if finding.code == code]


@pytest.mark.parametrize(("column", "factor"), [(2, np.pi / 180), (6, 100.0)])
def test_one_action_in_another_unit_than_its_state(tmp_path, column, factor):
    """In all episodes alike: a joint's action in radians, a gripper's state in percent."""
    arm = arm_in_degrees()
    for part in arm.state if column == 6 else arm.action:
        part[:, column] *= factor
    both = (f"action {arm.names[column]}", f"observation.state {arm.names[column]}")
    assert of_code(findings(arm, tmp_path), "units_mixed") == [((), both)]


def test_episodes_in_another_unit_are_told_by_where_they_start(tmp_path):
    """Ranges differ fourfold between the tasks, but every episode starts at about the same pose."""
    arm = arm_in_degrees(frames=80)
    for number, (state, action) in enumerate(zip(arm.state, arm.action, strict=True)):
        for part in (state, action):
            part[:, 2] = 60 + (part[:, 2] - part[0, 2]) * (0.5, 2.0)[number % 2]
            part[:, 2] *= np.pi / 180 if number in (1, 4) else 1
    found = of_code(findings(arm, tmp_path), "units_differ")
    assert found == [((1, 4), ("observation.state joint_3",)), ((1, 4), ("action joint_3",))]


def test_names_exchanged_in_the_state_alone(tmp_path):
    arm = arm_in_degrees()
    for state in arm.state:
        state[:, [1, 3]] = state[:, [3, 1]]
    parts = ("observation.state joint_2", "observation.state joint_4")
    assert of_code(findings(arm, tmp_path), "component_names") == [((), parts)]


@pytest.mark.parametrize("odd", [(1, 4), range(6)])
def test_a_state_with_another_zero_than_its_action(tmp_path, odd):
    arm = arm_in_degrees()
    for number in odd:
        arm.state[number][:, 3] += 35
    numbers = () if len(odd) == 6 else odd
    assert of_code(findings(arm, tmp_path), "zero_differs") == [(numbers, ("observation.state joint_4",))]


def test_a_gripper_of_the_opposite_sense_is_not_called_a_target(tmp_path):
    arm = arm_in_degrees()
    for action in arm.action:
        action[:, 6] = 1 - action[:, 6]
    notes = {f.code: f.text for f in check_dataset(arm.write(tmp_path), pictures=0).findings if f.severity == "note"}
    assert "gripper -> gripper" in notes["actions_reversed"] and "gripper" not in notes["actions_absolute"]


def test_small_displacements_beside_a_gripper_are_no_rotation(tmp_path):
    arm = arm_in_degrees()
    for action in arm.action:
        action[:, 3:6] /= 1000
        action[:, 6] = np.where(action[:, 6] > 0.5, 1.0, -1.0)
    assert "rotation_sign" not in {finding.code for finding in findings(arm, tmp_path)}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda part: part[:, ::-1, ::-1], "camera_turned"),
        (lambda part: np.repeat(part.mean(-1, keepdims=True).astype(np.uint8), 3, -1), "camera_grey"),
    ],
)
def test_a_camera_that_is_changed_in_some_episodes(tmp_path, change, code):
    arm = Arm()
    for part in arm.pictures:
        part[FRONT][:, :12, :24] = (20, 60, 220)  # a corner of the room, by which one sees where up and left are
    for episode in (2, 5):
        arm.pictures[episode][FRONT] = change(arm.pictures[episode][FRONT])
    found = told(check_dataset(arm.write(tmp_path)))
    assert [(one.code, one.episodes, one.cameras) for one in found] == [(code, (2, 5), ("front",))]


def test_scenes_that_are_mirrored_are_no_mirrored_camera(tmp_path):
    """A cabinet stands on the left in some episodes, on the right in the others."""
    arm = Arm()
    for number, part in enumerate(arm.pictures):
        part[FRONT][:, 10:40, slice(0, 20) if number % 3 else slice(28, 48)] = (20, 60, 220)
    assert told(check_dataset(arm.write(tmp_path))) == []
