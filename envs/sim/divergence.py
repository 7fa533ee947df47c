"""Detection of diverged simulations, which must not count as episodes.

MuJoCo finds NaN, infinite and huge values in a state before it steps, warns, puts the world back to the model's
reference pose and steps on: everything is finite again, and nothing after it has to do with the episode.
"""

from __future__ import annotations

import mujoco
import numpy as np

_warning = mujoco.mjtWarning
_KINDS = [int(k) for k in (_warning.mjWARN_BADQPOS, _warning.mjWARN_BADQVEL, _warning.mjWARN_BADQACC)]
_BAD = slice(min(_KINDS), max(_KINDS) + 1)  # neighbours: a slice costs this, at every control step, half of a list


def diverged(data: mujoco.MjData) -> bool:
    """True if this world diverged since `mj_resetData` last cleared its warnings, or holds a NaN or infinity now."""
    return bool(data.warning.number[_BAD].any()) or not bool(np.isfinite(data.qpos).all())
