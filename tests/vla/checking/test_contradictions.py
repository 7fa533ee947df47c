"""Recordings that contradict themselves: one rotation of two signs, and two task strings for one episode."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.vla.checking.recordings import NAMES, Arm
from tests.vla.checking.test_check import told
from vla.checking.check import check_dataset, training_warnings
from vla.data.lerobot_dataset import load_dataset

QUATERNION = ("qx", "qy", "qz", "qw")


def turned(arm, sign):
    """The arm with its hand's rotation behind state and action: about z, from 2.9 to 3.5 radians, so that qw passes 0.
    `sign(episode, frames)`: by which the quaternions are multiplied."""
    arm.names = (*NAMES, *QUATERNION)
    for episode, (state, action) in enumerate(zip(arm.state, arm.action, strict=True)):
        half = np.linspace(2.9, 3.5, len(state)) / 2 + 0.1 * np.sin(np.arange(len(state)) / 4)
        rotation = np.column_stack([0 * half, 0 * half, np.sin(half), np.cos(half)])
        rotation *= np.broadcast_to(sign(episode, len(state)), len(state))[:, None]
        arm.state[episode], arm.action[episode] = (np.column_stack([part, rotation]) for part in (state, action))
    return arm


def rotation_signs(root):
    return [finding for finding in check_dataset(root, pictures=0).findings if finding.code == "rotation_sign"]


def test_a_rotation_of_one_sign_has_no_finding(tmp_path):
    root = turned(Arm(), lambda episode, frames: 1).write(tmp_path)
    assert rotation_signs(root) == [] and told(check_dataset(root, pictures=0)) == []


def test_signs_that_flip_between_frames(tmp_path):
    """Some libraries keep qw positive, so that a quaternion jumps to its opposite between two frames."""
    flip = lambda episode, frames: np.where(np.arange(frames) < 30, 1, -1) if episode in (2, 5) else 1  # noqa: E731
    state, action = rotation_signs(turned(Arm(), flip).write(tmp_path))
    for kind, key, finding in (("state", "observation.state", state), ("action", "action", action)):
        assert finding.severity == "warning" and finding.episodes == (2, 5)
        assert finding.components == tuple(f"{key} {name}" for name in QUATERNION)
        assert finding.text.startswith(
            f"{kind} components 'qx', 'qy', 'qz', 'qw' are a quaternion whose sign flips 2 times between frames in "
            "episodes 2 and 5: q and -q are the same rotation"
        )


def test_episodes_of_the_other_sign(tmp_path):
    found = rotation_signs(turned(Arm(), lambda episode, frames: -1 if episode == 3 else 1).write(tmp_path))
    assert [(finding.episodes, "from episode to episode 3" in finding.text) for finding in found] == [((3,), True)] * 2


def test_training_warns_of_signs_that_flip(tmp_path):
    root = turned(Arm(episodes=4), lambda episode, frames: (-1.0) ** np.arange(frames)).write(tmp_path)
    assert any("are a quaternion whose sign flips" in line for line in training_warnings(root, load_dataset(root)))


def test_grippers_that_snap_between_one_and_minus_one_are_no_rotation(tmp_path):
    arm = Arm()
    for part in (*arm.state, *arm.action):
        part[:, 3:6], part[:, 6] = 0, np.sign(part[:, 6] - 0.5)
    assert rotation_signs(arm.write(tmp_path)) == []


def with_tasks(root, texts):
    """The dataset with a list of task strings for every episode in meta/episodes, as LeRobot writes them."""
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(path).append_column("tasks", pa.array(texts, pa.list_(pa.string()))), path)
    return root


RED, BLUE = "pick up the red cube", "lift the blue ball"


def disagreeing(root):
    return [finding for finding in check_dataset(root, pictures=0).findings if finding.code == "task_disagrees"]


@pytest.mark.parametrize("texts", [[[RED], [BLUE]] * 2, [["Pick up the red cube. "], [BLUE]] * 2, [[], None] * 2])
def test_task_strings_that_agree(tmp_path, texts):
    assert disagreeing(with_tasks(Arm(episodes=4).write(tmp_path), texts)) == []


def test_tasks_that_were_numbered_anew(tmp_path):
    """meta/tasks.parquet was sorted by its strings, the frames kept their numbers."""
    arm = Arm(episodes=4)
    arm.texts = [BLUE, RED]
    (finding,) = disagreeing(with_tasks(arm.write(tmp_path), [[RED], [BLUE]] * 2))
    assert finding.severity == "error" and finding.episodes == (0, 1, 2, 3)
    assert finding.text.startswith(
        f"meta/episodes says '{RED}' for episode 0, the number of its frames is '{BLUE}' in meta/tasks.parquet, which "
        "is what is learnt (4 such episodes)"
    )
    assert load_dataset(tmp_path).instruction[0] == BLUE
    assert finding.text in training_warnings(tmp_path, load_dataset(tmp_path))


def test_a_task_that_was_reworded_in_one_place(tmp_path):
    root = with_tasks(Arm(episodes=4).write(tmp_path), [["grasp the cube"], [BLUE]] * 2)
    assert [(finding.severity, finding.episodes) for finding in disagreeing(root)] == [("warning", (0, 2))]


def test_episodes_that_meta_does_not_list_and_that_data_does_not_hold(tmp_path):
    """One deleted by hand from one of the two alone: its frames would be learnt, or be missing, without a word."""
    root = Arm(episodes=4).write(tmp_path)
    (listed,) = (root / "meta" / "episodes").glob("*/*.parquet")
    whole = pq.read_table(listed)
    pq.write_table(whole.take([0, 2, 3]), listed)
    (finding,) = told(check_dataset(root, pictures=0))
    assert finding.code == "episode_unlisted" and finding.episodes == (1,) and "data/ holds the frames" in finding.text
    assert any("does not list episode 1" in line for line in training_warnings(root, load_dataset(root)))
    pq.write_table(pa.concat_tables([whole, whole.slice(3).set_column(0, "episode_index", pa.array([4]))]), listed)
    (finding,) = told(check_dataset(root, pictures=0))
    assert finding.code == "episode_absent" and finding.episodes == (4,) and "holds no frame" in finding.text


@pytest.mark.parametrize("radians", [(0, 2, 4), (1, 3, 5)])
def test_half_of_the_episodes_in_radians_are_told(tmp_path, radians):
    """The median of all lies between the two units."""
    arm = Arm(episodes=6)
    for number in set(range(6)) - set(radians):
        for part in (arm.state, arm.action):
            part[number][:, :6] = np.degrees(part[number][:, :6])
    found = [f for f in check_dataset(arm.write(tmp_path), pictures=0).findings if f.severity != "note"]
    assert {finding.code for finding in found} == {"units_differ"} and len(found) == 2
    assert all(
        finding.episodes == radians and "is in radians, the others in degrees" in finding.text for finding in found
    )


def test_a_gripper_that_answers_at_once_makes_no_joint_late(tmp_path):
    """Two changes of a switch, measured in the frame of their command, say nothing of the joints."""
    arm = Arm(episodes=6)
    for number in range(6):
        length = len(arm.action[number])
        at = np.arange(length + 2)[:, None] / 20 * (1 + np.arange(6) / 6) + number
        arm.action[number][:, :6], arm.state[number][:, :6] = np.sin(at[2:]), np.sin(at[:-2])
        arm.action[number][:, 6] = arm.state[number][:, 6] = (np.arange(length) % 30 > 14).astype(np.float64)
    codes = {finding.code for finding in check_dataset(arm.write(tmp_path), pictures=0).findings}
    assert "actions_late" not in codes and "delay_usual" in codes


def test_motion_that_32_bits_have_lost_already_is_told(tmp_path):
    """3e7 and its neighbours are 2 apart."""
    arm = Arm(episodes=4)
    for state in arm.state:
        state[:, 5] = 3e7 + np.round(2 * np.sin(np.arange(len(state))))
    (finding,) = [
        f for f in check_dataset(arm.write(tmp_path, dtype=np.float32), pictures=0).findings if f.code == "motion_lost"
    ]
    assert "changes by 4 around 3e+07, which 32-bit numbers tell only to 1" in finding.text


def test_task_strings_are_counted_by_frames(tmp_path):
    """A few frames of every episode have another one."""
    arm = Arm(episodes=4)
    for number, task in enumerate(arm.task):
        arm.task[number] = np.where(np.arange(len(task)) < 9, 0, 1)
    assert "2 task strings" in check_dataset(arm.write(tmp_path), pictures=0).size()
