"""`vla experiment franka`: a policy drives the test cell's FR3 through libfranka, one evaluation scene after the other.

The cell runs in a process of its own and judges by its own simulator; the policy runs in another, and the controller's
loop here: the three that `vla franka-cell` and `vla control --robot franka` are. The controller meets the cell over
libfranka's protocol and the cameras' feed only; the operator's requests lay out scenes and end episodes that are over.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bascule.experiments.arms import Report, Row, arms_of, in_turn, kept, played_with

_POLL_S = 0.1
_STARTS_S = 60.0


@dataclass(frozen=True)
class FrankaConfig:
    """Policies in the test cell, through libfranka's own protocol."""

    policy: tuple[Path, ...] = ()
    """Checkpoints, or NAME=CHECKPOINT."""
    suite: str = "tabletop-pick"
    """The suite whose scenes are laid out."""
    episodes: int = 50
    """Evaluation scenes."""
    seed0: int | None = None
    """Seed of the first scene. Default: the suite's first evaluation scene."""
    speeds: tuple[float, ...] = (1.0,)
    """Seconds of the cell's clock per second, an arm for each: below 1 where the machine is too busy for 1 kHz."""
    told: tuple[str, ...] = ("named",)
    """named: the policy is told what is judged. other: it is told to take another object, and must fail."""
    seconds: float = 6.0
    """Longest time of an episode, of the cell's clock."""
    hz: float = 50.0
    """Commands to the arm per second of the cell's clock."""
    look: str = "hulls"
    """How the cell draws the arm: hulls, as in the suites; fr3, by the meshes of the real one."""
    host: str = "127.0.0.1"
    """Address of this machine on which the cell's arm listens."""
    settings: tuple[str, ...] = ()
    """Further fields of the robot, NAME=VALUE, as in --robot-args of `vla control`."""

    def problem(self) -> str | None:
        """The problem with the settings, in words; None for none."""
        if not self.policy:
            return "vla experiment franka needs trained policies: --policy CHECKPOINT [CHECKPOINT ...]"
        if not all(0 < speed <= 1 for speed in self.speeds):
            return f"--speeds must be above 0 and at most 1, got {self.speeds}"
        if any("=" not in text for text in self.settings):
            return "--settings are NAME=VALUE"
        if unknown := set(self.told) - {"named", "other"}:
            return f"--told is named, other or both, got {sorted(unknown)[0]}"
        return None


def franka(config: FrankaConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Success, and how the loops kept their time, of every policy and speed; each row is kept in OUT."""
    started, policies = time.monotonic(), arms_of(config.policy)
    cells = [
        (f"{name}, {speed:g}x{'' if told == 'named' else ', told another'}", Path(folders[0]), speed, told)
        for name, folders in policies.items()
        for speed in config.speeds
        for told in config.told
    ]
    rows: dict[str, Row] = {}
    for name, folder, speed, told in in_turn(cells, lambda cell: cell[0], on_progress):
        file = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        asked = {
            "policy": str(folder), "suite": config.suite, "episodes": config.episodes, "seed0": config.seed0,
            "speed": speed, "told": told, "seconds": config.seconds, "hz": config.hz, "look": config.look,
            "settings": [*config.settings],
        } | played_with(folder, config.suite)  # fmt: skip
        rows[name] = kept(file, asked, partial(_measured, config, folder, speed, told))
    columns = ["at_s", "wrong_object", "aborts", "missed_deadlines", "missed_commands", "clock"]
    seconds = round(time.monotonic() - started, 1)
    return {"experiment": "franka", "seeds": [0], "arms": rows, "columns": columns, "seconds": seconds}


def _measured(config: FrankaConfig, folder: Path, speed: float, told: str) -> Row:
    from envs.registry import load_suite
    from policies.control.policy_process import PolicyProcess
    from policies.load import chosen_embodiment, local_policy

    seed0 = load_suite(config.suite).eval_seed0 if config.seed0 is None else config.seed0
    policy = PolicyProcess(partial(local_policy, folder, chosen_embodiment(folder)))
    try:
        with cell_process(config, speed) as address:
            scenes = [_scene(config, policy, address, speed, told, seed0 + k) for k in range(config.episodes)]
    finally:
        policy.close()
    return _summed(scenes, speed)


@contextmanager
def cell_process(config: FrankaConfig, speed: float) -> Iterator[str]:
    """A cell in a process of its own; the address of its feed. ConnectionError with its words if it does not start."""
    from policies.franka.feed import ask

    command = [
        sys.executable, "-m", "bascule", "franka-cell", "--suite", config.suite, "--host", config.host, "--port", "0",
        "--speed", f"{speed:g}", "--look", config.look,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        timer = threading.Timer(_STARTS_S, process.kill)
        timer.start()
        lines = [process.stdout.readline(), process.stdout.readline()]
        timer.cancel()
        if not lines[1]:
            raise ConnectionError(f"the cell does not start: {' '.join(process.stderr.read().split()[-60:])}")
        address = lines[1].split()[-1]
        yield address
        with contextlib.suppress(OSError, ValueError):
            ask(address, {"do": "stop"})
    finally:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _scene(config: FrankaConfig, policy: Any, address: str, speed: float, told: str, seed: int) -> dict[str, Any]:
    from policies.control.config import ControlConfig
    from policies.control.controller import control
    from policies.control.guards import GuardConfig
    from policies.control.robots import LeRobotRobot, lerobot_robot
    from policies.franka.feed import ask
    from vla.core.compatibility import require_same

    scene = ask(address, {"do": "scene", "seed": seed})
    values = {"host": config.host, "realtime": "false", "feed": address}
    arm = lerobot_robot("franka", values | dict(text.split("=", 1) for text in config.settings))
    words = scene["instruction" if told == "named" else "swapped_instruction"]
    robot = LeRobotRobot(
        arm, instruction=words, control_hz=config.hz * speed,
        limits=dict.fromkeys(arm.action_features, (-1.0, 1.0)), cameras=policy.spec.cameras,
    )  # fmt: skip
    require_same(policy, robot, where="robot", rates=False, ranges=False)
    settings = ControlConfig(
        duration_s=config.seconds / speed,
        policy_hz=policy.spec.action_spec.control_hz * speed,
        n_action_steps=policy.spec.n_action_steps,
        guards=GuardConfig(max_observation_age_s=0.5 / speed, max_action_age_s=2.0 / speed),
    )
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            with contextlib.suppress(OSError, ValueError):
                state = ask(address, {"do": "verdict"})
                robot.done = robot.done or state["success"] or state["wrong_object"]

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        report = control(robot, policy, settings)
    finally:
        over.set()
        watching.join()
    return {"verdict": ask(address, {"do": "verdict"}), "report": report}


def _summed(scenes: Sequence[dict[str, Any]], speed: float) -> Row:
    from envs.evaluation.evaluate import Count

    verdicts, reports = [scene["verdict"] for scene in scenes], [scene["report"] for scene in scenes]
    done = [verdict["at_s"] for verdict in verdicts if verdict["success"]]
    guards: dict[str, int] = {}
    for report in reports:
        for name, count in report.guards.items():
            guards[name] = guards.get(name, 0) + count
    ticks, overruns = sum(report.ticks for report in reports), sum(report.overruns for report in reports)
    commands, missed = (sum(verdict[name] for verdict in verdicts) for name in ("commands", "missed"))
    moved, lost = sum(verdict["seconds"] for verdict in verdicts), sum(verdict["lost_s"] for verdict in verdicts)
    return Count(sum(verdict["success"] for verdict in verdicts), len(verdicts)).to_dict() | {
        "wrong_object": sum(verdict["wrong_object"] for verdict in verdicts),
        "aborts": sum(report.ended not in ("done", "time") for report in reports),
        "at_s": round(float(np.median(done)), 2) if done else None,
        "ticks": ticks,
        "overruns": overruns,
        "missed_deadlines": round(overruns / max(ticks, 1), 5),
        "commands": commands,
        "commands_missed": missed,
        "missed_commands": round(missed / max(commands, 1), 5),
        "clock": round(speed * moved / max(moved + lost, 1e-9), 3),
        "guards": guards,
        "answer_p50_ms": round(float(np.median([report.latency_ms["p50"] for report in reports])), 1),
        "reasons": sorted({f"{name}: {text}" for report in reports for name, text in report.reasons.items()}),
        "scenes": [
            {
                name: verdict[name]
                for name in ("seed", "instruction", "success", "wrong_object", "at_s", "lost_s", "grip")
            }
            for verdict in verdicts
        ],
    }
