"""One check wherever a policy meets an environment or a robot: names, order, ranges, rate, state and cameras.

Components are matched by name. Another order is mended (`fitted`), anything else that differs is refused in one line
that names both sides. What one side does not say (checkpoints made before names were kept, datasets without names,
stock openpi servers) is not held against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla.core.grounding import confidence_of
from vla.core.types import ActionChunk, ActionSpec, Observation, Policy, PolicySpec, Prefix

_SAME_RATE = 0.05
"""Relative difference up to which two rates count as the same: recordings say 30 where the clock said 29.97."""
_PERCENT, _OTHER_UNIT = 45.0, 15.0
"""Reach of a range in degrees or percent, beside one of 1 or of radians; times by which a policy's reach goes beyond
the other side's where they have two units."""
_UNNAMED = re.compile(r"(observation\.state_|action_|state_|motor_|dim_|a|)\d+")
"""How datasets, LeRobot and `vla.data.lerobot_dataset` call components without names."""
_SUFFIX = re.compile(r"\.(pos|vel)$")
"""LeRobot's way to write down the kind of a component."""


@dataclass(frozen=True)
class Fit:
    """How to lay a policy's components into an environment's places. None: they lie there already."""

    action_order: tuple[int, ...] | None = None
    """Component i of the environment's action is component `action_order[i]` of the policy's."""
    proprio_order: tuple[int, ...] | None = None
    """Component i of the state that the policy reads is component `proprio_order[i]` of the environment's."""
    notices: tuple[str, ...] = ()


def side_of(thing: Any) -> PolicySpec:
    """The declared interface of a policy, a VLA, an environment or a robot: actions, proprio, cameras."""
    if isinstance(thing, PolicySpec):
        return thing
    if isinstance(spec := getattr(thing, "spec", None), PolicySpec):
        return spec
    config = getattr(getattr(thing, "processor", None), "config", None)

    def asked(name: str) -> Any:
        for value in (getattr(thing, name, None), getattr(config, name, None)):
            if isinstance(value, int | Sequence) and value:
                return value
        return None

    spec = getattr(thing, "action_spec", None)
    cameras, names, dim, size = map(asked, ("cameras", "proprio_names", "proprio_dim", "picture_size"))
    depth = getattr(thing, "gives_depth", getattr(config, "depth", None) or None)
    return PolicySpec(
        action_spec=spec if isinstance(spec, ActionSpec) else None,
        proprio_dim=dim if isinstance(dim, int) else None,
        proprio_names=None if names is None else tuple(names),
        cameras=None if cameras is None else tuple(camera for camera in cameras if camera),
        picture_size=size if isinstance(size, int) else None,
        depth=depth if isinstance(depth, bool) else None,
    )


def fit(
    policy: PolicySpec, env: PolicySpec, *, where: str = "environment", rates: bool = True, ranges: bool = True
) -> Fit:
    """How the policy can be executed on the other side. ValueError, one line naming both sides, if it cannot.

    `where`: the other side's name in messages. `rates=False`: the caller interpolates between the two rates;
    `ranges=False`: the caller limits the actions, and hears of ranges in another unit alone.
    """
    order, notices = None, []
    if policy.action_spec is not None and env.action_spec is not None:
        order = _action_order(policy.action_spec, env.action_spec, where)
        ours, theirs = policy.action_spec.names, env.action_spec.names
        if order is not None:
            notices.append(f"the policy acts on {_listed(ours)}, the {where} on {_listed(theirs)}: reordered by name")
        elif unnamed(ours) and not unnamed(theirs):
            notices.append(f"the policy's actions have no names: they are taken for {_listed(theirs)}, in this order")
        if ranges:
            notices += _check_ranges(_taken(policy.action_spec, order), env.action_spec, where)
        else:
            notices += _other_units(_taken(policy.action_spec, order), env.action_spec, where)
        if rates:
            _check_rate(policy.action_spec.control_hz, env.action_spec.control_hz, where)
    state = _proprio_order(policy, env, where)
    missing = [camera for camera in policy.cameras or () if env.cameras is not None and camera not in env.cameras]
    if missing:
        raise ValueError(
            f"the policy looks through the cameras {_listed(policy.cameras)}, the {where} has {_listed(env.cameras)}: "
            f"it lacks '{missing[0]}'"
        )
    if policy.depth and env.depth is False:
        raise ValueError(
            f"the policy reads depth and calibration of its cameras, the {where} gives none: drive a robot of your own "
            "whose observations hold both, or train a policy that reads no depth"
        )
    if state is not None:
        notices.append(
            f"the policy reads the state as {_listed(policy.proprio_names)}, the {where} tells it as "
            f"{_listed(env.proprio_names)}: reordered by name"
        )
    return Fit(order, state, tuple(notices))


def fitted(policy: Policy, env: Any, *, say: Callable[[str], None], **how: Any) -> Policy:
    """The policy as it can be played in `env`: itself, or with its components reordered by name.

    `say` hears of it; `how` is as in `fit`. ValueError as `fit`.
    """
    found = fit(side_of(policy), side_of(env), **how)
    for notice in found.notices:
        say(notice)
    if found.action_order is None and found.proprio_order is None:
        return policy
    return Reordered(policy, found)


def require_same(policy: Any, env: Any, *, remedy: str = "", **how: Any) -> None:
    """ValueError unless the policy can be used in `env` as it is, for callers that cannot reorder. `remedy` ends the
    message, `how` is as in `fit`."""
    found = fit(side_of(policy), side_of(env), **how)
    if found.action_order is not None or found.proprio_order is not None:
        told = "; ".join(found.notices).replace(": reordered by name", "")
        raise ValueError(f"{told}: {remedy or 'the order must be the same'}")


class Reordered:
    """A policy whose action and state components lie in another order than the environment's."""

    def __init__(self, policy: Policy, order: Fit) -> None:
        self.policy, self._order = policy, order
        action = policy.spec.action_spec
        names, state = policy.spec.proprio_names, order.proprio_order
        if names is not None and state is not None:
            by_place = sorted(range(len(state)), key=lambda i: state[i])
            names = tuple(names[i] for i in by_place)
        action = None if action is None else _taken(action, order.action_order)
        self.spec = replace(policy.spec, action_spec=action, proprio_names=names)

    @property
    def account(self) -> Any:
        """The account that the policy inside gives of what it does, if it gives any."""
        return getattr(self.policy, "account", None)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget the policy's state of these environments (all when None)."""
        self.policy.reset(env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """(B, C, A) in the environment's order."""
        action, seen = self._order.action_order, self._seen(obs)
        if prefix is not None and action is not None:  # it lies in the environment's order
            prefix = replace(prefix, actions=prefix.actions[..., np.argsort(action)])
        chunk = self.policy.act(seen) if prefix is None else self.policy.act(seen, prefix=prefix)
        self.confidence = confidence_of(self.policy)
        return chunk if action is None else np.ascontiguousarray(chunk[..., list(action)])

    def answer(self, obs: Observation, questions: Sequence[str]) -> list[Any]:
        """Answers to one question about each of B observations, of a policy that talks (`vla.language.talking`)."""
        return self.policy.answer(self._seen(obs), questions)  # type: ignore[attr-defined]

    def _seen(self, obs: Observation) -> Observation:
        """The observation as the policy inside reads it."""
        if (order := self._order.proprio_order) is None:
            return obs
        return replace(obs, proprio=np.ascontiguousarray(obs.proprio[:, list(order)]))


def choose_embodiment(names: Sequence[str], wanted: str | None, policy: str) -> str | None:
    """Which of a policy's embodiments to control; None for the only one of a policy that names none.

    ValueError listing them where the choice is missing, or names none of them. `policy`: its name in messages.
    """
    if wanted is None and len(names) <= 1:
        return None
    known = ", ".join(names)
    if wanted is None:
        raise ValueError(f"{policy} controls {len(names)} embodiments ({known}): choose one with --embodiment NAME")
    if not names:
        raise ValueError(f"{policy} was trained for one embodiment, without a name: leave out --embodiment {wanted}")
    if wanted not in names:
        raise ValueError(f"{policy} has no embodiment '{wanted}'; it controls: {known}")
    return wanted


def _action_order(policy: ActionSpec, env: ActionSpec, where: str) -> tuple[int, ...] | None:
    if policy.dim != env.dim:
        raise ValueError(
            f"the policy acts on {policy.dim} components ({_listed(policy.names)}), the {where} on {env.dim} "
            f"({_listed(env.names)})"
        )
    try:
        return _order(policy.names, env.names)
    except KeyError:
        raise ValueError(
            f"the policy acts on {_listed(policy.names)}, the {where} on {_listed(env.names)}: not the same components"
        ) from None


def _check_ranges(policy: ActionSpec, env: ActionSpec, where: str) -> list[str]:
    """Notices about components that go far beyond what the environment takes; ValueError where no name says that they
    are the same component at all."""
    beyond = []
    for name, theirs, *bounds in zip(policy.names, env.names, policy.low, policy.high, env.low, env.high, strict=True):
        low, high, least, most = bounds
        room = most - least
        if not np.isfinite(bounds).all() or (low >= least - room / 2 and high <= most + room / 2):
            continue
        told = f"the policy's {name} ranges over {low:g}..{high:g}, the {where}'s {theirs} over {least:g}..{most:g}"
        if unnamed(policy.names) or unnamed(env.names):
            raise ValueError(f"{told}: other units or another kind of action")
        beyond.append(told)
    more = f" ({len(beyond) - 1} more are alike)" if len(beyond) > 1 else ""
    return [f"{beyond[0]}{more}: what lies beyond is cut off"] if beyond else []


def _other_units(policy: ActionSpec, env: ActionSpec, where: str) -> list[str]:
    """Notices about components whose ranges differ as units do; a policy that uses a part of a range is none."""
    bounds = np.array([policy.low, policy.high, env.low, env.high], np.float64)
    with np.errstate(invalid="ignore"):
        ours, theirs = np.abs(bounds[:2]).max(0), np.abs(bounds[2:]).max(0)
        share = (bounds[1] == 1) & np.isin(bounds[0], (-1, 0)) & (theirs >= _PERCENT)
        angles = bool((ours <= np.pi).all() and (theirs >= _PERCENT).all())
        other = np.isfinite(bounds).all(0) & ((ours > _OTHER_UNIT * theirs) | share | angles)
    if not other.any():
        return []
    first, more = int(other.argmax()), int(other.sum()) - 1
    (low, high), (least, most) = bounds[:2, first], bounds[2:, first]
    return [
        f"the policy's {policy.names[first]} ranges over {low:g}..{high:g}, the {where}'s {env.names[first]} over "
        f"{least:g}..{most:g}{f' ({more} more are alike)' if more else ''}: are these two units? "
        "Nothing converts them: let the robot's class do it, or train on actions in its unit"
    ]


def same_rate(policy_hz: float, other_hz: float) -> bool:
    """True if both rates are the same but for rounding, or one is not known (0)."""
    return not (policy_hz > 0 and other_hz > 0) or abs(policy_hz - other_hz) <= _SAME_RATE * other_hz


def _check_rate(policy_hz: float, env_hz: float, where: str) -> None:
    if not same_rate(policy_hz, env_hz):
        raise ValueError(
            f"the policy was trained on actions at {policy_hz:g} Hz, the {where} takes them at {env_hz:g} Hz: train it "
            f"on demonstrations at {env_hz:g} Hz"
        )


def _proprio_order(policy: PolicySpec, env: PolicySpec, where: str) -> tuple[int, ...] | None:
    ours, theirs = policy.proprio_names, env.proprio_names
    widths = policy.proprio_dim or len(ours or ()), env.proprio_dim or len(theirs or ())
    if all(widths) and widths[0] != widths[1]:
        raise ValueError(
            f"the policy reads a state of {widths[0]} numbers{_in_brackets(ours)}, the {where} reports {widths[1]}"
            f"{_in_brackets(theirs)}"
        )
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    try:
        return _order(theirs, ours)
    except KeyError:
        raise ValueError(
            f"the policy reads the state {_listed(ours)}, the {where} reports {_listed(theirs)}: other components"
        ) from None


def _order(source: Sequence[str], target: Sequence[str]) -> tuple[int, ...] | None:
    """Places in `source` of the components of `target`; None if the order is the same or names are missing.
    KeyError for other components."""
    if unnamed(source) or unnamed(target):
        return None
    plain_source, plain_target = _plain(source, target), _plain(target, source)
    if plain_source == plain_target:
        return None
    if sorted(plain_source) != sorted(plain_target) or len(set(plain_source)) != len(plain_source):
        raise KeyError
    return tuple(plain_source.index(name) for name in plain_target)


def _plain(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names without LeRobot's suffix, where the other side writes none."""
    if any(_SUFFIX.search(name) for name in others):
        return list(names)
    return [_SUFFIX.sub("", name) for name in names]


def unnamed(names: Sequence[str]) -> bool:
    """True for names that tools make up for components without any: "action_0", "a1"."""
    return all(_UNNAMED.fullmatch(name) for name in names)


def _taken(spec: ActionSpec, order: Sequence[int] | None) -> ActionSpec:
    if order is None:
        return spec
    names, low, high = (tuple(part[i] for i in order) for part in (spec.names, spec.low, spec.high))
    return ActionSpec(names, low, high, spec.control_hz)


def _listed(names: Sequence[str] | None) -> str:
    return ", ".join(names or ()) or "none"


def _in_brackets(names: Sequence[str] | None) -> str:
    return f" ({_listed(names)})" if names else ""
