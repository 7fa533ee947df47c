"""Suites as gymnasium environments, one action per step: ids "bascule/TabletopPick-v0" and the like.

`import envs.gym_env` registers them; `gymnasium.make("envs.gym_env:bascule/TabletopPick-v0")` does both in one.
(Gymnasium 1 has no plug-ins: it knows no package's environments before that package is imported.)

Observation: {"images": {camera: (H, W, 3) uint8}, "proprio": (P,) float32, "instruction": str}. Reward is 1 on the step
that succeeds, else 0. `terminated` is the task's end, `truncated` the suite's horizon; they are never merged.
"""

from __future__ import annotations

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import register, registry
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs import make_vec
from envs.make import check_options, worlds_class
from envs.perturb.perturbation import Perturbation
from envs.registry import all_suite_names, load_suite
from envs.seeds import TRAIN_SEED_LIMIT
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import IMAGE_SIZE, ActionSpec, Observation
from vla.runtime.rendering_backend import check

_MAX_INSTRUCTION = 256
_CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'-"


def observation_space(cameras: tuple[str, ...], image_size: int, proprio_dim: int) -> spaces.Dict:
    """The observation space of one environment."""
    image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    return spaces.Dict(
        {
            "images": spaces.Dict({camera: image for camera in cameras}),
            "proprio": spaces.Box(-np.inf, np.inf, (proprio_dim,), np.float32),
            "instruction": spaces.Text(_MAX_INSTRUCTION, charset=_CHARACTERS),
        }
    )


def action_space(spec: ActionSpec) -> spaces.Box:
    """The action space of one environment: the action of one control step."""
    return spaces.Box(np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32), dtype=np.float32)


def _checked_mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
    return render_mode


class SuiteEnv(gymnasium.Env):
    """One environment of a suite, in this process.

    `reset(seed=s)` starts the very episode that seed s means in `make_vec` and `vla eval`; without a seed, the next
    training episode of the generator that the last seed started. `reset(options={"task": ...})` fixes the task.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        suite: str,
        *,
        image_size: int = IMAGE_SIZE,
        phrasings: Phrasings = "train",
        perturb: Perturbation | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = _checked_mode(render_mode)
        check()
        check_options(phrasings, perturb)
        spec = load_suite(suite)
        self._worlds = worlds_class(spec, perturb)(spec, 1, phrasings=phrasings, render=RenderOptions(image_size))
        self.metadata = {**self.metadata, "render_fps": self._worlds.action_spec.control_hz}
        self.observation_space = observation_space(self._worlds.cameras, image_size, self._worlds.proprio_dim)
        self.action_space = action_space(self._worlds.action_spec)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode that `seed` means; the option "task" chooses its task. ValueError for other options."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"task"}:
            raise ValueError(f"reset knows the option 'task' only, not {sorted(unknown)}")
        episode = int(self.np_random.integers(TRAIN_SEED_LIMIT)) if seed is None else seed
        task = options.get("task")
        obs = self._worlds.reset(seeds=[episode], tasks=None if task is None else [task])
        return _single(obs), {**self._facts(obs), "success": False, "wrong_object": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step. RuntimeError when the episode is over."""
        if self._worlds.episodes[0] is None or self._worlds.over[0]:
            raise RuntimeError("the episode is over (or never began): call reset() before step()")
        result = self._worlds.step_chunk(np.asarray(action, np.float32)[None, None])
        told = {**result.info, "diverged": result.diverged}
        info = {**self._facts(result.obs), **{name: bool(value[0]) for name, value in told.items()}}
        ended = bool(result.terminated[0]), bool(result.truncated[0])
        return _single(result.obs), float(result.reward[0]), *ended, info

    def render(self) -> np.ndarray | None:
        """The cameras side by side, (H, V * W, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        return np.concatenate(list(self._worlds.images[0]), axis=1)

    def close(self) -> None:
        """Free the simulator."""
        self._worlds.close()

    def _facts(self, obs: Observation) -> dict[str, Any]:
        episode = self._worlds.episodes[0]
        assert episode is not None and obs.privileged is not None
        return {
            "episode_seed": episode.seed,
            "task": episode.task,
            "swapped_instruction": episode.swapped_instruction,
            "privileged": obs.privileged[0].copy(),
        }


def _single(obs: Observation) -> dict[str, Any]:
    return {
        "images": {camera: image[0].copy() for camera, image in obs.images.items()},
        "proprio": obs.proprio[0].copy(),
        "instruction": obs.instruction[0],
    }


class SuiteVectorEnv(VectorEnv):
    """N environments over worker processes as a gymnasium VectorEnv, resetting at the step after an episode's last.

    `reset(seed=s)` plays episode s + k in environment k. An autoreset draws a training episode from the same generator.
    """

    def __init__(
        self,
        suite: str,
        num_envs: int = 1,
        *,
        num_workers: int = 2,
        image_size: int = IMAGE_SIZE,
        phrasings: Phrasings = "train",
        perturb: Perturbation | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = _checked_mode(render_mode)
        self._env = make_vec(
            suite, num_envs, num_workers=num_workers, image_size=image_size, phrasings=phrasings, perturb=perturb
        )
        self.num_envs = num_envs
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": self._env.action_spec.control_hz,
            "autoreset_mode": AutoresetMode.NEXT_STEP,
        }
        self.single_observation_space = observation_space(self._env.cameras, image_size, self._env.proprio_dim)
        self.single_action_space = action_space(self._env.action_spec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._over = np.ones(num_envs, bool)
        self._obs: Observation | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode in every environment: seeds s, s + 1, ..., or a list of seeds. Takes no options."""
        if options:
            raise ValueError(f"this vector environment's reset takes no options, got {sorted(options)}")
        if isinstance(seed, int | np.integer):
            seeds: list[int | None] = [int(seed) + k for k in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"reset needs one seed or {self.num_envs}, got {len(seeds)}")
        # The generator of autoresets starts anew with the first seed, so a seeded run repeats as a whole.
        super().reset(seed=seeds[0])
        episodes = [self._draw() if s is None else s for s in seeds]
        self._obs = self._env.reset(seeds=episodes)
        self._over[:] = False
        nothing = np.zeros(self.num_envs, bool)
        return _batch(self._obs), {"success": nothing, "wrong_object": nothing.copy(), "privileged": self._state()}

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step of every environment; those whose episode ended at the last one are reset instead."""
        if self._obs is None:
            raise RuntimeError("call reset() before step()")
        fresh = np.flatnonzero(self._over)
        result = self._env.step_chunk(np.asarray(actions, np.float32)[:, None])  # finished worlds stand still
        self._obs = result.obs
        if len(fresh):
            self._obs = self._env.reset(seeds=[self._draw() for _ in fresh], env_ids=fresh)
        self._over = result.terminated | result.truncated
        info = {**result.info, "privileged": self._state()}
        return _batch(self._obs), result.reward.astype(np.float64), result.terminated, result.truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One image per environment, the cameras side by side; None without a render mode."""
        if self.render_mode is None or self._obs is None:
            return None
        return tuple(np.concatenate(list(self._obs.images.values()), axis=2))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the worker processes."""
        self._env.close()

    def _draw(self) -> int:
        return int(self.np_random.integers(TRAIN_SEED_LIMIT))

    def _state(self) -> np.ndarray:
        assert self._obs is not None and self._obs.privileged is not None
        return self._obs.privileged


def _batch(obs: Observation) -> dict[str, Any]:
    return {"images": dict(obs.images), "proprio": obs.proprio, "instruction": tuple(obs.instruction)}


def gym_id(suite: str) -> str:
    """The id of a suite: "tabletop-pick" -> "bascule/TabletopPick-v0"."""
    return f"bascule/{''.join(word.capitalize() for word in suite.split('-'))}-v0"


for _suite in all_suite_names():  # an adapter's too: what it needs is asked for when one is made
    if gym_id(_suite) not in registry:
        register(
            gym_id(_suite),
            entry_point="envs.gym_env:SuiteEnv",
            vector_entry_point="envs.gym_env:SuiteVectorEnv",
            kwargs={"suite": _suite},
            # No max_episode_steps: the worlds cut an episode at their own horizon and say so.
        )
