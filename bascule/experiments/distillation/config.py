"""Configuration of `vla experiment distil`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vla.model.config import DEFAULT_BACKBONE

SHARES = (10, 30, 100)
"""Percent of the steps after which a student is evaluated."""
ARMS = ("plain", "tune-only", "align-tune", "no-decoder", "shuffled", "teacher")


@dataclass(frozen=True)
class DistilConfig:
    """Learning from a privileged teacher: equal demonstrations, training steps and evaluation scenes for every arm."""

    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ARMS
    """plain: the recipe as it is, without a teacher; tune-only: mapper and the teacher's decoder, not aligned;
    align-tune: aligned, then tuned through that decoder; no-decoder: aligned, then tuned through a fresh one; shuffled:
    aligned with the latents of other frames, which must not help; teacher: its own success."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations, teacher and initial weights."""
    demos: int = 20
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1300
    """Gradient steps of imitation."""
    align_steps: int = 260
    """The first steps of the arms that are aligned; they count among the steps."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm, seed and share of the steps."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.align_steps < self.steps:
            return None
        return (
            f"--align-steps must be less than --steps, of which they are the first: {self.align_steps} of {self.steps}"
        )
