"""A policy in the expert's place: its own episodes, failures too, recorded as demonstrations are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.demos.episode import MakeWorld
from envs.experts.corrector import Corrector, check_corrected
from vla.core.compatibility import fitted
from vla.core.types import Observation, Policy, executed
from vla.runtime.console import say

MakePolicy = Callable[[], Policy]
"""Loads the policy. A module-level function or a partial of one: worker processes import it by name."""


class PolicyWorld:
    """A `DemoWorld` in which a policy acts: it is asked when the actions of its last chunk have been executed."""

    def __init__(self, make_world: MakeWorld, make_policy: MakePolicy, suite: str, image_size: int) -> None:
        """ValueError for a policy of another robot, rate or camera; components in another order are reordered."""
        self._world = make_world(suite, image_size)
        self._policy = fitted(make_policy(), self._world, say=say, where=f"suite {suite}")
        self._left: deque[NDArray[np.float32]] = deque()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the world's."""
        return getattr(self._world, name)

    def reset(self, seed: int) -> None:
        """See `DemoWorld.reset`."""
        self._world.reset(seed)
        self._policy.reset()
        self._left.clear()

    def expert_action(self) -> NDArray[np.float32]:
        """(A,) the policy's action of now."""
        if not self._left:
            chunk = executed(self._policy.spec, self._policy.act(self._observation()))
            self._left.extend(chunk[0])
        return self._left.popleft()

    def _observation(self) -> Observation:
        images, proprio = self._world.observe()
        views = self._world.geometry() or {}
        depth, inner, outer = ({name: view[i][None] for name, view in views.items()} or None for i in range(3))
        return Observation(
            {name: image[None] for name, image in images.items()}, np.asarray(proprio)[None],
            [self._world.instruction], depth=depth, intrinsics=inner, extrinsics=outer,
        )  # fmt: skip


class CorrectedPolicyWorld(PolicyWorld):
    """A policy that acts, and a scripted corrector who takes over from it where it goes wrong."""

    corrected = False
    """True where the corrector gives the action of now."""

    def __init__(self, make_world: MakeWorld, make_policy: MakePolicy, suite: str, image_size: int) -> None:
        """ValueError as of `PolicyWorld`, and for a suite whose tasks the corrector does not know."""
        check_corrected(suite)
        super().__init__(make_world, make_policy, suite, image_size)
        self._corrector = Corrector(1)

    def reset(self, seed: int) -> None:
        """See `DemoWorld.reset`."""
        super().reset(seed)
        self._corrector.reset()
        self.corrected = False

    def expert_action(self) -> NDArray[np.float32]:
        """(A,) the action of now: the corrector's while they drive, else the policy's. What the policy still had in
        mind when they took over is dropped, and it is reset before it goes on."""
        seen = Observation(
            {}, self._world.observe()[1][None], [self._world.instruction], self._world.privileged()[None]
        )
        action = self._corrector.watch(seen)[0]
        before, self.corrected = self.corrected, bool(self._corrector.drives[0])
        if self.corrected:
            self._left.clear()
            return action
        if before:
            self._policy.reset()
        return super().expert_action()
