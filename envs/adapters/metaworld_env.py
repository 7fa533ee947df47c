"""Meta-World MT50 v3 as environments: fifty Sawyer tasks, instructions, two cameras, rendered once per chunk.

The only file that imports metaworld (extra `metaworld`). Physics, randomisation and success are Meta-World's own, set
up as published VLA evaluations do (LeRobot's `MetaworldEnv`): objects and goals drawn anew from the seed, actions
clipped to [-1, 1], an episode ends at its first success or after 500 steps, proprio is hand position and finger
opening, camera `corner2` is moved and shown turned by 180 degrees. Ours are a second camera on the hand (`gripperPOV`),
so that policies of two cameras find both, the words, and the tuned renderer: without its shadow pass a pixel is 9
(`corner2`) and 15 (`gripperPOV`) of 255 off on average, mostly darker.

Suites: `metaworld-mt50`; the published difficulty groups `metaworld-easy`, `-medium`, `-hard`, `-very-hard`; and every
task alone, e.g. `metaworld-push`. In a suite of n tasks seed s plays task s mod n, so any n consecutive seeds play each
task once: `--episodes 500` on mt50 is the published ten per task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode, AdapterWorlds, require
from envs.adapters.metaworld_suites import CAMERAS, MetaworldSuite, phrasings_of, task_names
from envs.seeds import Stream
from envs.sim.base_worlds import Frames
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import ActionSpec

_CORNER2_POS = (0.75, 0.075, 0.7)
"""Where the published data has `corner2`: nearer to the table than the package has it (m, world)."""
PROPRIO_NAMES = ("hand_x", "hand_y", "hand_z", "finger_opening")
"""Metres; 0 (closed) .. 1 (open)."""
PRIVILEGED_DIM = 40
"""Meta-World's own 39-dimensional observation (hand and objects now and one step ago, goal), then the task's index."""
ACTION_SPEC = ActionSpec(names=("dx", "dy", "dz", "gripper"), low=(-1.0,) * 4, high=(1.0,) * 4, control_hz=80.0)
"""Displacements of the commanded hand position, 1 being 1 cm; gripper force, +1 closes."""

_FINGERS = {"leftclaw": "left", "leftpad": "left", "rightclaw": "right", "rightpad": "right"}
"""Bodies of the gripper, by side."""


def make_environment(task: str, **arguments: Any) -> Any:
    """Meta-World's environment of a task, which draws objects and goal at every reset; `arguments` go to its class."""
    require("metaworld")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[f"{task}-v3"](**arguments)
    # What MT1's `set_task` does, without drawing a hundred tasks first: the goal is observable. Then LeRobot's
    # choice: a fresh draw at every reset, from the environment's own generator.
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    env.model.camera("corner2").pos[:] = _CORNER2_POS
    return env


def scripted_policy(task: str) -> Any:
    """Meta-World's own scripted policy of a task."""
    require("metaworld")
    from metaworld.policies import ENV_POLICY_MAP

    # They ask for more than [-1, 1] by design, and would say so at every step.
    warnings.filterwarnings("ignore", message="Constant", module=r"metaworld\.policies")
    return ENV_POLICY_MAP[f"{task}-v3"]()


class MetaworldWorlds(AdapterWorlds):
    """`num_worlds` Meta-World episodes in this process.

    An environment of each task is compiled when a world first needs it and kept for the next (0.3-0.8 s and about 30 MB
    each): a process that has played all of MT50 holds about 2 GB.
    """

    proprio_names = PROPRIO_NAMES
    turned_views = (0,)

    def __init__(
        self,
        suite: MetaworldSuite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        frames_out: Frames | None = None,
    ) -> None:
        require("metaworld")
        super().__init__(
            suite, num_worlds, action_spec=ACTION_SPEC, cameras=CAMERAS, privileged_dim=PRIVILEGED_DIM,
            phrasings=phrasings, render=render, frames_out=frames_out,
        )  # fmt: skip
        self._envs: list[Any] = [None] * num_worlds
        self._idle: dict[str, list[Any]] = {}
        self._state = np.zeros((num_worlds, PRIVILEGED_DIM - 1))

    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        task = task or self.suite.tasks[seed % len(self.suite.tasks)]
        if self._envs[i] is None or self.episodes[i].task != task:
            if self._envs[i] is not None:
                self._idle.setdefault(self.episodes[i].task, []).append(self._envs[i])
            idle = self._idle.get(task)
            self._envs[i] = idle.pop() if idle else make_environment(task)
        self._envs[i].seed(seed)
        self._state[i] = self._envs[i].reset()[0]
        rng = np.random.default_rng([seed, Stream.WORDS])
        words = phrasings_of(task)[self.phrasings]
        text = words[rng.integers(len(words))]
        rivals = self.suite.tasks if len(self.suite.tasks) > 1 else task_names()
        rival = rivals[(rivals.index(task) + 1 + int(rng.integers(len(rivals) - 1))) % len(rivals)]
        return AdapterEpisode(seed, task, text, text, phrasings_of(rival)[self.phrasings][0])

    def _step(self, i: int, action_A: NDArray[np.float64]) -> bool:
        self._state[i], _, _, _, info = self._envs[i].step(action_A.astype(np.float32))
        return bool(info["success"] > 0)

    def _read(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        state = self._state[i]
        return state[: len(PROPRIO_NAMES)], np.append(state, task_names().index(self.episodes[i].task))

    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        return self.episodes[i].task, self._envs[i].model, self._envs[i].data

    def grip(self, i: int) -> NDArray[np.float64]:
        """(3,) point between the fingers of environment `i`, world frame, m."""
        return np.array(self._envs[i].tcp_center)

    def gripping(self, i: int) -> bool:
        """True while both fingers of environment `i` touch one movable thing."""
        model, data = self._envs[i].model, self._envs[i].data
        touched: dict[str, set[int]] = {"left": set(), "right": set()}
        for pair in model.geom_bodyid[data.contact.geom]:
            for finger, other in (pair, pair[::-1]):
                side = _FINGERS.get(model.body(finger).name)
                if side is not None and model.body_weldid[other] != 0:
                    touched[side].add(int(model.body_rootid[other]))
        robot = int(model.body_rootid[model.body("hand").id])
        return bool((touched["left"] & touched["right"]) - {robot})

    def close(self) -> None:
        """Free the graphics context and Meta-World's environments."""
        super().close()
        self._envs, self._idle = [None] * self.num_envs, {}


class DefaultPush:
    """Meta-World's push stepped and rendered as it comes, our two cameras after every step: a baseline."""

    action_dim = ACTION_SPEC.dim

    def __init__(self, image_size: int = 84) -> None:
        self._env = make_environment("push", render_mode="rgb_array", width=image_size, height=image_size)
        self._env.max_path_length = 10**9  # it refuses to step on after 500
        self._env.reset()
        self._cameras = [self._env.model.camera(name).id for name in CAMERAS.values()]
        self._drawn = 0

    def step(self, action_A: NDArray[np.float64]) -> list[NDArray[np.uint8]]:
        """One control step, then one frame per camera."""
        self._env.step(np.asarray(action_A, np.float32))
        frames = []
        for camera in self._cameras:
            self._env.mujoco_renderer.camera_id = camera
            frames.append(self._env.render())
            self._drawn += int(np.ptp(frames[-1]) > 0)
        return frames

    def frames(self) -> int:
        """Number of frames rendered that show anything."""
        return self._drawn

    def close(self) -> None:
        """Close Meta-World's environment."""
        self._env.close()


def default_push(image_size: int = 84) -> tuple[DefaultPush, Callable[[], int]]:
    """The baseline and its counter of frames, as `envs.adapters.robosuite_env.default_lift` returns them."""
    env = DefaultPush(image_size)
    return env, env.frames
