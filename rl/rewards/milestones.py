"""Milestones of an episode without a teacher: where the gripper changes for good, and the arm stands nearly still.

VLA-RL (Lu et al. 2025, arXiv 2505.18719) cuts episodes at significant changes of the gripper's opening and takes frames
of almost no speed as completions of a sub-task. Its code has no labelling script; this is a reconstruction. Pure numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rl.configs.rewards import MilestoneConfig


def gripper_events(gripper_T: NDArray[np.floating], config: MilestoneConfig, *, span: float = 2.0) -> list[int]:
    """First frames of lasting changes. `span`: the gripper's whole range (commands: -1 to 1).

    With hysteresis: the reference moves only with an event, so that a slow drift is one change and not none.
    """
    events: list[int] = []
    reference, t = float(gripper_T[0]), 1
    while t < len(gripper_T):
        now = gripper_T[t : t + config.hold]
        moved = np.abs(now - reference) > config.gripper_change * span
        # at the very end there is no room to last
        if moved.all():
            events.append(t)
            reference = float(np.median(now))
            t += len(now)
        else:
            t += 1
    return events


def speeds(position_TX: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return (T,) distance to the next frame, smoothed over three; the last frame's is that of the step before."""
    position = np.asarray(position_TX, np.float64)
    if len(position) < 2:
        return np.zeros(len(position))
    step = np.linalg.norm(np.diff(position, axis=0), axis=1)
    step = np.append(step, step[-1])
    padded = np.pad(step, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def milestones(
    gripper_T: NDArray[np.floating], position_TX: NDArray[np.floating], config: MilestoneConfig
) -> list[int]:
    """Key-frames of an episode, increasing: the slowest frame near each gripper change, and near the end."""
    count = len(gripper_T)
    speed = speeds(position_TX)
    found = []
    for event in gripper_events(gripper_T, config):
        low, high = max(0, event - config.window), min(count, event + config.window + 1)
        found.append(low + int(np.argmin(speed[low:high])))
    low = max(0, count - 1 - config.window)
    # of equally slow frames at the end the last: that is where the task is done
    found.append(count - 1 - int(np.argmin(speed[low:][::-1])))
    kept: list[int] = []
    for frame in sorted(found):
        if not kept or frame - kept[-1] > config.width:
            kept.append(frame)
        else:
            kept[-1] = frame
    return kept


def frame_labels(count: int, keyframes: list[int], success: bool, config: MilestoneConfig) -> NDArray[np.float32]:
    """Return (T,) 1 at and near the key-frames of an episode that succeeded, else 0: failures are negatives."""
    labels = np.zeros(count, np.float32)
    if success:
        for frame in keyframes:
            labels[max(0, frame - config.width) : frame + config.width + 1] = 1.0
    return labels
