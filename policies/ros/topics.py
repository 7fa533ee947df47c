"""Which ROS topics carry a robot's pictures, state and commands: read from a TOML file.

    [cameras.front]
    topic = "/camera/color/image_raw/compressed"
    width = 640
    height = 480

    [[states]]
    topic = "/joint_states"
    type = "sensor_msgs/msg/JointState"
    read = { "shoulder.pos" = "position[shoulder_joint]", "elbow.pos" = "position[elbow_joint]" }

    [[commands]]
    topic = "/position_controller/commands"
    type = "std_msgs/msg/Float64MultiArray"
    message = { data = ["$shoulder.pos", "$elbow.pos"] }

    [scale]                     # the policy's number = scale * the topic's
    "shoulder.pos" = 57.29578   # degrees of radians

A place within a message is named as in `position[elbow_joint]`, `data[0]` or `wrench.force.z`; a name in brackets is
looked up in the message's list `name`. In a command's message, "$NAME" stands for the number of action component NAME.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vla.core.config import decode, encode

COMPRESSED = "sensor_msgs/msg/CompressedImage"
IMAGE = "sensor_msgs/msg/Image"
_STEP = re.compile(r"([A-Za-z_]\w*)(?:\[([^\]]+)\])?(?:\.|$)")


@dataclass(frozen=True)
class CameraTopic:
    """A camera's pictures."""

    topic: str
    width: int
    height: int
    """Pixels."""
    type: str = COMPRESSED
    """Or sensor_msgs/msg/Image; of ROS 1 the same without /msg/."""


@dataclass(frozen=True)
class StateTopic:
    """Numbers of the state."""

    topic: str
    type: str
    read: dict[str, str]
    """State component -> its place in the message."""


@dataclass(frozen=True)
class CommandTopic:
    """Where commands go."""

    topic: str
    type: str
    message: dict[str, Any]
    """The message, "$NAME" in place of each action component's number."""

    @property
    def components(self) -> list[str]:
        """The action components that it holds, in order."""
        return list(dict.fromkeys(_named(self.message)))

    def filled(self, values: Mapping[str, float]) -> Any:
        """The message with the components' numbers."""
        return _filled(self.message, values)


@dataclass(frozen=True)
class Topics:
    """A robot in topics."""

    states: tuple[StateTopic, ...]
    commands: tuple[CommandTopic, ...]
    cameras: dict[str, CameraTopic] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    """Component -> the policy's number of the topic's 1, for state and commands alike."""
    switches: tuple[str, ...] = ()
    """Action components that are on/off commands."""
    displacements: bool = False
    """Action components NAME.vel say how far to go in one step; else they are velocities."""
    max_age_s: float = 0.3
    """A picture or number that is older than this, in seconds, is not used: the robot holds."""
    connect_s: float = 5.0
    """Give up connecting after so many seconds in which a topic was silent."""

    @property
    def state_names(self) -> list[str]:
        """Components of the state, in order."""
        return [name for topic in self.states for name in topic.read]

    @property
    def action_names(self) -> list[str]:
        """Components of the action, in order."""
        return list(dict.fromkeys(name for topic in self.commands for name in topic.components))

    def problem(self) -> str | None:
        """Describe what is wrong, or return None."""
        names = self.state_names
        if twice := [name for name in names if names.count(name) > 1]:
            return f"two topics tell '{twice[0]}': name it in one"
        for topic in self.states:
            for name, place in topic.read.items():
                if not steps_of(place):
                    return f"'{place}' of '{name}' is no place in a message: write position[elbow_joint], or data[0]"
        if not self.action_names:
            return 'no command holds an action component: put "$NAME" in its message where NAME\'s number goes'
        known = {*names, *self.action_names}
        for option, given in (("scale", self.scale), ("switches", self.switches)):
            if foreign := [name for name in given if name not in known]:
                return f"{option} names '{foreign[0]}', which no topic holds; there are {', '.join(sorted(known))}"
        if bad := [name for name, value in self.scale.items() if not value or not math.isfinite(value)]:
            return f"scale of '{bad[0]}' must be a number that is not 0, got {self.scale[bad[0]]}"
        if not (self.max_age_s > 0 and self.connect_s > 0):
            return "max_age_s and connect_s must be positive"
        sized = [(name, camera.width, camera.height) for name, camera in self.cameras.items()]
        if bad := [name for name, width, height in sized if width < 1 or height < 1]:
            return f"camera '{bad[0]}' needs its width and height in pixels"
        return None


def read_topics(path: str | Path) -> Topics:
    """The topics in a file. ValueError, one line, naming the file and what is wrong in it."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    try:
        topics = decode(Topics, encode(tomllib.loads(text)))
    except ValueError as error:  # tomllib's is one, too
        raise ValueError(f"config {path}: {error}") from None
    if problem := topics.problem():
        raise ValueError(f"config {path}: {problem}")
    return topics


@lru_cache(maxsize=1024)
def steps_of(place: str) -> tuple[tuple[str, str | None], ...]:
    """(("position", "elbow_joint"),) of "position[elbow_joint]"; empty for what is no place."""
    steps, at = [], 0
    while at < len(place):
        step = _STEP.match(place, at)
        if step is None or step.end() == at:
            return ()
        steps.append((step[1], step[2]))
        at = step.end()
    return () if place.endswith(".") else tuple(steps)


def number_at(message: Mapping[str, Any], steps: Sequence[tuple[str, str | None]]) -> float | None:
    """The number at a place; None for a joint that this message does not tell. ValueError for a place that the message
    does not have, or no number in it."""
    value: Any = message
    for name, index in steps:
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"the message has no '{name}'")
        value = value[name]
        if index is None:
            continue
        if index.isdecimal():
            place = int(index)
        elif index in (names := list(message.get("name", ()))):
            place = names.index(index)
        else:
            return None
        if not hasattr(value, "__getitem__") or place >= len(value):
            raise ValueError(f"'{name}' of the message has no entry {index}")
        value = value[place]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"'{steps[-1][0]}' is no number but {type(value).__name__}") from None


def _named(part: Any) -> Iterator[str]:
    if isinstance(part, str) and part.startswith("$"):
        yield part[1:]
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _named(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _named(value)


def _filled(part: Any, values: Mapping[str, float]) -> Any:
    if isinstance(part, str) and part.startswith("$"):
        return values[part[1:]]
    if isinstance(part, Mapping):
        return {name: _filled(value, values) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_filled(value, values) for value in part]
    return part
