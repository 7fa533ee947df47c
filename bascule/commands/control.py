"""`vla control`: a policy at the controls of a robot, simulated or any of LeRobot's."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_file, check_numbers, from_flags, refuse_idle, refuse_others
from bascule.commands.robots import arm_of, person_of, robot_of, teleop_of

if TYPE_CHECKING:
    from policies.control.config import ControlConfig
    from policies.control.guards import GuardConfig


@dataclass(frozen=True)
class Control(Command):
    """Drive a robot in real time: guards, e-stop, black-box log. Policy: a checkpoint or a server."""

    policy: Positional[str]
    """A checkpoint folder, a folder of `vla export`, or the address of a server: ws://HOST:PORT of a `vla serve`, with
    /NAME behind it for one of several policies."""
    embodiment: str | None = None
    """The robot to control, for a policy trained for several robots."""
    robot: str | None = None
    """Type of a LeRobot robot, as in LeRobot's own --robot.type; or MODULE:CLASS, a robot of your own (docs/extend.md).
    Default: the simulated one."""
    robot_args: dict[str, str] = field(default_factory=dict)
    """Arguments of a LeRobot robot, e.g. port /dev/ttyACM0 id left cameras "{front: {type: opencv, index_or_path: 0,
    width: 640, height: 480, fps: 30}}"; a dot reaches into a part, left_arm_config.port /dev/ttyACM0."""
    cameras: tuple[str, ...] = ()
    """Cameras that the robot calls otherwise: POLICY=ROBOT each, the policy's name and the robot's, e.g.
    front=cam_high; or wrist=none, which the robot lacks and the policy sees black. Others are matched by name."""
    teleop: str | None = None
    """A person may take over and hand back, by a LeRobot teleoperator of this type, as in LeRobot's own --teleop.type;
    or MODULE:CLASS, one of your own (docs/deploy.md). corrector: a script beside the simulated robot."""
    teleop_args: dict[str, str] = field(default_factory=dict)
    """Arguments of the teleoperator, e.g. port /dev/ttyACM1 id leader; as --robot-args."""
    take_over: Literal["key", "event", "motion"] | None = None
    """Beside --teleop: how one takes over. key: the space bar, which hands back, too. event: the teleoperator says it
    itself (gamepad, keyboard_ee). motion: by moving it, and one hands back by letting it rest for a second. Default:
    event where the teleoperator has one, else key."""
    task: str | None = None
    """The instruction for a LeRobot robot, in words (required); for the simulated one, the suite's task."""
    limits: tuple[str, ...] = ()
    """NAME:LOW:HIGH of a LeRobot robot's actions. Default: the range in the policy's demonstrations."""
    switches: tuple[str, ...] = ()
    """A LeRobot robot's on/off commands, e.g. gripper.pos, which are sent as the policy gives them, neither limited in
    speed nor rounded. NAME.vel are velocities, all others positions."""
    suite: str = "tabletop-pick"
    """The suite that the simulated robot works in: one of `vla list suites`."""
    seed: int = 0
    """Seed of the simulated scene."""
    endless: bool = False
    """Simulated robot: play one scene after the other, until the time is over."""
    hz: float | None = None
    """Rate in Hz at which the robot is commanded; the policy's actions are interpolated to it. Default: 50, and a robot
    class of your own says it in its action_spec."""
    duration_s: float = 20.0
    """Longest duration of the run in seconds; it also ends when the task is done."""
    policy_hz: float | None = None
    """Rate in Hz for which the policy's actions are meant. Default: what the policy says; a stock openpi server says
    nothing, and its actions are then executed at --hz."""
    n_action_steps: int | None = None
    """Request the next chunk after this many actions of one; the rest of it is executed until the answer arrives.
    Default: what the policy says, else half of a chunk."""
    join: Literal["switch", "blend", "ensemble", "rtc"] = "blend"
    """How a new chunk takes over from the one being executed. switch: at once. blend: over a few actions. ensemble: the
    mean of all chunks that overlap. rtc: real-time chunking, the new chunk is generated to continue what is left of the
    old one (flow heads, not over a server)."""
    blend_steps: int = 2
    """Number of actions over which "blend" takes over."""
    asynchronous: bool = True
    """Compute the next chunk while the current one is executed, in a process of its own."""
    in_flight: int = 1
    """Connections to a server, each with a request in flight: for slow links, where most of an answer's time is spent
    on the link. About as many as an answer takes steps of the policy, e.g. 4 behind 200 ms at 20 Hz."""
    dry_run: bool = False
    """Do everything but send actions to the robot. A LeRobot robot is not even connected: its configuration and what
    the policy needs of it are checked, and the commands that it would get are described."""
    estop_file: Path | None = None
    """Emergency stop: the robot is disconnected as soon as this file exists."""
    estop_key: bool = True
    """Emergency stop by any key in the terminal in which the command runs."""
    log: Path | None = None
    """Black box: a file with one JSON line per tick, for --replay and --to-dataset."""
    replay: bool = False
    """Run no robot: POLICY is a log. Decide every tick of it again, and compare. Exit code 1 if a decision differs."""
    to_dataset: Path | None = None
    """Run no robot: POLICY is a log, or a folder of logs (*.jsonl). Write it as a LeRobotDataset to this folder, an
    episode a log; runs with --teleop say for each frame who drove, and are written at the policy's rate."""
    account_s: float | None = None
    """Seconds between two accounts that a policy that talks (`vla train --talk`) gives of what it does, on the terminal
    and in the --log. Default: none. It speaks between its decisions, which come no later for it."""
    velocity: dict[str, float] = field(default_factory=dict)
    """Largest speeds: component and action units per second, e.g. dx 12 dy 12."""
    acceleration: dict[str, float] = field(default_factory=dict)
    """Largest accelerations: component and action units per second squared."""
    workspace: tuple[str, ...] = ()
    """Ranges in which the measured state must stay: NAME:LOW:HIGH, e.g. grip_z:0.005:0.4."""
    max_observation_age_s: float = 0.5
    """The robot holds while its last observation is older than this, in seconds."""
    max_action_age_s: float = 2.0
    """The robot holds while the action to execute answers an observation that is older than this, in seconds."""
    give_up_s: float = 3.0
    """A hold that lasts longer than this, in seconds, becomes a slow stop."""
    stop_s: float = 0.5
    """Duration of a slow stop in seconds."""
    follow_fraction: float = 0.1
    """The robot holds when a position is commanded this fraction of its range away and does not move at all for
    --follow-s: its torque may be off. Grippers are left out."""
    follow_s: float = 1.0
    """Seconds for which a position may stand still under such commands."""
    hold_ungrounded: bool = False
    """Hold the robot (guard not_grounded) until the policy first sees what the instruction names, and look again at the
    rate of its decisions. Once seen, the instruction is carried out: what is in the gripper may be out of sight. Only
    for policies whose backbone was calibrated for it, see docs/deploy.md."""
    server_timeout_s: float = 1.0
    """A server that takes longer than this to answer, in seconds, counts as dead."""
    image_size: int | None = None
    """Height and width of the simulated robot's images in pixels. Default: as the policy reads them."""
    api_key: str | None = None
    """The server's key. Default: $BASCULE_API_KEY."""
    json: Path | None = None
    """Write the report to this file too."""

    def run(self) -> int | None:
        if self.replay and self.to_dataset is not None:
            raise ValueError("--replay and --to-dataset read the log for different ends: give one of them")
        if self.replay and Path(self.policy).is_dir():
            raise ValueError(f"{self.policy} is a folder: --replay takes the log of a run (vla control --log FILE)")
        if self.replay or self.to_dataset is not None:
            option = "--replay" if self.replay else "--to-dataset"
            refuse_others(
                self, option, "which reads a log alone, with the settings of its run", "policy", "replay", "to_dataset"
            )
        if self.to_dataset is not None:
            from policies.control.flight_log import changed, pictures_lost
            from policies.lerobot.recording import logs_of, to_dataset

            logs = logs_of(Path(self.policy))
            runs = "the run" if len(logs) == 1 else f"{len(logs)} runs"
            print(f"{to_dataset(logs, self.to_dataset)}: a LeRobotDataset of {runs}")
            return max(_tell_incomplete(log, pictures_lost, changed) for log in logs)
        if self.replay:
            return self._replay()
        from contextlib import ExitStack, nullcontext
        from functools import partial

        from policies.control.controller import control
        from policies.control.flight_log import BlackBox, LogIncomplete
        from policies.teleop.keys import Key
        from vla.core.compatibility import fitted
        from vla.core.config import save_json
        from vla.runtime.console import interrupts_noted, say

        guards = self._guards()
        self._check()
        if self.account_s is not None:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("policies.control").setLevel(logging.INFO)
        unlogged: LogIncomplete | None = None
        with ExitStack() as open_ones:
            interrupted = open_ones.enter_context(interrupts_noted())
            teleop = teleop_of(self)  # before the policy: what is wrong with it is known in a moment
            arm = arm_of(self)
            policy = self._policy()
            open_ones.callback(policy.close)
            others = [replace(self, account_s=None)._policy() for _ in range(self.in_flight - 1)]
            for other in others:
                open_ones.callback(other.close)
            robot = self._robot(policy, arm)
            open_ones.callback(_let_go, robot)
            fits = partial(fitted, env=robot, where="robot", rates=False, ranges=False)
            policy, *others = fits(policy, say=say), *(fits(one, say=lambda _: None) for one in others)
            self._refuse_following(robot)
            config = self._config(guards, policy)
            if self.dry_run and arm is not None:
                self._rehearse(policy, robot, config)
                return 0
            person = person_of(self, teleop, robot, guards)
            keys = {} if person is None else {"others": person.key}
            pressed = Key(open_ones, **keys) if self.estop_key else lambda: False
            try:
                with nullcontext() if self.log is None else BlackBox(self.log) as box:
                    report = control(
                        robot, policy, config, *others, log=box, pressed=pressed, person=person, interrupted=interrupted
                    )
            except LogIncomplete as error:  # raised when the run is over: its report comes first
                unlogged = error
        scenes = {name: getattr(robot, name) for name in ("scenes", "successes") if hasattr(robot, name)}
        if self.json is not None:
            save_json(self.json, {"report": report, "success": getattr(robot, "success", None), **scenes})
        print(report.summary(scenes) + ("\ndry run: the robot was sent nothing" if self.dry_run else ""))
        if unlogged is not None:
            raise unlogged
        return 0 if report.good else 1

    def _check(self) -> None:
        """Checks that need no policy. ValueError naming the flag."""
        from envs.registry import load_suite
        from policies.control.config import check_estop_file, ticks_per_step

        check_numbers(
            self, seed=(0, 2**53), hz=(0.1, 100_000), duration_s=(0.01, 1e9), policy_hz=(0.01, 100_000),
            n_action_steps=(1, 10_000), blend_steps=(0, 10_000), in_flight=(1, 64), max_observation_age_s=(0.001, 1e6),
            max_action_age_s=(0.001, 1e6), give_up_s=(0, 1e6), stop_s=(0, 1e6), server_timeout_s=(0.001, 1e6),
            image_size=(8, 4096), account_s=(0.01, 1e6), follow_fraction=(0.001, 1), follow_s=(0.001, 1e6),
        )  # fmt: skip
        check_file("--json", self.json)
        check_estop_file(self.estop_file)
        if self.robot is None or ":" not in self.robot:
            ticks_per_step(self.hz or 50.0, self.policy_hz)
        if self.in_flight > 1 and "://" not in self.policy:
            raise ValueError(
                f"--in-flight {self.in_flight} is of connections to a server (ws://...): a policy on this machine "
                "handles one request at a time"
            )
        if "://" in self.policy and self.embodiment is not None:
            raise ValueError(f"--embodiment {self.embodiment} goes to `vla serve`, which loads the policy")
        if "://" not in self.policy:
            refuse_idle(self, f"with {self.policy}, which is no server", "api_key")
        if self.join != "blend":
            refuse_idle(self, f"with --join {self.join}", "blend_steps")
        if self.robot is not None:
            refuse_idle(
                self, f"with --robot {self.robot}: it is of the simulated one", "suite", "seed", "image_size", "endless"
            )
        if self.robot is None:
            load_suite(self.suite)
            for name in ("limits", "switches", "robot_args"):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} is of a LeRobot robot: name its type with --robot")
        elif ":" in self.robot:
            for name, said in (("task", "instruction"), ("limits", "action_spec"), ("switches", "action_spec")):
                if getattr(self, name):
                    raise ValueError(f"--{name} is not for a robot class of your own: {self.robot} says it by {said}")
        elif not (self.task or "").strip():
            raise ValueError(f"--robot {self.robot} needs --task: say in words what the robot is to do")
        if self.teleop is None:
            refuse_idle(self, "without --teleop, by which somebody takes over", "teleop_args", "take_over")
        elif self.take_over == "key" and not self.estop_key:
            raise ValueError("--take-over key listens to the terminal's keys: leave out --no-estop-key")

    def _refuse_following(self, robot: Any) -> None:
        """ValueError for flags on positions that do not follow, where none can fail to."""
        flags = "follow_fraction", "follow_s"
        if "position" not in robot.kinds:
            refuse_idle(self, "with a robot that has no positions, which alone can fail to follow", *flags)
        if self.dry_run:
            refuse_idle(self, "beside --dry-run: a robot that is sent nothing follows nothing", *flags)

    def _guards(self) -> GuardConfig:
        from policies.control.config import limits_by_name
        from policies.control.guards import GuardConfig

        return from_flags(GuardConfig, self, workspace=limits_by_name(self.workspace, "--workspace"))

    def _config(self, guards: GuardConfig, policy: Any) -> ControlConfig:
        from policies.control.controller import ControlConfig
        from vla.core.grounding import threshold_of

        spec = policy.spec.action_spec
        # a stock openpi server does not say at which rate its actions were meant
        hz = self.policy_hz or (None if spec is None else spec.control_hz or None)
        steps = self.n_action_steps or policy.spec.n_action_steps
        below = threshold_of(policy) if self.hold_ungrounded else None
        return from_flags(ControlConfig, self, policy_hz=hz, n_action_steps=steps, guards=guards, hold_below=below)

    def _policy(self) -> Any:
        from vla.processing.cameras.camera_map import CameraMap

        cameras = CameraMap.parse(self.cameras)
        if "://" in self.policy:
            from policies.serving.narrated_client import NarratedClient

            key = self.api_key or os.environ.get("BASCULE_API_KEY")
            try:
                return NarratedClient(self.policy, api_key=key, account_s=self.account_s, cameras=cameras)
            except RuntimeError as error:  # what answers there is not what we can talk to
                raise ConnectionError(str(error)) from error
        from functools import partial

        from policies.control.policy_process import PolicyProcess
        from policies.load import checkpoint, local_policy

        if re.fullmatch(r"[\w.-]+:\d+(/\S*)?", self.policy) and not Path(self.policy).exists():
            raise ValueError(f"there is no checkpoint at '{self.policy}'; for a server, write ws://{self.policy}")
        make = partial(local_policy, checkpoint(Path(self.policy)), self.embodiment, cameras)
        return PolicyProcess(make, account_s=self.account_s)

    def _robot(self, policy: Any, arm: Any) -> Any:
        if self.robot is not None:
            return robot_of(self, policy, arm, instruction=self.task or "")
        from functools import partial

        from envs.backends.worker import worker_environment
        from envs.make import worlds_class
        from envs.registry import load_suite
        from envs.sim.render_options import pictures_for
        from policies.control.realtime_sim import LiveWorld
        from policies.teleop.simulated import CORRECTOR

        names = worlds_class(load_suite(self.suite)).proprio_names
        make = corrected_world if self.teleop == CORRECTOR else one_world
        with worker_environment():
            return LiveWorld(
                partial(make, self.suite, self.image_size or pictures_for(policy)),
                control_hz=self.hz or 50.0,
                seed=self.seed,
                task=self.task,
                proprio_names=names,
                endless=self.endless,
            )

    def _rehearse(self, policy: Any, robot: Any, config: Any) -> None:
        """Say what a run would do with a robot that is not connected."""
        from policies.control.config import check_limits
        from policies.control.guards import Governor

        refuse_idle(self, f"with --dry-run of --robot {self.robot}, which is not connected", "log", "json")
        spec = robot.action_spec
        Governor(
            config.guards, spec, robot.kinds, rest=(0.0,) * spec.dim, proprio_names=robot.proprio_names
        )  # refuses limits on what the robot does not have
        check_limits(config.guards, spec, robot.kinds)
        fitted = "checked against" if policy.spec.action_spec is not None else "not known from the server, played by"
        print(
            f"dry run: {self.robot} was not connected, nothing was sent; the policy's actions were {fitted} the robot's"
        )
        print(f"cameras: {', '.join(robot.cameras) or 'none'}; state: {', '.join(robot.proprio_names)}")
        print(
            f"{spec.control_hz:g} commands a second, from actions meant for {config.policy_hz or spec.control_hz:g} Hz:"
        )
        for name, kind, low, high in zip(spec.names, robot.kinds, spec.low, spec.high, strict=True):
            speed = config.guards.velocity.get(name)
            limit = "" if speed is None else f", at most {speed:g} a second"
            print(f"  {name}: {kind}, {low:g} to {high:g}{limit}")

    def _replay(self) -> int:
        from policies.control.flight_log import replay

        pairs = replay(Path(self.policy))
        differ = [i for i, (logged, again) in enumerate(pairs) if logged != again]
        first = f"\nfirst difference: tick {differ[0] + 1}" if differ else ""
        print(f"{len(pairs)} ticks, {len(pairs) - len(differ)} decided as logged{first}")
        return _tell_incomplete(Path(self.policy)) or (1 if differ else 0)

    def kept(self) -> str:
        return "the robot was let go" + (
            f"; its log is in {self.log}" if self.log is not None and self.log.exists() else ""
        )


def _tell_incomplete(log: Path, *others: Callable[[Path], str | None]) -> int:
    """A line on stderr for what the log lacks of its run, and for what the `others` find; the exit code."""
    from policies.control.flight_log import incomplete
    from vla.runtime.console import say

    problems = [problem for look in (incomplete, *others) if (problem := look(log))]
    for problem in problems:
        say(f"vla: warning: {problem}")
    return 1 if problems else 0


def one_world(suite: str, image_size: int) -> Any:
    """One world of a suite, in this process."""
    from envs.make import worlds_class
    from envs.registry import load_suite
    from envs.sim.render_options import RenderOptions

    spec = load_suite(suite)
    return worlds_class(spec)(spec, 1, render=RenderOptions(image_size))


def corrected_world(suite: str, image_size: int) -> Any:
    """The same, with the scripted corrector beside it."""
    from envs.experts.corrector import CorrectedWorlds

    return CorrectedWorlds(one_world(suite, image_size))


def _let_go(robot: Any) -> None:
    """Once more, for a robot that never came to be driven; how it fails was said by whoever drove it."""
    from policies.control.watched_robot import NOT_LET_GO

    try:
        with contextlib.suppress(Exception):
            robot.disconnect()
    except KeyboardInterrupt as ended:
        raise KeyboardInterrupt(NOT_LET_GO) from ended
