"""The learnt process reward: its pseudo-labels, its training and its share of the reward."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MilestoneConfig:
    """In frames, as the policy sees them: one per decision."""

    gripper_change: float = 0.5
    """Fraction of the gripper's range that counts as a change."""
    hold: int = 2
    """Frames that a change must last: chatter is no event."""
    window: int = 2
    """Frames before and after a change (and before the end) in which the slowest one is the key-frame."""
    width: int = 1
    """Frames this near a key-frame are labelled as it is."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if not 0 < self.gripper_change <= 1 or min(self.hold, self.window + 1, self.width + 1) < 1:
            return "gripper_change must be in (0, 1], hold at least 1, window and width at least 0"
        return None


@dataclass(frozen=True)
class ProgressConfig:
    """Training and calibration of the process reward model."""

    marks: MilestoneConfig = field(default_factory=MilestoneConfig)
    width: int = 64
    steps: int = 600
    batch_size: int = 256
    lr: float = 1e-3
    smoothing: float = 0.05
    held_out: float = 0.25
    """Fraction of the episodes kept for the report; episodes, never frames, are split."""
    folds: int = 4
    """The threshold is chosen on each part of the others by a model that has not learnt from it."""
    false_positives: float = 0.01
    """Share of failed episodes (and ones given another instruction) that may be taken for completed. To promise one in
    a hundred, a hundred of them must have been seen."""


@dataclass(frozen=True)
class ShapingConfig:
    """Learn a process reward model from the imitation policy's episodes, and add its reward to the environment's."""

    coef: float = 0.3
    """The most that all milestones together give; success gives 1."""
    episodes: int = 192
    """Played, with exploration noise, on training scenes, to train and calibrate the model."""
    progress: ProgressConfig = field(default_factory=ProgressConfig)
