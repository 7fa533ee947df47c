"""Making up for displacements that a late answer left unplayed: the one rule that training and controllers share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def catch_up(
    actions_SA: NDArray[np.floating],
    debt_A: NDArray[np.floating],
    low_A: NDArray[np.floating],
    high_A: NDArray[np.floating],
    *,
    steps: int,
) -> None:
    """Add the displacement that is owed to the next actions, in place: in `steps` equal parts where the bounds allow
    it, later where they do not. `debt_A` is 0 for components that are no displacements."""
    part, debt = debt_A / steps, debt_A
    for action_A in actions_SA:
        share = np.where(np.abs(part) < np.abs(debt), part, debt)
        moved = np.clip(action_A + share, low_A, high_A) - action_A
        # never against the debt: an action that is beyond the bounds already is somebody else's business
        moved = np.where(moved * debt > 0, moved, 0.0)
        action_A += moved
        debt = debt - moved
