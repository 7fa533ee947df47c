"""A Franka arm as LeRobot's `Robot`: state, actions and cameras over libfranka, which franky-control brings along.

Actions are displacements of the commanded hand (dx, dy, dz) and an on/off gripper, as the tabletop suites have them.
Every action becomes a new target of one Cartesian motion, to which ruckig plans anew from where the reference is, in
libfranka's loop of 1 kHz: `send_action` returns within a millisecond.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import socket
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from lerobot.cameras.utils import make_cameras_from_configs
from lerobot.robots.robot import Robot

from policies.franka.config_franka import STATES, FrankaConfig
from policies.franka.feed import FeedCamera, cameras_of
from policies.franka.hand import Hand
from policies.franka.limits import ARMS
from policies.franka.reference import Reference, opening_of, straight_down, yaw_of
from vla.core.config import lookup

__all__ = ["FeedCamera", "Franka"]  # where LeRobot looks for the classes of `config_franka`

FCI_PORT = 1337
ACTIONS = ("dx.vel", "dy.vel", "dz.vel", "gripper.pos")
TABLETOP = (
    "grip_x", "grip_y", "grip_z", "lead_x", "lead_y", "lead_z", "finger_opening", "gripper_command",
)  # fmt: skip
"""`envs.backends.cpu_worlds.PROPRIO_NAMES`, a package that this one may not import."""
_CAMERA_MS = 500
_STOP_S = 2.0


class Franka(Robot):
    """The arm, its hand and its cameras."""

    config_class = FrankaConfig
    name = "franka"
    is_calibrated = True
    moves_by_displacements = True
    switches = ("gripper.pos",)

    def __init__(self, config: FrankaConfig) -> None:
        """ValueError for a configuration that no arm can have, or without the package."""
        super().__init__(config)
        limits = lookup(config.arm, ARMS, "arm")
        lookup(config.state, dict.fromkeys(STATES), "state")
        config.motion.refuse_beyond(limits, config.arm)
        if importlib.util.find_spec("franky") is None:
            raise ValueError("the package franky-control is missing: ./run setup franka")
        self.config = config
        seen = {} if config.feed is None else cameras_of(config.feed)
        self.cameras = make_cameras_from_configs({**seen, **config.cameras})
        self._arm: Any = None
        self._hand: Hand | None = None
        self._fault: str | None = None
        self._target: Any = None

    @cached_property
    def _state_names(self) -> tuple[str, ...]:
        names = [f"{name}.pos" for name in TABLETOP]
        if self.config.state == "full":
            names += ["gripper_width.pos", "yaw.pos"]
            names += [f"joint_{j}.{kind}" for kind in ("pos", "vel") for j in range(1, 8)]
        return tuple(names)

    @property
    def observation_features(self) -> dict[str, Any]:
        """Name -> float for each number of the state, and name -> (H, W, 3) for each camera."""
        cameras = {name: (camera.height, camera.width, 3) for name, camera in self.cameras.items()}
        return {**dict.fromkeys(self._state_names, float), **cameras}

    @property
    def action_features(self) -> dict[str, Any]:
        """Name -> float for each action component."""
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        """True between `connect` and `disconnect`, while the network stands."""
        return self._arm is not None

    def calibrate(self) -> None:
        """Does nothing: the arm knows where it is."""

    def configure(self) -> None:
        """Set the thresholds of contact and the limits of motion."""
        arm, motion = self._arm, self.config.motion
        arm.set_collision_behavior(self.config.torque_nm, self.config.force_n)
        for name, most in (
            ("translation_velocity_limit", motion.speed_m_s),
            ("translation_acceleration_limit", motion.acceleration_m_s2),
            ("translation_jerk_limit", motion.jerk_m_s3),
            ("rotation_velocity_limit", motion.turn_rad_s),
            ("rotation_acceleration_limit", motion.turn_rad_s2),
            ("rotation_jerk_limit", motion.turn_rad_s3),
        ):
            getattr(arm, name).set(most)  # refuses what is beyond libfranka's own

    def connect(self, calibrate: bool = True) -> None:
        """Connect arm, hand and cameras; a reflex that stands is recovered from. ConnectionError, in one line, for an
        arm that is not there or cannot be driven now."""
        self._reach()
        import franky

        kind = franky.RealtimeConfig.Enforce if self.config.realtime else franky.RealtimeConfig.Ignore
        try:
            self._arm = self._made(lambda: franky.Robot(self.config.host, realtime_config=kind))
            if (mode := self._arm.state.robot_mode) == franky.RobotMode.Reflex:
                self._arm.recover_from_errors()
                mode = self._arm.state.robot_mode
            if mode != franky.RobotMode.Idle:
                raise ConnectionError(_MODES.get(mode.name, f"it is in mode {mode.name}"))
            self.configure()
            motion = self.config.motion
            gripper = self._made(lambda: franky.Gripper(self.config.host))
            self._hand = Hand(gripper, speed_m_s=motion.gripper_m_s, force_n=motion.gripper_n)
            for camera in self.cameras.values():
                camera.connect()
        except Exception as error:
            self._let_go()
            raise ConnectionError(f"the arm at {self.config.host}: {_in_words(error)}") from error
        self._recoveries = self.config.recoveries
        self._fault = self._target = None
        self._reference = Reference(self.config.reference, self._pose()[:3, 3])

    def get_observation(self) -> dict[str, Any]:
        """State and pictures by name. ConnectionError if it is not connected any more."""
        state = self._state()
        self._look_for_fault(state)
        pose = np.array(state.O_T_EE.matrix)
        hand, at = self._hand, pose[:3, 3]
        assert hand is not None
        told = [
            *at,
            *(self._reference.command_3 - at),
            opening_of(hand.width_m, hand.widest_m),
            -1.0 if hand.open is False else 1.0,
        ]
        if self.config.state == "full":
            told += [hand.width_m, yaw_of(pose[:3, :3]), *state.q, *state.dq]
        pictures = {name: camera.read_latest(_CAMERA_MS) for name, camera in self.cameras.items()}
        return {**dict(zip(self._state_names, map(float, told), strict=True)), **pictures}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Move the command, and open or close the hand. Returns the action. RuntimeError while the arm is in a reflex
        or the hand does not do as it is told, ConnectionError if it is not connected any more."""
        state, hand = self._state(), self._hand
        assert hand is not None
        self._look_for_fault(state)
        if self._fault is not None:
            self._recover()
        displacement = np.array([float(action[name]) for name in ACTIONS[:3]])
        command = tuple(self._reference.move(displacement, self._pose()[:3, 3]).tolist())
        if command != self._target or not self._arm.is_in_control:
            self._go_to(command)
        if math.isfinite(gripper := float(action["gripper.pos"])):
            hand.command(gripper > 0)
        if hand.trouble is not None:
            raise RuntimeError(hand.trouble)
        return action

    def disconnect(self) -> None:
        """Stop the arm and let it go. May be called twice."""
        self._let_go()

    def _reach(self) -> None:
        """ConnectionError, within `connect_s`, for an address where nothing answers: libfranka waits for longer."""
        host = self.config.host
        try:
            socket.create_connection((host, FCI_PORT), timeout=self.config.connect_s).close()
        except ConnectionRefusedError as error:
            raise ConnectionError(f"{host} is there, but {_NO_FCI}") from error
        except OSError as error:
            what = "nothing answers" if isinstance(error, TimeoutError) else error.strerror or error
            raise ConnectionError(
                f"no arm at {host} ({what}): is its control box on, and this machine in its network?"
            ) from error

    def _made(self, make: Callable[[], Any]) -> Any:
        """The connection that `make` makes, in a thread: libfranka gives its caller the highest priority that there is,
        for good, and waits without end for an arm that somebody else drives. ConnectionError after `connect_s`."""
        made: list[Any] = []

        def run() -> None:
            try:
                made.append(make())
            except Exception as error:
                made.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.config.connect_s)
        if not made:
            raise ConnectionError("it accepts the connection and says nothing: is somebody else driving it?")
        if isinstance(made[0], Exception):
            raise made[0]
        return made.pop()

    def _pose(self) -> np.ndarray:
        return np.array(self._state().O_T_EE.matrix)

    def _go_to(self, command: tuple[float, ...]) -> None:
        import franky

        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = straight_down(self.config.yaw_rad), command
        motion = franky.CartesianMotion(franky.Affine(pose), return_when_finished=False)
        try:
            self._arm.move(motion, asynchronous=True)
        except Exception as error:  # what ended the motion a moment ago, or keeps this one from beginning
            self._fail(error)
            self._recover()
            return
        self._target = command

    def _look_for_fault(self, state: Any) -> None:
        """Take up what ended the motion since it was last looked for."""
        try:
            self._arm.poll_motion()
        except Exception as error:
            self._fail(error)
        if self._fault is None and (words := _MODES.get(state.robot_mode.name)):
            self._fault = words

    def _fail(self, error: Exception) -> None:
        """Keep the error in words; ConnectionError where the network is gone."""
        import franky

        self._target, self._fault = None, _in_words(error)
        if isinstance(error, franky.NetworkException) or "Net Exception" in str(error):  # Poco's own, let through
            self._lose(error)

    def _recover(self) -> None:
        """Recover from the fault, as often as a run may; RuntimeError while it stands. The arm goes on from where it
        is: what was commanded before the reflex is forgotten."""
        import franky

        mode = self._arm.state.robot_mode
        if self._recoveries > 0 and mode in (franky.RobotMode.Reflex, franky.RobotMode.Idle):
            self._recoveries -= 1
            if self._arm.recover_from_errors():
                self._fault = None
                self._reference = Reference(self.config.reference, self._pose()[:3, 3])
                return
        raise RuntimeError(self._fault)

    def _state(self) -> Any:
        """The latest state. ConnectionError if there is none any more."""
        if self._arm is None:
            raise ConnectionError(self._fault or "the arm is not connected")
        try:
            return self._arm.state
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> NoReturn:
        """Give up an arm that is gone. ConnectionError."""
        self._fault = f"the arm at {self.config.host} does not answer any more: {_in_words(error)}"
        self._let_go()
        raise ConnectionError(self._fault) from error

    def _let_go(self) -> None:
        arm, self._arm = self._arm, None
        hand, self._hand = self._hand, None
        for camera in self.cameras.values():
            with contextlib.suppress(Exception):
                camera.disconnect()
        if arm is not None:
            _stop(arm)
        if hand is not None:
            hand.close()


_NO_FCI = "refuses control: activate FCI in its Desk, and unlock the brakes"
_MODES = {
    "Other": "its brakes are locked, or it is starting: unlock it in its Desk",
    "Guiding": "somebody guides it by hand: let go of the buttons",
    "Reflex": "it is in a reflex that automatic recovery does not end: acknowledge it in its Desk",
    "UserStopped": "its stop is pressed: release it, and activate FCI again",
}
"""`franky.RobotMode` -> why nothing is sent in it."""


def _stop(arm: Any) -> None:
    """Bring the arm to rest: along its path if that goes, else at once."""
    import franky

    with contextlib.suppress(Exception):
        if arm.is_in_control:
            arm.move(franky.CartesianStopMotion(), asynchronous=True)
            if arm.join_motion(timeout=_STOP_S):
                return
    with contextlib.suppress(Exception):
        arm.stop()


def _in_words(error: Exception) -> str:
    """libfranka's message in one line, with what to do about those that people meet."""
    text = " ".join(str(error).split()).removeprefix("libfranka: ") or type(error).__name__
    if "refused" in text and "FCI" in text:
        return f"it {_NO_FCI}"
    if "realtime" in text.lower() or "real-time" in text.lower():
        return f"{text} (a test cell, or to try without a real-time kernel: --robot-args realtime false)"
    if "reflex" in text.lower():
        return f"it stopped itself in a reflex: {text}"
    return text
