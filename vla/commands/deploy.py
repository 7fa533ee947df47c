"""Commands that put a policy to work."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from vla.commands.base import Command, load_policy


@dataclass(frozen=True)
class Serve(Command):
    """Serve a checkpoint to robot controllers over a websocket (openpi's protocol)."""

    policy: Positional[Path]
    """A checkpoint folder."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    api_key: str | None = None
    """What clients must send. Needed to listen to other machines. Default: $BASCULE_API_KEY."""

    def run(self) -> None:
        from vla.catalogue import checkpoint

        folder = checkpoint(self.policy)
        from policies.server import PolicyServer

        policy = load_policy(folder)
        server = PolicyServer(
            policy,
            action_spec=policy.action_spec,
            cameras=policy.cameras,
            host=self.host,
            port=self.port,
            # A key given as a flag can be read by every user of the machine; one in the environment cannot.
            api_key=self.api_key or os.environ.get("BASCULE_API_KEY"),
            proprio_dim=policy.processor.config.proprio_dim,
            metadata={"policy": folder.name},
        )
        # On stdout and flushed: programs that start a server wait for this line.
        server.run(on_ready=lambda: print(f"serving {folder} at {server.uri} (Ctrl-C ends)", flush=True))

    def kept(self) -> str:
        return "the server has stopped"


@dataclass(frozen=True)
class Control(Command):
    """Drive the simulated robot in real time: guards, e-stop file, black-box log. Policy: a checkpoint or a server."""

    policy: Positional[str]
    """A checkpoint folder, or ws://HOST:PORT of a `vla serve`."""
    suite: str = "tabletop-pick"
    """The simulated robot's world: one of `vla list suites`."""
    seed: int = 0
    """Of the scene."""
    task: str | None = None
    duration_s: float = 20.0
    """The run also ends when the task does."""
    n_action_steps: int | None = None
    """Ask again after this many actions of a chunk; by default after half of it."""
    blend_steps: int = 2
    """Actions over which a new chunk takes over from the old one."""
    asynchronous: bool = True
    """Compute the next chunk while the current one is played."""
    dry_run: bool = False
    """Do everything but send actions to the robot."""
    estop_file: Path | None = None
    """The robot is let go as soon as this file exists."""
    log: Path | None = None
    """Black box: one JSON line per tick. `--replay` decides them again."""
    replay: bool = False
    """Run no robot: POLICY is a log; are its decisions what the guards decide now?"""
    velocity: dict[str, float] = field(default_factory=dict)
    """Limits: component and speed, action units per second, e.g. dx 12 dy 12."""
    acceleration: dict[str, float] = field(default_factory=dict)
    """Limits: component and change of speed, action units per second squared."""
    workspace: tuple[str, ...] = ()
    """Limits: NAME:LOW:HIGH of measured state, e.g. grip_z:0.005:0.4."""
    max_observation_age_s: float = 0.5
    max_action_age_s: float = 2.0
    give_up_s: float = 3.0
    """A hold that lasts longer becomes a slow stop."""
    stop_s: float = 0.5
    """Length of a slow stop."""
    server_timeout_s: float = 1.0
    """An answer that takes longer counts as a dead server."""
    image_size: int = 84
    api_key: str | None = None
    """Of the server. Default: $BASCULE_API_KEY."""
    json: Path | None = None
    """Write the report here, too."""

    def run(self) -> int | None:
        if self.replay:
            return self._replay()
        from envs import make_vec
        from envs.worlds import PROPRIO_NAMES
        from policies.blackbox import BlackBox
        from policies.controller import ControlConfig, control
        from policies.guards import GuardConfig
        from policies.robots import WorldRobot
        from vla.config import save_json

        guards = GuardConfig(
            max_observation_age_s=self.max_observation_age_s,
            max_action_age_s=self.max_action_age_s,
            give_up_s=self.give_up_s,
            stop_s=self.stop_s,
            velocity=self.velocity,
            acceleration=self.acceleration,
            workspace=dict(map(_range, self.workspace)),
        )
        config = ControlConfig(
            duration_s=self.duration_s,
            n_action_steps=self.n_action_steps,
            blend_steps=self.blend_steps,
            asynchronous=self.asynchronous,
            dry_run=self.dry_run,
            estop_file=self.estop_file,
            server_timeout_s=self.server_timeout_s,
            guards=guards,
        )
        policy = self._policy()
        env = make_vec(self.suite, 1, num_workers=1, image_size=self.image_size)
        box = None
        try:
            robot = WorldRobot(env, seed=self.seed, task=self.task, proprio_names=PROPRIO_NAMES)
            _check_actions(policy, robot.action_spec)
            box = None if self.log is None else BlackBox(self.log)
            report = control(robot, policy, config, log=box)
        finally:
            env.close()
            if box is not None:
                box.close()
        if self.json is not None:
            save_json(self.json, {"report": report, "success": robot.success})
        tripped = ", ".join(f"{name} {count}" for name, count in report.guards.items()) or "none"
        print(
            f"{report.ended} after {report.ticks} ticks ({report.seconds:.1f} s), {report.overruns} overruns, "
            f"success: {'yes' if robot.success else 'no'}"
        )
        print(
            f"guards: {tripped}; {report.answers} answers, p50 {report.latency_ms['p50']:.1f} ms, "
            f"p99 {report.latency_ms['p99']:.1f} ms"
        )
        return 0 if report.ended in ("done", "time") else 1

    def _policy(self) -> Any:
        if "://" in self.policy:
            from policies.client import PolicyClient

            return PolicyClient(self.policy, api_key=self.api_key or os.environ.get("BASCULE_API_KEY"))
        from vla.catalogue import checkpoint

        return load_policy(checkpoint(Path(self.policy)))

    def _replay(self) -> int:
        from policies.blackbox import replay

        pairs = replay(Path(self.policy))
        differ = [i for i, (logged, again) in enumerate(pairs) if logged != again]
        print(f"{len(pairs)} ticks, {len(pairs) - len(differ)} decided as logged")
        if differ:
            print(f"first difference: tick {differ[0] + 1}")
        return 1 if differ else 0

    def kept(self) -> str:
        return "the robot was let go" + ("" if self.log is None else f"; its log is in {self.log}")


@dataclass(frozen=True)
class LeRobot(Command):
    """Turn a checkpoint into one that LeRobot's tools load (--policy.path), or one of theirs into ours."""

    checkpoint: Positional[Path]
    """A folder of ours, or LeRobot's `pretrained_model` folder of a bascule policy."""
    out: Positional[Path]
    """Where the other one goes: a folder that is not there yet, or empty."""

    def run(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is not empty: choose another folder")
        from policies.lerobot.exchange import from_lerobot, is_lerobot, to_lerobot

        if is_lerobot(self.checkpoint):
            print(f"{from_lerobot(self.checkpoint, self.out)}: a checkpoint of ours, for vla eval, serve, rl")
        else:
            print(f"{to_lerobot(self.checkpoint, self.out)}: for LeRobot's tools, --policy.path={self.out}")


def _range(text: str) -> tuple[str, tuple[float, float]]:
    """NAME:LOW:HIGH."""
    try:
        name, low, high = text.split(":")
        bounds = float(low), float(high)
    except ValueError:
        raise ValueError(f"a workspace limit is NAME:LOW:HIGH, got {text!r}") from None
    return name, bounds


def _check_actions(policy: Any, robot: Any) -> None:
    """ValueError unless the policy's actions are the robot's: the same names in the same order, the same rate."""
    spec = policy.action_spec
    if spec is None:
        return  # a stock openpi server does not say
    if tuple(spec.names) != tuple(robot.names):
        raise ValueError(f"the policy acts on {', '.join(spec.names)}, the robot on {', '.join(robot.names)}")
    if spec.control_hz and spec.control_hz != robot.control_hz:
        raise ValueError(f"the policy was trained at {spec.control_hz:g} Hz, the robot runs at {robot.control_hz:g} Hz")
