"""Demonstrations meet a policy: do they fit, and their components in its order. Both are matched by name.

Which component is which, and how long a step is, no normalisation can tell: a policy that takes a dataset's first
component for its own first one learns the gripper as a displacement, without an error. The rules are those by which a
policy meets an environment (`vla.core.compatibility`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vla.core.compatibility import Fit, fit, same_rate, side_of
from vla.data.lerobot_dataset import DemoSet
from vla.processing.preprocess import Preprocessor


def aligned(processor: Preprocessor, demos: DemoSet, *, name: str = "") -> tuple[DemoSet, tuple[str, ...]]:
    """(the demonstrations with action and state in the policy's order, lines to tell the user). Those that lie in it
    already are returned as they are. `name`: the dataset's in messages. ValueError, one line, as `check_demos`."""
    found = _fit(processor, demos, name)
    ours = processor.config.action_names, processor.config.proprio_names
    if (order := found.action_order) is not None:
        # `Fit` says where the policy's components go in an environment; here the dataset's come to the policy.
        demos = replace(demos, action=_columns(demos.action, np.argsort(order).tolist()), action_names=ours[0])
    if (order := found.proprio_order) is not None:
        exact = None if demos.exact_proprio is None else _columns(demos.exact_proprio, order)
        demos = replace(demos, proprio=_columns(demos.proprio, order), exact_proprio=exact, proprio_names=ours[1])
    return demos, found.notices


def check_demos(processor: Preprocessor, demos: DemoSet) -> None:
    """ValueError, one line, if these demonstrations cannot train the policy with this processor: they lack a camera,
    have other components or the same in another order (`aligned` mends that), or were recorded at another rate."""
    found = _fit(processor, demos, "")
    if found.action_order is not None or found.proprio_order is not None:
        told = "; ".join(found.notices).replace(": reordered by name", "")
        raise ValueError(f"{told}: record them in the same order")


def _fit(processor: Preprocessor, demos: DemoSet, name: str) -> Fit:
    config = processor.config
    of = f"dataset '{name}'" if name else "demonstrations"
    for camera in filter(None, config.cameras):
        if camera not in demos.images:
            raise ValueError(
                f"the {of} lack camera '{camera}', which the policy reads; they have: {', '.join(demos.images)} (where "
                "--cameras is given, it must name the policy's)"
            )
        if config.depth and camera not in demos.geometry:
            raise ValueError(f"the {of} lack the depth of camera '{camera}': load them with depth=True")
    if demos.action.shape[1] != len(config.action_names):
        raise ValueError(
            f"feature 'action' has {demos.action.shape[1]} components, this policy has {len(config.action_names)}: "
            f"{', '.join(config.action_names)}"
        )
    if demos.proprio.shape[1] != config.proprio_dim:
        raise ValueError(
            f"feature 'observation.state' has {demos.proprio.shape[1]} components, not {config.proprio_dim}"
        )
    if demos.num_frames == 0:
        raise ValueError("there are no demonstrations")
    if not same_rate(config.control_hz or 0.0, demos.fps):
        raise ValueError(
            f"the policy acts at {config.control_hz:g} Hz, the rate of the {of} is {demos.fps:g} Hz, where an action "
            f"is a step of another length: give a recording at {config.control_hz:g} Hz (if only fps in "
            "meta/info.json is wrong, correct it), or train a new policy on it (without --init)"
        )
    return fit(processor.policy_spec(1, 1), side_of(demos), where=of, rates=False, ranges=False)


def _columns(values: Any, order: Sequence[int]) -> Any:
    return np.ascontiguousarray(values[:, list(order)])
