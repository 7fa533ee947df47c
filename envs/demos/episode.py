"""One demonstration: a scripted expert acts in one environment that is rendered at every control step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.demos.dataset_writer import DemoEpisode
from envs.demos.geometry import Geometry, stacked_geometry
from envs.experts.script import NOISE_CORRELATION
from envs.seeds import Stream
from vla.core.types import ActionSpec, Observation

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation


class DemoWorld(Protocol):
    """One environment with its scripted expert, rendered at every control step."""

    action_spec: ActionSpec
    cameras: tuple[str, ...]
    proprio_names: tuple[str, ...]
    horizon: int
    """Control steps after which an episode counts as failed."""
    instruction: str
    success: bool
    done: bool
    """The task itself ended, by success or failure."""

    def reset(self, seed: int) -> None:
        """Start the episode that `seed` means."""

    def observe(self) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
        """(camera -> (H, W, 3) RGB, proprio (P,)) of this instant."""

    def geometry(self) -> Geometry | None:
        """Depth and calibration of this instant's cameras; None where the world was made without them."""

    def privileged(self) -> NDArray[np.float32]:
        """(S,) the simulator's state of this instant, as critics read it; S = 0 where it is not available."""

    def exact_proprio(self) -> NDArray[np.float32] | None:
        """(P,) proprio without the noise of sensors; None where they have none."""

    def expert_action(self) -> NDArray[np.float32]:
        """(A,) what the scripted expert does now."""

    def step(self, action: NDArray[np.float32]) -> None:
        """Run one control step."""

    def close(self) -> None:
        """Free the simulator."""


_OF_POSITIONS = 0.13
"""Share of the noise that a position to go to gets: its range is all of its way, that of a displacement one step."""


def _disturbed(name: str, proprio_names: Sequence[str]) -> float:
    """The share of the noise that an action component gets; grippers none."""
    if name.removesuffix(".pos") == "gripper":
        return 0.0
    return _OF_POSITIONS if name in proprio_names else 1.0


MakeWorld = Callable[[str, int], DemoWorld]
"""(suite, image_size) -> world. A module-level function: worker processes import it by name."""


RunEpisode = Callable[[DemoWorld, int, float], DemoEpisode | None]
"""(world, seed, noise) -> the episode to keep, if there is one. A module-level function, as `MakeWorld`."""


def run_episode(world: DemoWorld, seed: int, noise: float) -> DemoEpisode | None:
    """One demonstration, or None if the expert failed.

    `noise` is the standard deviation of what is added to the *executed* action, in units of half the action range, on
    every component but the gripper; the *recorded* action is the expert's clean one, so the data shows recoveries
    (DART, Laskey et al. 2017).
    """
    episode = played(world, seed, noise, recorded="wanted")
    return replace(episode, success=None) if episode is not None and episode.success else None


def run_rollout(world: DemoWorld, seed: int, noise: float) -> DemoEpisode | None:
    """One episode of whoever acts in the world, kept with its outcome, whichever that is. The *recorded* action is the
    *executed* one, noise included: what it led to is what can be learnt from it. None if there was no step."""
    return played(world, seed, noise, recorded="executed")


def run_corrected(world: DemoWorld, seed: int, noise: float) -> DemoEpisode | None:
    """The same of a policy with a corrector beside it (`envs.demos.rollout.CorrectedPolicyWorld`), whose *recorded*
    actions are clean, as a demonstration's. None if they never took over: such an episode teaches nothing new."""
    episode = run_rollout(world, seed, noise)
    corrected = episode is not None and episode.intervention is not None and bool(episode.intervention.any())
    return episode if corrected else None


def played(world: DemoWorld, seed: int, noise: float, *, recorded: Literal["wanted", "executed"]) -> DemoEpisode | None:
    """One episode with its outcome, None if it ended before the first step. `noise` is as in `run_episode`; `recorded`:
    the action that is kept, before noise is added to it or after."""
    rng = np.random.default_rng([seed, Stream.EXECUTION_NOISE])
    spec = world.action_spec
    low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
    shares = [_disturbed(name, world.proprio_names) for name in spec.names]
    scale = noise * 0.5 * (high - low) * np.array(shares, np.float32)
    disturbance = rng.standard_normal(spec.dim)
    images: dict[str, list[NDArray[np.uint8]]] = {camera: [] for camera in world.cameras}
    geometry: list[Geometry] = []
    proprio, privileged, exact, actions, by_hand = [], [], [], [], []
    world.reset(seed)
    while not world.done and len(actions) < world.horizon:
        frame, state = world.observe()
        action = np.clip(np.asarray(world.expert_action(), np.float32), low, high)
        for camera in world.cameras:
            images[camera].append(np.array(frame[camera]))  # a copy: renderers reuse their buffers
        if (seen := world.geometry()) is not None:
            geometry.append(seen)
        proprio.append(np.array(state, np.float32))
        privileged.append(np.array(world.privileged(), np.float32))
        if (values := world.exact_proprio()) is not None:
            exact.append(np.array(values, np.float32))
        corrected = getattr(world, "corrected", None)
        if corrected is not None:
            by_hand.append(corrected)
        done = np.clip(action + scale * disturbance, low, high).astype(np.float32)
        actions.append(action if recorded == "wanted" or corrected else done)
        world.step(done)
        fresh = rng.standard_normal(spec.dim)
        disturbance = NOISE_CORRELATION * disturbance + np.sqrt(1 - NOISE_CORRELATION**2) * fresh
    if not actions:
        return None
    stacked = {camera: np.stack(frames) for camera, frames in images.items()}
    return DemoEpisode(
        seed, world.instruction, stacked, np.stack(proprio), np.stack(actions), np.stack(privileged),
        np.stack(exact) if exact else None, stacked_geometry(geometry) if geometry else None, bool(world.success),
        np.array(by_hand) if by_hand else None,
    )  # fmt: skip


class SuiteWorld:
    """A `DemoWorld` of a suite in `sim_configs/suites`: one world and its expert. Create it where it is used."""

    def __init__(
        self,
        suite: str,
        image_size: int,
        perturb: Perturbation | None = None,
        tasks: tuple[str, ...] = (),
        depth: bool = False,
    ) -> None:
        # Lazily: the process that only waits for workers needs no simulator.
        from envs.experts.registry import make_expert
        from envs.make import worlds_class
        from envs.registry import load_suite
        from envs.sim.render_options import RenderOptions

        spec = load_suite(suite)
        render = RenderOptions(image_size, depth=depth, calibration=depth)
        self._worlds = worlds_class(spec, perturb)(spec, 1, render=render)
        self._expert = make_expert(suite, 1)
        self._obs: Observation | None = None
        self._tasks = tasks
        self.action_spec = self._worlds.action_spec
        self.cameras = tuple(self._worlds.cameras)
        self.proprio_names = tuple(self._worlds.proprio_names)
        self.horizon = self._worlds.horizon
        self.instruction = ""
        self.success = self.done = False

    def reset(self, seed: int) -> None:
        """See `DemoWorld.reset`."""
        self._expert.reset()
        tasks = [self._tasks[seed % len(self._tasks)]] if self._tasks else None
        self._obs = self._worlds.reset(seeds=[seed], tasks=tasks)
        self.instruction = self._obs.instruction[0]
        self.success = self.done = False

    def observe(self) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
        """See `DemoWorld.observe`."""
        assert self._obs is not None, "reset first"
        return {camera: image[0] for camera, image in self._obs.images.items()}, self._obs.proprio[0]

    def geometry(self) -> Geometry | None:
        """See `DemoWorld.geometry`."""
        assert self._obs is not None, "reset first"
        depth, inner, outer = self._obs.depth, self._obs.intrinsics, self._obs.extrinsics
        if depth is None or inner is None or outer is None:
            return None
        # Copies: renderers reuse their buffers.
        return {name: (depth[name][0].copy(), inner[name][0].copy(), outer[name][0].copy()) for name in self.cameras}

    def privileged(self) -> NDArray[np.float32]:
        """See `DemoWorld.privileged`."""
        assert self._obs is not None and self._obs.privileged is not None, "reset first"
        return self._obs.privileged[0]

    def exact_proprio(self) -> NDArray[np.float32] | None:
        """See `DemoWorld.exact_proprio`."""
        assert self._obs is not None, "reset first"
        return None if self._obs.exact_proprio is None else self._obs.exact_proprio[0]

    def expert_action(self) -> NDArray[np.float32]:
        """See `DemoWorld.expert_action`."""
        assert self._obs is not None, "reset first"
        return self._expert.act(self._obs)[0, 0]

    def step(self, action: NDArray[np.float32]) -> None:
        """See `DemoWorld.step`."""
        result = self._worlds.step_chunk(action[None, None])
        self._obs = result.obs
        self.success = bool(result.info["success"][0])
        self.done = bool(result.terminated[0] or result.truncated[0])

    def close(self) -> None:
        """See `DemoWorld.close`."""
        self._worlds.close()


def suite_world(
    suite: str,
    image_size: int,
    perturb: Perturbation | None = None,
    tasks: tuple[str, ...] = (),
    depth: bool = False,
) -> DemoWorld:
    """The demonstration world of a suite: its seeds' own tasks, or these in turn; `depth`: with the depth and the
    calibration of its cameras. ValueError with the nearest name if there is no such suite."""
    return SuiteWorld(suite, image_size, perturb, tasks, depth)
