"""Every range of scene seeds, so that training, choosing and reporting never share a scene."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


TRAIN_SEED_LIMIT = 1_000_000
"""Training and demonstration seeds are below this, evaluation seeds at or above a suite's `eval_seed0`."""


FIRST_EVALUATION_SEED = 5_000_000


VALIDATION_SEED0 = 3_000_000
"""RL chooses its best checkpoint on these scenes: neither training scenes nor those of the final evaluation."""


GROUNDING_SEED0 = 900_000
