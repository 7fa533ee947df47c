"""Every random stream of a run by name. The integers are those of earlier versions: runs stay reproducible.

All are functions of the run's seed s; those that differ between processes also of the rank r.
"""

from __future__ import annotations

import torch

_PER_RANK = 1_000_003
"""A prime further apart than the seeds of any two runs."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def minibatches(seed: int) -> torch.Generator:
    """Order of the learner's minibatches: 2 s, the same in every process."""
    return _generator(2 * seed)


def exploration(seed: int, rank: int = 0) -> torch.Generator:
    """Noise of the policy's rollouts: 2 s + 1 + 1,000,003 r."""
    return _generator(2 * seed + 1 + _PER_RANK * rank)


def distillation(seed: int, rank: int = 0) -> torch.Generator:
    """Decisions that distillation draws from its memory: 2 s + 3 + 1,000,003 r."""
    return _generator(2 * seed + 3 + _PER_RANK * rank)


def teacher_exploration(seed: int, rank: int = 0) -> torch.Generator:
    """Noise of the teacher's rollouts: 2 s + 5 + 1,000,003 r."""
    return _generator(2 * seed + 5 + _PER_RANK * rank)


def teacher_minibatches(seed: int) -> torch.Generator:
    """Order of the minibatches of the teacher's PPO: 2 s + 7, the same in every process."""
    return _generator(2 * seed + 7)


def calibration(seed: int) -> torch.Generator:
    """Noise of the episodes by which the initial standard deviation is chosen: s."""
    return _generator(seed)


def reward_episodes(seed: int) -> torch.Generator:
    """Noise of the episodes that the process reward model learns from: s + 17."""
    return _generator(seed + 17)


def curriculum(seed: int, rank: int = 0) -> int:
    """Seed of the curriculum's draws: s + 7919 r."""
    return seed + 7919 * rank


def teacher_scenes(seed: int) -> int:
    """First training seed of the teacher's scenes, s + 1000: apart from the policy's."""
    return seed + 1000
