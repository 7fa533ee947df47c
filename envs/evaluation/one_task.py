"""Environments that are evaluated on one task of their suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vla.core.types import Observation, VecEnv


class OneTask:
    """Environments that play one task of their suite."""

    def __init__(self, env: VecEnv, task: str) -> None:
        self._env, self._task = env, task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(
        self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, env_ids: Sequence[int] | None = None
    ) -> Observation:
        """See `vla.core.types.VecEnv.reset`; the task is always the same."""
        return self._env.reset(seeds=seeds, tasks=[self._task] * len(seeds), env_ids=env_ids)
