"""Grounding: how surely a policy sees what its instruction names, the threshold below which it does not, and the rule
when to hold. Numpy alone: robots and servers use it.

The confidence is the largest visibility, over the camera views, that a backbone's pointer gives to the named object, in
`small` corrected by its queries' states (`vla.backbones.backbone.Backbone.confidence`). Pre-training measures it on
questions about objects that are there and that are not, and `calibrate` puts the threshold between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla.core.types import Policy

FALSE_HOLDS = 0.02
"""Largest share of instructions whose object is in sight that may be held."""
_MISSED = 0.01
"""Share of instructions about nothing in sight that may go unnoticed where both kinds are told apart well."""
_LEAST = 100
"""Questions of a kind from which a share of one percent can be told."""


def calibrate(present: ArrayLike, absent: ArrayLike) -> float:
    """The threshold below which a confidence says that nothing named is in sight.

    `present` and `absent`: confidences in [0, 1] on held-out questions about objects that are in the picture and that
    are not. At most `FALSE_HOLDS` of `present` lie below the threshold. Where it can hold 99% of `absent` too, it lies
    halfway (in log-odds) between the two, so that both kinds have room to move in pictures of another kind; else it is
    as high as `present` allows. ValueError for fewer than 100 of a kind, or values that are no confidences.
    """
    low, high = (_sorted(values, name) for values, name in ((absent, "absent"), (present, "present")))
    most = float(high[int(FALSE_HOLDS * len(high))])  # at most that many lie strictly below it
    held = float(low[len(low) - 1 - int(_MISSED * len(low))])
    limits = np.clip([held, most], 1e-6, 1 - 1e-6)
    middle = float(np.log(limits / (1 - limits)).mean())
    return min(most, 1 / (1 + float(np.exp(-middle))))


def _sorted(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.sort(np.asarray(values, np.float64).ravel())
    if len(found) < _LEAST:
        raise ValueError(f"a threshold needs {_LEAST} {name} questions or more, got {len(found)}")
    if not ((found >= 0) & (found <= 1)).all():  # NaN is neither
        raise ValueError(f"the confidences of {name} questions must lie in [0, 1]")
    return found


def confidence_of(policy: Policy) -> NDArray[np.float32] | None:
    """(B,) confidences of the policy's last decision, NaN where it decided nothing. None for a policy that has none."""
    return getattr(policy, "confidence", None)


def threshold_of(policy: Policy) -> float:
    """The threshold of a policy that is to be held by its confidence. ValueError for one that tells none."""
    threshold = policy.spec.grounding_threshold
    if threshold is None:
        raise ValueError(
            "this policy does not tell how surely it sees what its instruction names: leave out --hold-ungrounded, or "
            "train a policy on a backbone whose bascule.json has a grounding threshold (and leave that one frozen)"
        )
    return threshold


class FirstSight:
    """Which of B environments wait, because their policy has not yet seen what their instruction names.

    Once it was seen, an instruction is never held again: objects disappear in the gripper and behind the arm, and an
    arm that stops halfway helps nobody. A new instruction, and a new episode, start anew.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._grounded: dict[int, str] = {}  # environment -> the instruction whose object was seen

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """A new episode in these environments (all when None)."""
        for env in list(self._grounded) if env_ids is None else env_ids:
            self._grounded.pop(int(env), None)

    def holds(self, confidence: NDArray[np.floating] | None, instructions: Sequence[str]) -> NDArray[np.bool_]:
        """(B,) True where the decision with this confidence is not to be executed. None and NaN hold nothing."""
        held = np.zeros(len(instructions), np.bool_)
        if confidence is None:
            return held
        for env, (value, instruction) in enumerate(zip(confidence.tolist(), instructions, strict=True)):
            if self._grounded.get(env) == instruction:
                continue
            held[env] = value < self.threshold
            if value >= self.threshold:
                self._grounded[env] = instruction
        return held


def threshold_in(spec: dict[str, Any]) -> float | None:
    """The threshold in a backbone's specification, {"grounding": {"threshold": 0.3}}; None where it has none."""
    given = spec.get("grounding")
    if given is None:
        return None
    threshold = given.get("threshold") if isinstance(given, dict) else None
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise ValueError(f"the backbone's grounding must be {{'threshold': a number from 0 to 1}}, got {given!r}")
    return float(threshold)
