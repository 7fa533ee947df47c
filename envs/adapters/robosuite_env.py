"""robosuite tasks as environments: Panda, OSC_POSE deltas, instructions, two cameras, rendered once per chunk.

The only file that imports robosuite (extra `robosuite`). Physics, controller, placement and success are robosuite's
own; rendering is ours, since robosuite's multisampled, reflecting frames cost most of its time. Resets are soft: the
compiled model is kept and only the state is drawn anew.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode, AdapterWorlds, numpy_seed, require
from envs.adapters.robosuite_fast_step import ControlMaths, LeanStep
from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.seeds import Stream
from envs.sim.base_worlds import Frames
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import ActionSpec

CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand"}
PROPRIO_NAMES = (
    "eef_x", "eef_y", "eef_z", "eef_qw", "eef_qx", "eef_qy", "eef_qz", "finger_left", "finger_right",
)  # fmt: skip
"""Grip site in the world frame (m, unit quaternion with qx >= 0), finger joints (m)."""
CONTROL_HZ = 20.0
MAX_DELTA_M, MAX_DELTA_RAD = 0.05, 0.5
"""Displacement (m) and rotation (rad) of an action component of 1."""
ACTION_SPEC = ActionSpec(
    names=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"), low=(-1.0,) * 7, high=(1.0,) * 7, control_hz=CONTROL_HZ
)
"""OSC_POSE deltas in the base frame. Gripper: robosuite's sign, -1 opens and +1 closes."""


def import_robosuite() -> Any:
    """The package, without its start-up warnings. ValueError naming the extra when it is missing."""
    require("robosuite")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # each time that its files are compiled
            import robosuite
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return robosuite


def _show_what_robosuite_draws(option: mujoco.MjvOption) -> None:
    option.geomgroup[:] = 0
    option.geomgroup[1] = 1  # robosuite draws group 1 and collides with group 0
    option.sitegroup[:] = 0


class RobosuiteWorlds(AdapterWorlds):
    """`num_worlds` environments of one robosuite task in this process."""

    proprio_names = PROPRIO_NAMES

    def __init__(
        self,
        suite: RobosuiteSuite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        frames_out: Frames | None = None,
    ) -> None:
        robosuite = import_robosuite()
        super().__init__(
            suite, num_worlds, action_spec=ACTION_SPEC, cameras=CAMERAS, privileged_dim=suite.privileged_dim,
            phrasings=phrasings, render=render, frames_out=frames_out, show=_show_what_robosuite_draws,
        )  # fmt: skip
        self._envs = []
        for _ in range(num_worlds):
            with numpy_seed(0):  # sizes are drawn when the model is built: the same in every world
                self._envs.append(
                    robosuite.make(
                        suite.environment, robots="Panda", has_renderer=False, has_offscreen_renderer=False,
                        use_camera_obs=False, use_object_obs=False, control_freq=int(CONTROL_HZ), ignore_done=True,
                        hard_reset=False, horizon=suite.horizon,
                    )
                )  # fmt: skip
        from robosuite.utils import control_utils as theirs

        maths = ControlMaths(theirs.opspace_matrices, theirs.nullspace_torques, theirs.orientation_error)
        self._steps = [LeanStep(env, maths) if LeanStep.suits(env) else env.step for env in self._envs]
        self._site = [env.robots[0].eef_site_id["right"] for env in self._envs]
        self._fingers = [env.robots[0]._ref_gripper_joint_pos_indexes["right"] for env in self._envs]

    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        with numpy_seed(seed):
            self._envs[i].reset()
        words = self.suite.train if self.phrasings == "train" else self.suite.heldout
        text = words[np.random.default_rng([seed, Stream.WORDS]).integers(len(words))]
        return AdapterEpisode(seed, self.suite.tasks[0], text, text, self.suite.swapped)

    def _step(self, i: int, action_A: NDArray[np.float64]) -> bool:
        self._steps[i](action_A)
        return bool(self._envs[i]._check_success())

    def _read(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        env = self._envs[i]
        data = env.sim.data
        grip = np.array(data.site_xpos[self._site[i]])
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, np.array(data.site_xmat[self._site[i]]).reshape(-1))
        quat *= 1.0 if quat[1] >= 0 else -1.0
        return np.concatenate([grip, quat, data.qpos[self._fingers[i]]]), self.suite.state(env, grip)

    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        sim = self._envs[i].sim
        return self.suite.name, sim.model._model, sim.data._data

    def close(self) -> None:
        """Free the graphics context and robosuite's environments."""
        super().close()
        for env in self._envs:
            env.close()
        self._envs, self._steps = [], []


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
