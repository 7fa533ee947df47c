"""A robot whose pictures, state and commands are ROS topics, as LeRobot's `Robot`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from lerobot.robots.robot import Robot
from numpy.typing import NDArray

from policies.ros.config_rosbridge import RosbridgeConfig
from policies.ros.link import COMPRESSION, Link
from policies.ros.pictures import picture_of
from policies.ros.topics import CommandTopic, number_at, read_topics, steps_of

_LOOK_S = 0.02


class Rosbridge(Robot):
    """The latest message of every topic, and commands published as they come. A topic that falls silent is a
    TimeoutError, at which the control loop holds; a connection that ends is a ConnectionError, at which it stops."""

    config_class = RosbridgeConfig
    name = "rosbridge"
    is_calibrated = True

    def __init__(self, config: RosbridgeConfig) -> None:
        """ValueError for a file of topics that says too little, or what cannot be."""
        super().__init__(config)
        self.config, self.topics = config, read_topics(config.config)
        self.switches, self.moves_by_displacements = self.topics.switches, self.topics.displacements
        self.cameras = self.topics.cameras
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._numbers: dict[str, tuple[float, float]] = {}
        """State component -> its number, unscaled, and when it came."""
        self._pictures: dict[str, tuple[Mapping[str, Any], float]] = {}
        """Camera -> its last message, and when it came."""
        self._decoded: dict[str, tuple[float, NDArray[np.uint8]]] = {}
        self._trouble: dict[str, str] = {}
        """Topic -> why its last message cannot be used."""
        self._read: dict[str, dict[str, str]] = {}
        """Topic -> state component -> its place."""
        for topic in self.topics.states:
            self._read.setdefault(topic.topic, {}).update(topic.read)
        self._camera_of = {camera.topic: name for name, camera in self.cameras.items()}

    @property
    def observation_features(self) -> dict[str, Any]:
        """Name -> float for each number of the state, and name -> (H, W, 3) for each camera."""
        shapes = {name: (camera.height, camera.width, 3) for name, camera in self.cameras.items()}
        return {**dict.fromkeys(self.topics.state_names, float), **shapes}

    @property
    def action_features(self) -> dict[str, Any]:
        """Name -> float for each action component."""
        return dict.fromkeys(self.topics.action_names, float)

    @property
    def is_connected(self) -> bool:
        """True between `connect` and `disconnect`, while the connection stands."""
        return self._link is not None and not self._link.lost

    def calibrate(self) -> None:
        """Does nothing: the robot's own nodes know where it is."""

    def configure(self) -> None:
        """Does nothing: the robot's own nodes configure it."""

    def connect(self, calibrate: bool = True) -> None:
        """Connect, subscribe, advertise, and wait for a message of every topic. ConnectionError naming the server that
        does not answer or what it refuses, and topics that are silent."""
        link = self._link = Link(self.config.url, self._hear, open_s=self.topics.connect_s)
        try:
            for topic, kind in {topic.topic: topic.type for topic in self.topics.states}.items():
                link.send("subscribe", topic=topic, type=kind, queue_length=1, compression="none")
            for camera in self.cameras.values():
                link.send("subscribe", topic=camera.topic, type=camera.type, queue_length=1, compression=COMPRESSION)
            for command in self.topics.commands:
                link.send("advertise", topic=command.topic, type=command.type)
            self._wait(link)
        except BaseException as error:
            self.disconnect()
            if isinstance(error, ValueError):  # pictures that are not as the file says
                raise ConnectionError(f"rosbridge at {self.config.url}: {error}") from error
            raise

    def get_observation(self) -> dict[str, Any]:
        """State and pictures by name. ConnectionError if the connection has ended, TimeoutError naming a topic that is
        silent, ValueError for a message that cannot be used."""
        self._connected()
        now = time.monotonic()
        with self._lock:
            numbers, pictures, trouble = dict(self._numbers), dict(self._pictures), dict(self._trouble)
        for topic, problem in trouble.items():
            raise ValueError(f"{topic}: {problem}")
        oldest = {topic: min(numbers[name][1] for name in read) for topic, read in self._read.items() if read}
        oldest |= {self.cameras[name].topic: came_s for name, (_, came_s) in pictures.items()}
        if silent := [topic for topic, came_s in oldest.items() if now - came_s > self.topics.max_age_s]:
            raise TimeoutError(f"{silent[0]} has been silent for {now - oldest[silent[0]]:.1f} s")
        scale = self.topics.scale
        seen: dict[str, Any] = {name: numbers[name][0] * scale.get(name, 1.0) for name in self.topics.state_names}
        for name, (message, came_s) in pictures.items():
            seen[name] = self._picture(name, message, came_s)
        return seen

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Publish the commands. ConnectionError if the connection has ended, ValueError for a number that is not
        finite."""
        values = {name: float(action[name]) / self.topics.scale.get(name, 1.0) for name in self.topics.action_names}
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            raise ValueError(f"the command of '{bad[0]}' is {action[bad[0]]}: nothing was sent")
        link = self._connected()
        for command in self.topics.commands:
            link.send("publish", topic=command.topic, msg=command.filled(values))
        return {name: float(action[name]) for name in values}

    def disconnect(self) -> None:
        """Stop what moves by velocities, and end the connection. May be called twice."""
        link, self._link = self._link, None
        if link is None:
            return
        with contextlib.suppress(ConnectionError):
            for command in self.topics.commands:
                if self._is_speed(command):  # a speed would go on for as long as its controller remembers it
                    still = command.filled(dict.fromkeys(command.components, 0.0))
                    link.send("publish", topic=command.topic, msg=still)
                link.send("unadvertise", topic=command.topic)
        link.close()
        with self._lock:
            self._numbers, self._pictures, self._trouble, self._decoded = {}, {}, {}, {}

    def _is_speed(self, command: CommandTopic) -> bool:
        return not self.topics.displacements and all(name.endswith(".vel") for name in command.components)

    def _connected(self) -> Link:
        if self._link is None:
            raise ConnectionError("the robot is not connected")
        if self._link.lost:
            raise ConnectionError(f"rosbridge at {self.config.url}: {self._link.lost}")
        return self._link

    def _wait(self, link: Link) -> None:
        """Until every number and picture has come."""
        until = time.monotonic() + self.topics.connect_s
        while (missing := self._missing()) and not link.lost and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if not missing and not link.lost:
            for name, (message, came_s) in dict(self._pictures).items():
                self._picture(name, message, came_s)
            return
        said = link.lost or f"{missing} within {self.topics.connect_s:g} s: is it published, and its type right?"
        told = f"; the server says: {link.complaint}" if link.complaint else ""
        raise ConnectionError(f"rosbridge at {self.config.url}: {said}{told}")

    def _missing(self) -> str:
        with self._lock:
            for topic, problem in self._trouble.items():
                return f"{topic} tells nothing that can be used ({problem})"
            for topic, read in self._read.items():
                if lacking := [place for name, place in read.items() if name not in self._numbers]:
                    return f"{topic} told no {lacking[0]}"
            for name, camera in self.cameras.items():
                if name not in self._pictures:
                    return f"{camera.topic} showed nothing"
        return ""

    def _hear(self, topic: str, message: Mapping[str, Any], came_s: float) -> None:
        """In the receiving thread."""
        found, problem = {}, ""
        try:
            for name, place in self._read.get(topic, {}).items():
                value = number_at(message, steps_of(place))
                if value is not None and not np.isfinite(value):
                    problem = f"'{name}' is {value}"
                elif value is not None:  # several nodes may tell joints of one arm, each its own
                    found[name] = (value, came_s)
        except ValueError as error:
            problem = str(error)
        with self._lock:
            self._numbers.update(found)
            if problem:
                self._trouble[topic] = problem
            else:
                self._trouble.pop(topic, None)
            if (camera := self._camera_of.get(topic)) is not None:
                self._pictures[camera] = (message, came_s)

    def _picture(self, name: str, message: Mapping[str, Any], came_s: float) -> NDArray[np.uint8]:
        """The camera's picture, decoded once. ValueError for one that cannot be used."""
        kept = self._decoded.get(name)
        if kept is None or kept[0] != came_s:
            camera = self.cameras[name]
            try:
                picture = picture_of(message)
            except ValueError as error:
                raise ValueError(f"camera '{name}' ({camera.topic}): {error}") from None
            if picture.shape[:2] != (camera.height, camera.width):
                raise ValueError(
                    f"camera '{name}' ({camera.topic}) shows {picture.shape[1]}x{picture.shape[0]} pixels, its width "
                    f"and height are given as {camera.width}x{camera.height}"
                )
            kept = self._decoded[name] = (came_s, picture)
        return kept[1]
