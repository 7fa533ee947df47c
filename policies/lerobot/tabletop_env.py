"""A tabletop environment with the interface that LeRobot's evaluation expects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from policies.lerobot.simulation import make_simulation
from vla.core.compatibility import side_of
from vla.core.types import Observation


class TabletopEnv(gymnasium.Env):
    """One environment with the observation names and shapes that `lerobot-eval` expects."""

    def __init__(self, suite: str, image_size: int, first_seed: int) -> None:
        simulation = make_simulation(suite, image_size)
        self._env, self._first_seed = simulation.env, first_seed
        self.interface = replace(side_of(self._env), proprio_names=simulation.proprio_names)
        """Names, order, ranges and rate of what policies read and command here (`vla.core.types.PolicySpec`)."""
        spec = self._env.action_spec
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(spec.control_hz)}  # PyAV takes no float
        self.render_mode = "rgb_array"
        self._max_episode_steps = self._env.horizon
        self.task, self.task_description = suite, ""
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(self._env.cameras, picture)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (self._env.proprio_dim,), np.float32),
            }
        )
        self.action_space = spaces.Box(np.float32(spec.low), np.float32(spec.high), dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset to the scene of `first_seed` + `seed`. Returns (observation, {})."""
        super().reset(seed=seed)
        # Without a seed it is SAME_STEP's reset after the end, whose scene is never used.
        return self._see(self._env.reset(seeds=[self._first_seed + (seed or 0)])), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Run one control step with an action (A,). Returns (observation, reward, terminated, truncated, {"is_success":
        bool})."""
        result = self._env.step_chunk(np.asarray(action, np.float32)[None, None])
        ended = bool(result.terminated[0]), bool(result.truncated[0])
        return self._see(result.obs), float(result.reward[0]), *ended, {"is_success": bool(result.info["success"][0])}

    def render(self) -> np.ndarray:
        """The camera images side by side, (H, cameras * W, 3) uint8."""
        return np.concatenate([image for image in self._pixels.values()], axis=1)

    def close(self) -> None:
        """Close the simulated environment."""
        self._env.close()

    def _see(self, obs: Observation) -> dict[str, Any]:
        self._pixels = {camera: image[0].copy() for camera, image in obs.images.items()}
        self.task_description = obs.instruction[0]
        return {"pixels": self._pixels, "agent_pos": obs.proprio[0].copy()}
