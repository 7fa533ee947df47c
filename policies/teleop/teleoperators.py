"""A person's hand as commands for a robot: any LeRobot teleoperator, or a class of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from policies.control.guards import Kind
from policies.control.robots import Robot
from vla.core.config import find
from vla.core.types import ActionSpec

_DELTAS = {"dx": "delta_x", "dy": "delta_y", "dz": "delta_z", "gripper": "gripper"}
"""A robot's component -> LeRobot's name for it where a teleoperator gives displacements: gamepad, keyboard_ee."""
_CLOSE, _OPEN = 0.0, 2.0
"""LeRobot's gripper commands of such teleoperators; between them: leave it as it is."""


class Teleoperator(Protocol):
    """LeRobot's interface: its own teleoperators have these methods, and a class of one's own needs no more. It may
    have `get_teleop_events()` beside them, whose entry "is_intervention" says that the person
    takes over, and `is_connected`."""

    def connect(self) -> None:
        """Connect to the device."""

    def get_action(self) -> Mapping[str, float]:
        """The person's command now, by the robot's names of action components."""
        ...

    def disconnect(self) -> None:
        """Let go of the device. May be called twice."""


def own_teleoperator(name: str, arguments: Mapping[str, str]) -> Any:
    """The teleoperator that MODULE:CLASS `name` makes. ValueError naming it for whatever its module or class raises,
    and for one that lacks a method."""
    try:
        teleop = find(name, {}, "teleoperator")(**arguments)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith("teleoperator '"):  # not found: it names it already
            raise
        raise ValueError(f"--teleop {name} cannot be made: {type(error).__name__}: {text}") from error
    for method in ("connect", "get_action", "disconnect"):
        if not callable(getattr(teleop, method, None)):
            raise ValueError(f"--teleop {name} has no method {method}(): see `Teleoperator` in {__name__}")
    return teleop


def lerobot_teleoperator(kind: str, values: Mapping[str, str]) -> Any:
    """LeRobot's teleoperator of a type, from the words of a command line. ValueError naming the types or fields there
    are, or the driver that is not installed. Types of installed plugins are known, too."""
    try:
        from policies.control.robot_types import make_teleoperator
    except ImportError as error:
        raise ValueError(f"LeRobot cannot be loaded, a package that it needs is missing: {error}") from error

    return make_teleoperator(kind, values)


def says_itself(teleop: Any) -> bool:
    """True for a teleoperator with an event that says when the person takes over."""
    return callable(getattr(teleop, "get_teleop_events", None))


class Commands:
    """A teleoperator's actions as a robot's: its components in their order."""

    def __init__(self, teleop: Any, robot: Robot) -> None:
        """ValueError where the teleoperator says what it gives, and lacks a component of the robot's."""
        self.teleop, self._spec, self._kinds = teleop, robot.action_spec, robot.kinds
        self._deltas = False
        if given := self._features():
            self._check(given)

    def read(self, last: tuple[float, ...]) -> tuple[float, ...]:
        """The person's command (A,) now. `last`: the action that was sent last. ConnectionError for a teleoperator that
        is gone, ValueError for a command that is none, and whatever else it raises."""
        if not getattr(self.teleop, "is_connected", True):
            raise ConnectionError("the teleoperator is not connected any more")
        given = self.teleop.get_action()
        if not isinstance(given, Mapping):
            raise ValueError(f"the teleoperator's get_action() must return a dict, it returned {type(given).__name__}")
        self._check(list(given))
        parts = zip(self._spec.names, self._kinds, self._spec.low, self._spec.high, last, strict=True)
        return tuple(self._component(given, *part) for part in parts)

    def intervenes(self) -> bool:
        """True while the teleoperator's own event says that the person takes over."""
        events = self.teleop.get_teleop_events()
        if not isinstance(events, Mapping):
            kind = type(events).__name__
            raise ValueError(f"the teleoperator's get_teleop_events() must return a dict, it returned {kind}")
        for name, value in events.items():
            if getattr(name, "value", name) == "is_intervention":
                if value not in (True, False):  # a text is true, whatever it says
                    raise ValueError(f"the teleoperator's is_intervention must be True or False, it is {value!r:.40}")
                return bool(value)
        raise ValueError("the teleoperator's get_teleop_events() has no entry is_intervention")

    def _features(self) -> list[str]:
        features = getattr(self.teleop, "action_features", None) or {}
        names = features.get("names", features)  # those that give displacements say their names in here
        return list(names) if isinstance(names, Mapping | list | tuple) else []

    def _check(self, given: Sequence[str]) -> None:
        self._deltas = "delta_x" in given
        wanted = [self._name(name) for name in self._spec.names]
        if missing := [name for name in wanted if name not in given]:
            raise ValueError(
                f"the teleoperator gives no '{missing[0]}', which the robot is commanded by; it gives "
                f"{', '.join(map(str, given)) or 'nothing'}"
            )

    def _name(self, component: str) -> str:
        return _DELTAS.get(component.partition(".")[0], component) if self._deltas else component

    def _component(
        self, given: Mapping[str, Any], name: str, kind: Kind, low: float, high: float, last: float
    ) -> float:
        try:
            value = float(given[self._name(name)])
        except (TypeError, ValueError):
            raise ValueError(f"the teleoperator's '{self._name(name)}' is no number") from None
        if not math.isfinite(value):
            raise ValueError(f"the teleoperator's '{self._name(name)}' is {value}")
        if not self._deltas:
            return value
        if self._name(name) == "gripper":
            return low if value <= _CLOSE else high if value >= _OPEN else last
        return value * (high if value > 0 else -low)  # a stick pushed all the way is as much as a tick may move


def per_tick(spec: ActionSpec, kinds: Sequence[Kind], action: Sequence[float]) -> tuple[float, ...]:
    """An action in shares of each component's range, -1 to 1, as displacements of one tick; switches as they are."""
    return tuple(
        float(value) if kind == "switch" else float(value) * (high if value > 0 else -low)
        for value, kind, low, high in zip(action, kinds, spec.low, spec.high, strict=True)
    )
