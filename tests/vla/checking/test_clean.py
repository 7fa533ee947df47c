"""`vla check` has no finding above a note about clean recordings of several kinds."""

import numpy as np
import pytest

from envs.demos.record import record
from tests.vla.checking.recordings import Arm
from tests.vla.checking.test_check import told
from vla.checking.check import check_dataset


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_clean_joint_position_recording_has_no_finding_above_a_note(tmp_path, kind):
    report = check_dataset(Arm().write(tmp_path, kind=kind))
    assert told(report) == [] and report.clean and report.verdict.startswith("ready to train on")
    assert {"actions_absolute", "delay_usual"} <= {finding.code for finding in report.findings}


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_recording_of_a_follower_arm(tmp_path, seed):
    """Degrees in steps of an encoder, a follower that lags, a gripper that stalls on the object, a joint that is not
    used in some episodes and a gripper that is not in others."""
    arm, rng = Arm(episodes=9, seed=seed), np.random.default_rng(seed)
    for episode, action in enumerate(arm.action):
        action = np.column_stack([np.degrees(0.8 * action[:, :6]), 70 * action[:, 6] + 20])
        if episode % 3 == 0:
            action[:, 4] = 12.3
        if episode % 4 == 1:
            action[:, 6] = 90
        state = action.copy()
        for t in range(1, len(action)):
            state[t] = state[t - 1] + 0.45 * (action[t - 1] - state[t - 1])
        state[:, 6] = np.maximum(state[:, 6], 38 + rng.uniform(-3, 3))
        state += rng.normal(0, 0.05, state.shape)
        arm.state[episode], arm.action[episode] = (np.round(part / 0.088) * 0.088 for part in (state, action))
    report = check_dataset(arm.write(tmp_path))
    assert told(report) == [] and "actions_absolute" in {finding.code for finding in report.findings}


def test_a_clean_recording_of_relative_actions(tmp_path):
    arm = Arm()
    for episode, action in enumerate(arm.action):
        arm.action[episode] = np.column_stack([np.diff(action[:, :6], axis=0, append=action[-1:, :6]), action[:, 6]])
    report = check_dataset(arm.write(tmp_path))
    assert told(report) == [] and "actions_relative" in {finding.code for finding in report.findings}


def test_clean_demonstrations_of_the_tabletop(tmp_path):
    report = check_dataset(record("tabletop-pick", 6, tmp_path / "demos", num_workers=1))
    assert told(report) == []
    (relative,) = [finding for finding in report.findings if finding.code == "actions_relative"]
    assert "dz -> grip_z" in relative.text
