"""franky-sim's servers with the states of error that they do not produce by themselves.

libfranka learns of a reflex from the answer to its Move command, and of the mode from the state that comes every
millisecond. Both are sent here as an arm sends them.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import Any

from franky_sim import SimulationServer
from franky_sim.franka_gripper_protocol import GripperCommandStatus
from franky_sim.franka_gripper_server import FrankaGripperServer
from franky_sim.franka_robot_protocol import (
    AutomaticErrorRecoveryCommand,
    MoveStatus,
    RobotCommand,
    RobotMode,
)
from franky_sim.franka_robot_server import FrankaRobotServer
from franky_sim.franka_server import BaseCommand

FAULTS = {
    "reflex": (RobotMode.kReflex, MoveStatus.kReflexAborted),
    "user-stop": (RobotMode.kUserStopped, MoveStatus.kPreempted),
    "guiding": (RobotMode.kGuiding, MoveStatus.kPreempted),
    "locked": (RobotMode.kOther, MoveStatus.kEmergencyAborted),
    "none": (None, None),
}
"""Name -> the mode that the arm goes into, and the answer to a motion that runs."""


class _Recovery(AutomaticErrorRecoveryCommand):
    def handle(self, server: Any) -> None:
        server.recover()
        super().handle(server)


class HandServer(FrankaGripperServer):
    """One gripper's server. A movement that is stopped or followed by another is answered, as a real hand does: theirs
    would leave whoever asked for it waiting for ever."""

    def stop(self, command_id: int, tcp_socket: Any) -> None:
        """Theirs."""
        self._abort()
        super().stop(command_id, tcp_socket)

    def _start_motion(self, *arguments: Any) -> None:
        self._abort()
        super()._start_motion(*arguments)

    def _reset_state(self) -> None:
        self._pending_command_id = None  # whoever asked is gone

    def _abort(self) -> None:
        number, self._pending_command_id = self._pending_command_id, None
        if number is not None:
            BaseCommand.send_response(
                self._pending_tcp_socket, self._pending_command_type, number, GripperCommandStatus.kAborted,
                command_type_struct="H", status_type_struct="H",
            )  # fmt: skip


class ArmServer(FrankaRobotServer):
    """One arm's server, which can be put into a state of error."""

    def __init__(self, robot: Any, hosts: Iterable[str]) -> None:
        super().__init__(robot, hosts)
        self.mode: RobotMode | None = None
        """The mode of its fault; None while it is well."""
        # The package has no way to add a command. Theirs answers and does nothing, since it knows no errors.
        self._FrankaServer__command_class_map[RobotCommand.kAutomaticErrorRecovery] = _Recovery  # type: ignore[attr-defined]

    def _bind_children(self, hostname: str) -> None:
        hand = HandServer(self.robot, hostname)
        hand.init()
        self._FrankaRobotServer__gripper_server = hand  # type: ignore[attr-defined]

    @property
    def robot_state(self) -> Any:
        """Their state, in the fault's mode."""
        state = super().robot_state
        return state if self.mode is None else state.replace(robot_mode=self.mode)

    def start_motion(self, *arguments: Any) -> None:
        """Theirs; ValueError, which it answers by kAborted, during a fault."""
        if self.mode is not None:
            raise ValueError(f"no motion in mode {self.mode.name}")
        super().start_motion(*arguments)

    def await_command(self, longest_s: float) -> None:
        """While a motion runs, wait for the answer to the last state."""
        link = self._FrankaServer__udp_socket  # type: ignore[attr-defined]
        if link is not None and self.current_motion_id:
            select.select([link], [], [], longest_s)

    def fail(self, kind: str) -> None:
        """Go into a state of error, which ends the motion. ValueError for an unknown one."""
        if kind not in FAULTS:
            raise ValueError(f"no fault '{kind}': {', '.join(FAULTS)}")
        self.mode, status = FAULTS[kind]
        motion = self.current_motion_id
        if status is not None and motion:
            self.stop_motion(send_preemption_signal=False)
            self.reset_current_motion_id()
            BaseCommand.send_response(self._tcp_socket, RobotCommand.kMove, motion, status)

    def recover(self) -> None:
        """End a reflex, as automatic recovery does; another fault stays."""
        if self.mode is RobotMode.kReflex:
            self.mode = None


class CellServer(SimulationServer):
    """Their server of a simulation, with such an arm."""

    def init(self) -> None:
        """Bind the arm's address. OSError for one that is taken."""
        for robot in self.sim.robots:
            server = ArmServer(robot, self._remaining_hostname_candidates)
            try:
                server.init()
            except OSError as error:
                raise OSError(
                    "the cell's address is no address of this machine, or something listens at its ports 1337 or 1338 "
                    "already: another cell? Give this one another, e.g. --host 127.0.0.2"
                ) from error
            self.robot_servers.append(server)
        self.sim.start()

    @property
    def arm(self) -> ArmServer:
        """The only arm's server."""
        return self.robot_servers[0]  # type: ignore[return-value]
