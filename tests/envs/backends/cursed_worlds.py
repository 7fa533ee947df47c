"""Tabletop worlds in which one seed's episode blows up. A module of its own: spawned workers import it by name."""

from __future__ import annotations

import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds

CURSED = 13
LAST_STEP = 4


class CursedWorlds(TabletopWorlds):
    """One seed's arm is thrown at the speed of light in its fourth control step."""

    def _control_step(self, live: np.ndarray, action_nA: np.ndarray) -> np.ndarray:
        for i in live:
            if self.episodes[i].seed == CURSED and self.elapsed[i] == LAST_STEP - 1:
                self.data[i].qvel[2] = 3e8
        return super()._control_step(live, action_nA)
