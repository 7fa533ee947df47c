"""From chunks of actions to one action per control step: a queue, and ACT's temporal ensemble.

Both keep one timeline per world, so worlds may ask for their chunks at different times:

    waiting = np.flatnonzero(queue.needs_chunk())
    if waiting.size:
        queue.push(policy.act(obs.select(waiting)), waiting)
    action_BA = queue.pop()
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.core.types import ActionChunk

EnvIds = Sequence[int] | NDArray[np.int64] | None


class ActionQueue:
    """Plays the first `n_action_steps` actions of each chunk, then asks for the next chunk (receding horizon)."""

    def __init__(self, n_action_steps: int, num_envs: int = 1) -> None:
        if n_action_steps < 1:
            raise ValueError(f"n_action_steps must be at least 1, got {n_action_steps}")
        self.n_action_steps = n_action_steps
        self.num_envs = _check_num_envs(num_envs)
        self._actions: list[ActionChunk | None] = [None] * num_envs  # per world (n_action_steps, A)
        self._left = np.zeros(num_envs, dtype=np.int64)

    @property
    def remaining(self) -> NDArray[np.int64]:
        """(B,) actions each world can still pop."""
        return self._left.copy()

    def needs_chunk(self) -> NDArray[np.bool_]:
        """(B,) True where nothing is left to pop."""
        return self._left == 0

    def push(self, chunk: ActionChunk, env_ids: EnvIds = None) -> None:
        """Give worlds `env_ids` (all when None) their next chunk (len(env_ids), C, A); what was left is dropped."""
        ids = _check_ids(env_ids, self.num_envs)
        chunk = _check_chunk(chunk, len(ids))
        if chunk.shape[1] < self.n_action_steps:
            raise ValueError(
                f"chunk holds {chunk.shape[1]} actions but n_action_steps is {self.n_action_steps}: "
                f"set n_action_steps to at most {chunk.shape[1]}"
            )
        for row, env in enumerate(ids):
            self._actions[env] = chunk[row, : self.n_action_steps].copy()
            self._left[env] = self.n_action_steps

    def pop(self, env_ids: EnvIds = None) -> NDArray[np.float32]:
        """The next action of worlds `env_ids` (all when None): (len(env_ids), A)."""
        ids = _check_ids(env_ids, self.num_envs)
        _refuse_starved(ids, self.needs_chunk())
        # Negative indexing from the end: `_left` alone is the whole state of the timeline.
        action = np.stack([self._actions[env][-self._left[env]] for env in ids])
        self._left[ids] -= 1
        return action

    def reset(self, env_ids: EnvIds = None) -> None:
        """Forget what worlds `env_ids` (all when None) had queued: a new episode starts there."""
        self._left[_check_ids(env_ids, self.num_envs)] = 0


class TemporalEnsemble:
    """Averages what overlapping chunks say about the same control step, older chunks weighing more.

    With chunks i = 0 (oldest), 1, ... that cover the step, the action is sum_i w_i a_i / sum_i w_i, w_i = exp(-m i).
    m = 0 is the plain mean; the larger m, the longer an old plan persists. Push a chunk every step (as ACT does) or
    less often. Averaging blurs decisions: threshold a binary gripper after it, not before.
    Source: Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (ACT), algorithm 2.
    """

    def __init__(self, decay: float = 0.01, num_envs: int = 1) -> None:
        if not (np.isfinite(decay) and decay >= 0):
            raise ValueError(f"decay must be a finite number >= 0, got {decay}")
        self.decay = decay
        self.num_envs = _check_num_envs(num_envs)
        # Per world, oldest first: what is left of each chunk, its row 0 being the current step.
        self._plans: list[list[ActionChunk]] = [[] for _ in range(num_envs)]

    def needs_chunk(self) -> NDArray[np.bool_]:
        """(B,) True where no chunk covers the current step (pushing earlier than that is what makes an ensemble)."""
        return np.array([not plans for plans in self._plans], dtype=np.bool_)

    def push(self, chunk: ActionChunk, env_ids: EnvIds = None) -> None:
        """Add the chunk (len(env_ids), C, A) just predicted for worlds `env_ids`; its first action is for this step."""
        ids = _check_ids(env_ids, self.num_envs)
        chunk = _check_chunk(chunk, len(ids))
        for row, env in enumerate(ids):
            self._plans[env].append(chunk[row].copy())

    def pop(self, env_ids: EnvIds = None) -> NDArray[np.float32]:
        """The weighted action of this step (len(env_ids), A); these worlds then move on one step."""
        ids = _check_ids(env_ids, self.num_envs)
        _refuse_starved(ids, self.needs_chunk())
        actions = []
        for env in ids:
            plans = self._plans[env]
            weights = np.exp(-self.decay * np.arange(len(plans)))
            candidates = np.stack([plan[0] for plan in plans]).astype(np.float64)
            actions.append(weights @ candidates / weights.sum())
            self._plans[env] = [plan[1:] for plan in plans if len(plan) > 1]
        return np.stack(actions).astype(np.float32)

    def reset(self, env_ids: EnvIds = None) -> None:
        """Forget the chunks of worlds `env_ids` (all when None): a new episode starts there."""
        for env in _check_ids(env_ids, self.num_envs):
            self._plans[env] = []


def _check_num_envs(num_envs: int) -> int:
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    return num_envs


def _check_ids(env_ids: EnvIds, num_envs: int) -> NDArray[np.int64]:
    if env_ids is None:
        return np.arange(num_envs)
    ids = np.asarray(env_ids, dtype=np.int64).reshape(-1)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= num_envs or np.unique(ids).size != ids.size:
        raise ValueError(f"env_ids must be distinct worlds in 0..{num_envs - 1}, got {ids.tolist()}")
    return ids


def _check_chunk(chunk: ActionChunk, batch: int) -> ActionChunk:
    chunk = np.asarray(chunk, dtype=np.float32)
    if chunk.ndim != 3 or chunk.shape[0] != batch or chunk.shape[1] == 0:
        raise ValueError(f"expected a chunk of shape ({batch}, C, A) with C >= 1, got {chunk.shape}")
    return chunk


def _refuse_starved(ids: NDArray[np.int64], starved: NDArray[np.bool_]) -> None:
    if starved[ids].any():
        world = int(ids[starved[ids]][0])
        raise ValueError(f"world {world} has no action left: push a chunk where needs_chunk() is True")
