"""Tells whose episode an observation is of, for policies of episodes (`PolicySpec.episodic`): every client's robots
have numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from policies.serving.batching import Batcher, HasPolicy
from vla.core.types import Observation

RESET, ROW = "reset", "row"
"""Keys of an observation: true begins a new episode; and which of a client's robots it is of, 0 if left out."""
MAX_ROWS = 4096


class Sessions:
    """The numbers (`vla.core.types.Observation.env_ids`) of the clients' robots. No number is ever used twice.

    All of it belongs to the event loop's thread; policies are reset on their own.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._count = 0
        self._of_client: dict[object, dict[int, int]] = {}

    async def address(
        self, client: object, message: Mapping[Any, Any], obs: Observation, served: HasPolicy
    ) -> Observation:
        """The observation with its number, where the policy is episodic; it is reset there if the message says so.
        ValueError for keys that are none."""
        if not served.spec.episodic:
            return obs
        row, reset = message.get(ROW, 0), message.get(RESET, False)
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < MAX_ROWS:
            raise ValueError(f"{ROW}: expected a whole number from 0 to {MAX_ROWS - 1}, got {type(row).__name__}")
        if not isinstance(reset, bool):
            raise ValueError(f"{RESET}: expected true or false, got {type(reset).__name__}")
        numbers = self._of_client.setdefault(client, {})
        if row not in numbers:
            self._count += 1
            numbers[row] = self._count
        if reset:
            await self._batcher.run(partial(served.policy.reset, [numbers[row]]))
        return replace(obs, env_ids=np.array([numbers[row]]))

    async def end(self, client: object, policies: Iterable[HasPolicy]) -> None:
        """A client has gone: its episodes are forgotten."""
        gone = list(self._of_client.pop(client, {}).values())
        with contextlib.suppress(RuntimeError):  # the server is going as well
            for served in policies if gone else ():
                await self._batcher.run(partial(served.policy.reset, gone))
