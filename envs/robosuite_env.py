"""robosuite tasks as our worlds: Panda, OSC_POSE deltas, instructions, two cameras, rendered once per chunk.

The only file that imports robosuite (extra `robosuite`). Physics, controller, placement and success are robosuite's
own; rendering is ours, since robosuite's multisampled, reflecting frames cost most of its time. Resets are soft: the
compiled model is kept and only the state is drawn anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.language import Phrasings
from vla.config import lookup
from vla.types import ActionChunk, ActionSpec, Observation, StepResult

CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand"}
PROPRIO_NAMES = (
    "eef_x", "eef_y", "eef_z", "eef_qw", "eef_qx", "eef_qy", "eef_qz", "finger_left", "finger_right",
)  # fmt: skip
"""Grip site in the world frame (m, unit quaternion with qx >= 0), finger joints (m)."""
PRIVILEGED_DIM = 12
"""Object (3), its yaw, goal (3), has_goal, object - grip site (3), height above its centre to grasp at."""
CONTROL_HZ = 20.0
MAX_DELTA_M, MAX_DELTA_RAD = 0.05, 0.5
"""What an action component of 1 means."""
ACTION_SPEC = ActionSpec(
    names=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"), low=(-1.0,) * 7, high=(1.0,) * 7, control_hz=CONTROL_HZ
)
"""OSC_POSE deltas in the base frame. Gripper: robosuite's sign, -1 opens and +1 closes."""


@dataclass(frozen=True)
class RobosuiteSuite:
    """One robosuite task as a suite of one task."""

    name: str
    description: str
    environment: str
    horizon: int
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    swapped: str
    """Names an object that is not the one counted; the control of a policy that does not listen."""
    object_pose: Callable[[Any], tuple[NDArray[np.float64], NDArray[np.float64]]]
    """robosuite environment -> (position, quaternion wxyz) of the object to grasp."""
    goal: Callable[[Any], NDArray[np.float64] | None]
    """Where the object's centre is let go, or None when it only has to be lifted."""
    grasp_height_m: float = 0.0
    eval_seed0: int = 5_000_000

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.name.removeprefix("robosuite-"),)


def _body(env: Any, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    body = env.sim.model.body_name2id(name)
    return np.array(env.sim.data.body_xpos[body]), np.array(env.sim.data.body_xquat[body])


def _cube(env: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _body(env, "cube_main")


def _cube_a(env: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _body(env, "cubeA_main")


def _can(env: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _body(env, f"{env.obj_to_use}_main")


def _no_goal(env: Any) -> None:
    return None


def _on_cube_b(env: Any) -> NDArray[np.float64]:
    return _body(env, "cubeB_main")[0] + [0.0, 0.0, 0.047]


def _over_bin(env: Any) -> NDArray[np.float64]:
    return np.array(env.target_bin_placements[env.object_id]) + [0.0, 0.0, 0.09]


SUITES: dict[str, RobosuiteSuite] = {
    suite.name: suite
    for suite in (
        RobosuiteSuite(
            "robosuite-lift", "robosuite Lift: raise the cube 4 cm", "Lift", 100,
            (
                "lift the cube", "pick up the red cube", "raise the cube from the table",
                "grab the cube", "take the block",
            ),
            ("pick the cube up", "take the red block and lift it"), "lift the can", _cube, _no_goal,
        ),
        RobosuiteSuite(
            "robosuite-stack", "robosuite Stack: the red cube on the green one", "Stack", 200,
            (
                "stack the red cube on the green cube", "put the red cube on the green cube",
                "place the red block on the green block", "move the red cube to the green cube",
                "pick up the red cube and put it on the green cube",
            ),
            ("on the green cube put the red cube", "lift the red block and place it on the green block"),
            "put the green cube on the red cube", _cube_a, _on_cube_b,
        ),
        RobosuiteSuite(
            "robosuite-can", "robosuite PickPlaceCan: the can into its bin", "PickPlaceCan", 400,
            (
                "put the can in the bin", "place the can in the bin", "move the can to the bin",
                "pick up the can and put it in the bin", "take the can and place it in the bin",
            ),
            ("lift the can and move it to the bin", "in the bin put the can"),
            "put the cube in the bin", _can, _over_bin,
            grasp_height_m=0.01,
        ),
    )
}  # fmt: skip


def load_robosuite_suite(name: str) -> RobosuiteSuite:
    """The suite called `name`. ValueError with the nearest name if there is none."""
    return lookup(name, SUITES, "suite")


def require_robosuite() -> None:
    """ValueError naming the extra when robosuite is not installed. Cheap: asked before workers start."""
    if find_spec("robosuite") is None:
        raise ValueError("this suite needs robosuite: `./bascule setup robosuite`")


def import_robosuite() -> Any:
    """The package, without its start-up warnings. ValueError naming the extra when it is missing."""
    require_robosuite()
    os.environ.setdefault("MUJOCO_GL", "egl")
    logging.disable(logging.WARNING)
    try:
        import robosuite
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return robosuite


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: seed it, and give it back as it was."""
    saved = np.random.get_state()
    np.random.seed(np.random.SeedSequence([seed, 61]).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(saved)


@dataclass(frozen=True)
class RobosuiteEpisode:
    """What one seed means, beyond the state that robosuite draws."""

    seed: int
    task: str
    instruction: str
    template: str
    swapped_instruction: str


class RobosuiteWorlds:
    """`num_worlds` environments of one robosuite task in this process; the contract of `envs.worlds.Worlds`."""

    proprio_names = PROPRIO_NAMES

    def __init__(
        self,
        suite: RobosuiteSuite,
        num_worlds: int,
        *,
        image_size: int = 84,
        phrasings: Phrasings = "train",
        images_out: np.ndarray | None = None,
    ) -> None:
        robosuite = import_robosuite()
        self.suite, self.phrasings, self.image_size = suite, phrasings, image_size
        self.num_envs, self.horizon, self.action_spec = num_worlds, suite.horizon, ACTION_SPEC
        self.cameras = tuple(CAMERAS)
        self.proprio_dim, self.privileged_dim = len(PROPRIO_NAMES), PRIVILEGED_DIM
        self.render_images = True
        shape = (num_worlds, len(CAMERAS), image_size, image_size, 3)
        self.images = np.zeros(shape, np.uint8) if images_out is None else images_out
        self._envs = []
        for _ in range(num_worlds):
            with _numpy_seed(0):  # sizes are drawn when the model is built: the same in every world
                self._envs.append(
                    robosuite.make(
                        suite.environment, robots="Panda", has_renderer=False, has_offscreen_renderer=False,
                        use_camera_obs=False, use_object_obs=False, control_freq=int(CONTROL_HZ), ignore_done=True,
                        hard_reset=False, horizon=suite.horizon,
                    )
                )  # fmt: skip
        self._site = [env.robots[0].eef_site_id["right"] for env in self._envs]
        self._fingers = [env.robots[0]._ref_gripper_joint_pos_indexes["right"] for env in self._envs]
        self._renderer: mujoco.Renderer | None = None
        self.episodes: list[RobosuiteEpisode | None] = [None] * num_worlds
        self.over = np.ones(num_worlds, bool)
        self.elapsed = np.zeros(num_worlds, np.int64)
        self._proprio = np.zeros((num_worlds, self.proprio_dim), np.float32)
        self._privileged = np.zeros((num_worlds, PRIVILEGED_DIM), np.float32)

    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """Start the episodes that `seeds` mean in worlds `env_ids`; see `vla.types.VecEnv.reset`."""
        ids = range(self.num_envs) if env_ids is None else [int(i) for i in env_ids]
        if len(ids) != len(seeds):
            raise ValueError(f"reset needs one seed per world: {len(ids)} worlds, {len(seeds)} seeds")
        for task in tasks or ():
            if task not in self.suite.tasks:
                raise ValueError(f"suite {self.suite.name!r} has no task {task!r}; it has: {self.suite.tasks[0]}")
        for i, seed in zip(ids, seeds, strict=True):
            with _numpy_seed(int(seed)):
                self._envs[i].reset()
            words = self.suite.train if self.phrasings == "train" else self.suite.heldout
            text = words[np.random.default_rng([int(seed), 29]).integers(len(words))]
            self.episodes[i] = RobosuiteEpisode(int(seed), self.suite.tasks[0], text, text, self.suite.swapped)
            self.over[i], self.elapsed[i] = False, 0
            self._read(i)
        self._render(ids)
        return self.observation()

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """Run up to C control steps in each world that is not over; see `vla.types.VecEnv.step_chunk`."""
        chunk = np.asarray(chunk, np.float64)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs or chunk.shape[2] != ACTION_SPEC.dim:
            raise ValueError(f"action chunk must be ({self.num_envs}, C, {ACTION_SPEC.dim}), got {chunk.shape}")
        if not np.isfinite(chunk).all():
            raise ValueError("action chunk holds NaN or Inf")
        live = np.flatnonzero(~self.over)
        n_steps = np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for i in live:
            env = self._envs[i]
            for action in np.clip(chunk[i], -1.0, 1.0):
                env.step(action)
                n_steps[i] += 1
                self.elapsed[i] += 1
                terminated[i] = bool(env._check_success())
                truncated[i] = not terminated[i] and self.elapsed[i] >= self.horizon
                if terminated[i] or truncated[i]:
                    self.over[i] = True
                    break
            self._read(i)
        self._render(live)
        info = {"success": terminated.copy(), "wrong_object": np.zeros(self.num_envs, bool)}
        return StepResult(self.observation(), terminated.astype(np.float32), terminated, truncated, n_steps, info)

    def _read(self, i: int) -> None:
        env = self._envs[i]
        data = env.sim.data
        grip = np.array(data.site_xpos[self._site[i]])
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, np.array(data.site_xmat[self._site[i]]).reshape(-1))
        quat *= 1.0 if quat[1] >= 0 else -1.0
        self._proprio[i] = np.concatenate([grip, quat, data.qpos[self._fingers[i]]])
        position, (w, x, y, z) = self.suite.object_pose(env)
        yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        goal = self.suite.goal(env)
        self._privileged[i] = np.concatenate(
            [position, [yaw], np.zeros(3) if goal is None else goal, [goal is not None], position - grip]
            + [[self.suite.grasp_height_m]]
        )

    def _render(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        if not self.render_images:
            return
        for i in ids:
            model, data = self._envs[i].sim.model._model, self._envs[i].sim.data._data
            if self._renderer is None:
                # Multisampling and mirrors are most of the cost of a software-rendered frame, and nothing to a policy.
                model.vis.quality.offsamples = 0
                model.mat_reflectance[:] = 0
                self._renderer = mujoco.Renderer(model, self.image_size, self.image_size)
                for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX"):
                    self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
                self._option = mujoco.MjvOption()
                self._option.geomgroup[:] = 0
                self._option.geomgroup[1] = 1  # robosuite draws group 1 and collides with group 0
                self._option.sitegroup[:] = 0
                self._camera = mujoco.MjvCamera()
                self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            mujoco.mj_camlight(model, data)
            for view, name in enumerate(CAMERAS.values()):
                self._camera.fixedcamid = model.camera(name).id
                # One GL context serves all worlds (their models are built alike): their own data fill its scene.
                mujoco.mjv_updateScene(
                    model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._renderer.scene
                )
                self._renderer.render(out=self.images[i, view])

    def proprio(self) -> NDArray[np.float32]:
        """(n, P), see PROPRIO_NAMES."""
        return self._proprio.copy()

    def privileged(self) -> NDArray[np.float32]:
        """(n, 12), see PRIVILEGED_DIM."""
        return self._privileged.copy()

    def observation(self) -> Observation:
        """Of every world, now. Images are those of the last render, and are views: copy to keep."""
        images = {name: self.images[:, v] for v, name in enumerate(self.cameras)}
        return Observation(
            images, self.proprio(), [e.instruction if e else "" for e in self.episodes], self.privileged()
        )

    def alternative_instructions(self) -> list[str]:
        """See `vla.types.VecEnv.alternative_instructions`; with one object, they name an object that is not there."""
        return [e.swapped_instruction if e else "" for e in self.episodes]

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        for env in self._envs:
            env.close()
        self._envs = []


def default_lift(image_size: int = 84) -> tuple[Any, Callable[[], int]]:
    """robosuite's own Lift, both cameras in its observation, and a counter of the frames it has drawn: a baseline.

    All is robosuite's default but the hard reset. That one builds a second GL context, and when Python's garbage
    collector gets to the first, it leaves *no* context current: from then on robosuite 1.5.1 draws nothing, returns
    memory it never wrote as images, and runs 18 times as fast. The counter raises RuntimeError if that has happened.
    """
    robosuite = import_robosuite()
    env = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=True, use_camera_obs=True,
        camera_names=list(CAMERAS.values()), camera_heights=image_size, camera_widths=image_size,
        control_freq=int(CONTROL_HZ), horizon=1_000_000, ignore_done=True, hard_reset=False,
    )  # fmt: skip
    env.reset()
    context = env.sim._render_context_offscreen
    draw, count = context.render, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return draw(*args, **kwargs)

    def frames() -> int:
        area = mujoco.MjrRect(0, 0, image_size, image_size)
        for filling in (0, 255):  # no frame of this scene is all black and all white
            pixels = np.full((image_size, image_size, 3), filling, np.uint8)
            mujoco.mjr_render(area, context.scn, context.con)
            mujoco.mjr_readPixels(pixels, None, area, context.con)
            if (pixels == filling).all():
                raise RuntimeError("robosuite draws nothing: it has lost its GL context")
        return count[0]

    context.render = counted
    return env, frames
