"""LIBERO as a client of `vla serve`: plays a task suite in LIBERO's own environment and counts successes.

Runs beside the policy, not inside it: LIBERO wants robosuite 1.4 and its own assets (see README.md here), so this file
asks nothing of Bascule but the torch-free client, and runs on Python 3.10 with numpy 1. Protocol as in openpi's
evaluation: ten idle steps while objects settle, both views turned by 180 degrees, state = hand position, axis-angle and
both fingers, a new decision every `n_action_steps`. Pictures are drawn at decisions only: several times faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout: nothing to install here
from policies.serving.client import PolicyClient  # noqa: E402

HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps per episode, a little over the longest demonstration of each suite."""
ACTION_DIM = 7
IDLE_ACTION = (0.0,) * 6 + (-1.0,)
"""Stand still, fingers open."""
SETTLE_STEPS = 10
_CAMERAS = ("agentview", "robot0_eye_in_hand")
_OPENPI_KEYS = {"scene": "observation/image", "wrist": "observation/wrist_image", "state": "observation/state"}


class Simulation(Protocol):
    """The part of LIBERO's environment that an episode uses; `DrawnAtDecisions` is one."""

    def seed(self, seed: int) -> object: ...
    def reset(self) -> object: ...
    def set_init_state(self, state: Any) -> Mapping[str, Any]: ...
    def step(self, action: Sequence[float]) -> tuple[Mapping[str, Any], float, bool, Mapping[str, Any]]: ...
    def look(self, raw: Mapping[str, Any]) -> Mapping[str, Any]: ...
    def close(self) -> object: ...


class Client(Protocol):
    """The part of `policies.serving.client.PolicyClient` that is used here.

    openpi's `WebsocketClientPolicy` needs `metadata` set beside.
    """

    metadata: dict[str, Any]

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """One LIBERO task: its sentence, its fixed initial states, and how to build it."""

    name: str
    instruction: str
    init_states: Sequence[Any]
    make: Callable[[], Simulation]


@dataclass(frozen=True)
class Rules:
    """How episodes are played."""

    horizon: int
    n_action_steps: int = 8
    image_size: int = 224
    seed: int = 7


def wilson95(successes: int, episodes: int) -> tuple[float, float]:
    """95% interval of a success probability from k of n. Wilson 1927. (`envs.evaluation.evaluate` needs what is not
    here.)"""
    if episodes == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / episodes
    centre = p + z * z / (2 * episodes)
    half = z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if successes == 0 else low), (1.0 if successes == episodes else high)


def axis_angle(quat_xyzw: np.ndarray) -> np.ndarray:
    """Rotation vector (3,) of a unit quaternion, angle in [0, 2 pi] as w says, as the LIBERO datasets have it."""
    w = float(np.clip(quat_xyzw[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quat_xyzw[:3]) * (2.0 * math.acos(w) / sine)


def resized(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the whole image, bilinear, centred on black."""
    height, width = image_HWC.shape[:2]
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = Image.fromarray(image_HWC).resize(inner, resample=Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(canvas)


def observation_keys(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Where this server wants the scene view, the wrist view and the state.

    Ours says so when a client connects (the first camera is the scene, the second the wrist); a server that says
    nothing is openpi's own. ValueError for a policy that LIBERO cannot feed or that cannot steer LIBERO's arm.
    """
    spec = metadata.get("action_spec")
    if spec is not None and len(spec["names"]) != ACTION_DIM:
        raise ValueError(f"LIBERO takes {ACTION_DIM} action components, this policy has {len(spec['names'])}")
    cameras = metadata.get("cameras")
    if cameras is None:
        return dict(_OPENPI_KEYS)
    if not 1 <= len(cameras) <= 2:
        raise ValueError(f"LIBERO has a scene and a wrist view, this policy wants {len(cameras)}: {', '.join(cameras)}")
    if len(cameras) == 2 and _on_the_hand(cameras[0]) and not _on_the_hand(cameras[1]):
        cameras = cameras[::-1]  # the dataset named its wrist first
    views = dict(zip(("scene", "wrist"), (f"images/{camera}" for camera in cameras)))  # noqa: B905 (one may be left)
    return {**views, "state": "state"}


def _on_the_hand(camera: str) -> bool:
    return any(word in camera.lower() for word in ("wrist", "hand", "image2"))


def observe(raw: Mapping[str, Any], instruction: str, keys: Mapping[str, str], size: int) -> dict[str, Any]:
    """The message for one decision from LIBERO's observation."""
    views = {"scene": raw["agentview_image"], "wrist": raw["robot0_eye_in_hand_image"]}
    # LIBERO's cameras hang upside down, and its published datasets are turned like this.
    message: dict[str, Any] = {
        keys[name]: resized(np.ascontiguousarray(np.asarray(view)[::-1, ::-1]), size)
        for name, view in views.items()
        if name in keys
    }
    hand = (raw["robot0_eef_pos"], axis_angle(np.asarray(raw["robot0_eef_quat"])), raw["robot0_gripper_qpos"])
    message[keys["state"]] = np.concatenate(hand).astype(np.float32)
    message["prompt"] = instruction
    return message


def play(
    simulation: Simulation, init_state: Any, instruction: str, client: Client, how: Rules
) -> tuple[bool, int, int]:
    """One episode: (success, control steps, decisions)."""
    keys = observation_keys(client.metadata)
    simulation.reset()
    raw = simulation.set_init_state(init_state)
    for _ in range(SETTLE_STEPS):
        raw, _, _, _ = simulation.step(list(IDLE_ACTION))
    steps = decisions = 0
    while steps < how.horizon:
        chunk = np.asarray(client.infer(observe(simulation.look(raw), instruction, keys, how.image_size))["actions"])
        if chunk.ndim != 2 or chunk.shape[1] != ACTION_DIM or len(chunk) < 1:
            raise ValueError(f"LIBERO takes actions (C, {ACTION_DIM}), this policy gave {chunk.shape}")
        decisions += 1
        for action in chunk[: min(how.n_action_steps, how.horizon - steps)]:
            raw, _, done, _ = simulation.step(action.tolist())
            steps += 1
            if done:  # LIBERO ends an episode only by success
                return True, steps, decisions
    return False, steps, decisions


def evaluate(
    tasks: Iterable[Task],
    client: Client,
    how: Rules,
    *,
    episodes_per_task: int,
    on_episode: Callable[[str, int, bool], None] = lambda task, episode, success: None,
    on_task: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Every task `episodes_per_task` times, initial states in order. The fields are those of `vla eval --json`.

    `on_task` gets the report so far after every task. ValueError before the first episode for a task with too few
    initial states or a sentence that the policy does not read.
    """
    tasks = list(tasks)
    for task in tasks:
        if episodes_per_task > len(task.init_states):
            raise ValueError(f"{task.name} has {len(task.init_states)} initial states, fewer than {episodes_per_task}")
    check_sentences([task.instruction for task in tasks], client, how.image_size)
    per_task: dict[str, dict[str, Any]] = {}
    won_steps, steps, decisions = 0, 0, 0

    def report() -> dict[str, Any]:
        total = sum(task["successes"] for task in per_task.values())
        return {
            "policy": str(client.metadata.get("policy", "served")),
            "backend": "libero",
            **count(total, episodes_per_task * len(per_task)),
            "mean_steps": won_steps / total if total else 0.0,
            "per_task": dict(per_task),
            "tasks_left": len(tasks) - len(per_task),
            "seeds": [how.seed, how.seed],
            "deterministic": True,
            "horizon": how.horizon,
            "n_action_steps": how.n_action_steps,
            "decisions": decisions,
            "control_steps": steps,
            "controls": {},
            "machine": platform.platform(),
            "initial_states": "published",
            **versions(),
        }

    for task in tasks:
        simulation, successes = task.make(), 0
        try:
            simulation.seed(how.seed)  # it moves objects even when the initial state is given
            for episode in range(episodes_per_task):
                won, taken, asked = play(simulation, task.init_states[episode], task.instruction, client, how)
                successes, steps, decisions = successes + won, steps + taken, decisions + asked
                won_steps += taken if won else 0
                on_episode(task.name, episode, won)
        finally:
            simulation.close()
        per_task[task.name] = count(successes, episodes_per_task)
        on_task(report())
    return report()


def check_sentences(instructions: Iterable[str], client: Client, image_size: int) -> None:
    """Ask for one decision per sentence, from black pictures: a sentence that is too long fails now, not in an hour."""
    black = np.zeros((image_size, image_size, 3), np.uint8)
    raw = {
        "agentview_image": black,
        "robot0_eye_in_hand_image": black,
        "robot0_eef_pos": np.zeros(3),
        "robot0_eef_quat": np.array([0.0, 0.0, 0.0, 1.0]),
        "robot0_gripper_qpos": np.zeros(2),
    }
    keys = observation_keys(client.metadata)
    for instruction in dict.fromkeys(instructions):
        client.infer(observe(raw, instruction, keys, image_size))


def versions() -> dict[str, str]:
    """Versions of what simulates: LIBERO's pictures depend on MuJoCo's."""
    found = {}
    for package in ("mujoco", "robosuite"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def count(successes: int, episodes: int) -> dict[str, Any]:
    rate = successes / episodes if episodes else 0.0
    interval = list(wilson95(successes, episodes))
    return {"successes": successes, "episodes": episodes, "success_rate": rate, "wilson95": interval}


class DrawnAtDecisions:
    """LIBERO's environment, which would draw both cameras at every control step, drawing when it is looked at."""

    def __init__(self, env: Any, size: int) -> None:
        self._env, self._size = env, size
        self.seed, self.reset, self.step, self.close = env.seed, env.reset, env.step, env.close
        self.set_init_state = env.set_init_state
        for camera in _CAMERAS:
            env.env._observables[f"{camera}_image"].set_enabled(False)

    def look(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The observation with both pictures of this instant, as LIBERO has them: upside down."""
        size, draw = self._size, self._env.sim.render
        return {**raw, **{f"{name}_image": draw(camera_name=name, width=size, height=size) for name in _CAMERAS}}


def libero_tasks(suite: str, render_size: int, numbers: Sequence[int] = ()) -> list[Task]:
    """The tasks of one of LIBERO's suites, or those of some numbers. Imports LIBERO, and its assets must be there."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    def make(problem: str) -> Simulation:
        env = OffScreenRenderEnv(bddl_file_name=problem, camera_heights=render_size, camera_widths=render_size)
        return DrawnAtDecisions(env, render_size)

    found, tasks = benchmark.get_benchmark_dict()[suite](), []
    if unknown := [k for k in numbers if not 0 <= k < found.n_tasks]:
        raise ValueError(f"{suite} has tasks 0 to {found.n_tasks - 1}, not {unknown[0]}")
    for k in numbers or range(found.n_tasks):
        task = found.get_task(k)
        problem = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
        tasks.append(
            Task(task.name, task.language, found.get_task_init_states(k), lambda problem=problem: make(problem))
        )
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=sorted(HORIZONS), default="libero_spatial")
    parser.add_argument("--tasks", type=lambda text: [int(k) for k in text.split(",")], default=[], help="e.g. 0,3")
    parser.add_argument("--uri", default="ws://127.0.0.1:8000", help="where `vla serve` listens")
    parser.add_argument("--episodes-per-task", type=int, default=10, help="at most 50; published figures use 50 or 10")
    parser.add_argument("--n-action-steps", type=int, default=8, help="control steps executed of each chunk")
    parser.add_argument("--image-size", type=int, default=224, help="of the images sent")
    parser.add_argument("--render-size", type=int, default=256, help="of the images LIBERO draws")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for one decision")
    parser.add_argument("--json", type=Path, help="write the result to this file, after every task")
    args = parser.parse_args()
    if args.n_action_steps < 1 or args.episodes_per_task < 1:
        parser.error("--n-action-steps and --episodes-per-task must be at least 1")
    how = Rules(HORIZONS[args.suite], args.n_action_steps, args.image_size, args.seed)
    key = os.environ.get("BASCULE_API_KEY")
    with PolicyClient(args.uri, api_key=key, timeout_s=args.timeout_s) as client:
        observation_keys(client.metadata)  # a policy that does not fit is told before LIBERO takes its minute to start

        def write(report: dict[str, Any]) -> None:
            if args.json is not None:
                partial = args.json.with_name(args.json.name + ".part")
                partial.write_text(json.dumps({"suite": args.suite, **report}, indent=2) + "\n")
                os.replace(partial, args.json)

        report = evaluate(
            libero_tasks(args.suite, args.render_size, args.tasks),
            client,
            how,
            episodes_per_task=args.episodes_per_task,
            on_episode=lambda task, k, won: print(f"{task} {k}: {'success' if won else 'failure'}", flush=True),
            on_task=write,
        )
    low, high = report["wilson95"]
    print(f"{args.suite}: {report['successes']}/{report['episodes']} [{100 * low:.1f}, {100 * high:.1f}]%")


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"error: {error}; run this with the Python of `./run setup libero`: .venv-libero/bin/python")
    except (ValueError, ConnectionError, RuntimeError) as error:
        sys.exit(f"error: {error}")
