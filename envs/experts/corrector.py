"""A scripted person beside a policy that picks: takes over when it goes wrong, hands back when the danger is over.

The rules look at what a person sees of the scene: how far the hand is from the thing, whether it comes nearer, and
whether the thing is in the hand. They read it from the simulator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.experts.pick_place import TabletopExpert
from vla.core.types import ActionChunk, Observation, StepResult


@dataclass(frozen=True)
class CorrectorRules:
    """When the corrector takes over and hands back."""

    patience_steps: int = 10
    """Control steps without progress after which it takes over: 0.5 s at 20 Hz."""
    progress_m: float = 0.01
    """Coming nearer to the thing by this much, or lifting it, is progress."""
    drift_m: float = 0.04
    """Going away from the thing by this much from where it was nearest: it takes over."""
    empty_m: float = 0.035
    """Closing the gripper with the thing further away than this, and leaving it closed: it takes over."""
    sees_steps: int = 3
    """Control steps after which it believes that the gripper stays closed."""
    safe_m: float = 0.03
    """It hands back when it has lifted the thing so far."""
    fallen_m: float = 0.01
    """A thing that lies so much lower than it stood has fallen over: nobody can take hold of it, it is left alone."""


class Corrector:
    """Watches B environments of a suite whose expert is `TabletopExpert`, step by step."""

    def __init__(self, num_envs: int, rules: CorrectorRules | None = None) -> None:
        self.rules = rules or CorrectorRules()
        self.drives = np.zeros(num_envs, bool)
        """(B,) who has taken over."""
        self._expert = TabletopExpert(num_envs)
        self._best = np.full(num_envs, np.inf)  # the least distance to go so far, metres
        self._since = np.zeros(num_envs, np.int64)  # control steps since it was that
        self._closed = np.zeros(num_envs, np.int64)  # control steps with the gripper closed on nothing

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """New episodes, in which nobody has taken over."""
        ids = slice(None) if env_ids is None else list(env_ids)
        self.drives[ids], self._best[ids], self._since[ids], self._closed[ids] = False, np.inf, 0, 0

    def watch(self, obs: Observation) -> NDArray[np.float32]:
        """One control step of everybody: `drives` is decided anew. Returns everybody's actions (B, A)."""
        if obs.privileged is None:
            raise ValueError("the corrector needs the simulator's state: Observation.privileged is None")
        state, rules = obs.privileged.astype(np.float64), self.rules
        # Columns as `envs.tabletop.goals.privileged` lays them out.
        thing, apart, rest, command = state[:, 0:3], state[:, 3:6], state[:, 8], state[:, 11]
        distance, lift = np.linalg.norm(apart, axis=1), np.maximum(thing[:, 2] - rest, 0.0)
        to_go = distance - 2 * lift  # lifting is progress, too
        better = to_go < self._best - rules.progress_m
        self._best = np.where(better, to_go, self._best)
        self._since = np.where(better, 0, self._since + 1)
        held = (distance < rules.empty_m) & (lift > rules.safe_m)
        stuck = self._since >= rules.patience_steps
        drifts = to_go > self._best + rules.drift_m
        self._closed = np.where((command < 0) & (distance > rules.empty_m), self._closed + 1, 0)
        empty = self._closed >= rules.sees_steps
        fallen = thing[:, 2] < rest - rules.fallen_m
        takes = ~self.drives & ~held & ~fallen & (stuck | drifts | empty)
        gives = self.drives & (held | fallen)
        self.drives = (self.drives | takes) & ~gives
        fresh = np.flatnonzero(takes | gives)
        self._best[fresh], self._since[fresh] = to_go[fresh], 0
        self._expert.reset(np.flatnonzero(~self.drives | takes).tolist())
        action = self._expert.act(obs)[:, 0]
        still = np.zeros_like(action)
        still[:, -1] = command  # whoever lets go moves nothing, and opens nothing
        return np.where(self.drives[:, None], action, still)


class CorrectedWorlds:
    """One environment of a suite with a corrector beside it, who says after every step what they would do."""

    def __init__(self, worlds: Any) -> None:
        """`worlds`: `vla.core.types.VecEnv` of one environment, with the simulator's state in its observations."""
        self._worlds, self._corrector = worlds, Corrector(1)
        self._action = np.zeros(worlds.action_spec.dim, np.float32)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the environment's."""
        return getattr(self._worlds, name)

    def reset(self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None) -> Observation:
        """See `VecEnv.reset`."""
        self._corrector.reset()
        self._action[:] = 0.0
        return self._worlds.reset(seeds=seeds, tasks=tasks)

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `VecEnv.step_chunk`."""
        result = self._worlds.step_chunk(chunk)
        self._action = self._corrector.watch(result.obs)[0]
        return result

    def advice(self) -> NDArray[np.float32]:
        """(1 + A,) 1 where the corrector drives, else 0; and their action."""
        return np.concatenate([self._corrector.drives.astype(np.float32), self._action])


def check_corrected(suite: str) -> None:
    """ValueError for a suite whose tasks the corrector does not know."""
    from envs.experts.registry import make_expert

    if not isinstance(make_expert(suite, 1), TabletopExpert):
        raise ValueError(f"the scripted corrector picks and places, and does not know the tasks of {suite}")
