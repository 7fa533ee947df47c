"""Commands that list names and render scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tyro.conf import Positional

from bascule.agents import AGENTS, resolve_policy
from bascule.commands.base import Command, check_numbers, chosen_perturbation, refuse_idle
from vla.core.config import lookup
from vla.core.types import executed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vla.core.types import ActionChunk, Observation, Policy, StepResult, VecEnv


@dataclass(frozen=True)
class List(Command):
    """List suites, recipes, tasks or backbones."""

    what: Positional[str]
    """suites, recipes, tasks or backbones."""

    def run(self) -> None:
        """Print the table."""
        from bascule.catalogue import LISTINGS
        from vla.runtime.console import stdout, table

        title, columns, rows = lookup(self.what, LISTINGS, "list")()
        stdout().print(table(title, columns, rows))


@dataclass(frozen=True)
class View(Command):
    """Render scenes of a suite with their instructions, and videos of its expert or a policy on every task."""

    suite: Positional[str]
    """The suite to show, see `vla list suites`; or a .toml file."""
    policy: str = "expert"
    """The policy in the videos: expert, or a checkpoint folder, as in `vla eval`."""
    animation: Path | None = None
    """Write only this file: an animated WebP of the policy in `scenes` scenes at once, from the front camera."""
    out: Path | None = None
    """A folder for scenes.png and TASK.mp4. Default: runs/view/SUITE."""
    scenes: int = 12
    """Number of scenes in the picture; every task at least once."""
    seed: int = 0
    """Seed of the first scene; the following scenes count up from it."""
    phrasings: Literal["train", "heldout", "novel"] = "train"
    """Wording of the instructions, as in `vla eval`."""
    perturb: tuple[str, ...] = ()
    """Perturbations of the environment: AXIS=SEVERITY, as in `vla eval`."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation instead: light, medium or strong, and AXIS=FROM:TO, as in `vla demos`."""
    films: bool = True
    """Write a video of every task."""
    image_size: int = 168
    """Side of each picture in pixels."""
    workers: int = 2
    """Processes that simulate."""

    def run(self) -> None:
        """Render the scenes and videos, or only the animation. ValueError for an unknown suite or checkpoint."""
        from envs.registry import load_suite

        tasks = load_suite(self.suite).tasks
        if self.animation is not None and self.animation.suffix.lower() != ".webp":
            raise ValueError(f"--animation {self.animation} must end in .webp: an animated WebP is what it becomes")
        if self.animation is not None:
            refuse_idle(self, "beside --animation, which writes one file alone", "out", "films")
        elif not self.films:
            refuse_idle(self, "beside --no-films: only films show a policy", "policy")
        check_numbers(self, scenes=(1, 10_000), seed=(0, 2**53), image_size=(8, 4096), workers=(1, 1024))
        from envs import make_vec
        from envs.sim.render_options import drawn_for
        from vla.core.compatibility import fitted
        from vla.runtime.console import say
        from vla.runtime.scene_pictures import contact_sheet

        if self.policy not in AGENTS:
            from policies.load import checkpoint

            checkpoint(self.policy, AGENTS)
        if self.animation is not None:
            won = self._animate(tasks, self.animation)
            say(f"{self.policy} in {self.scenes} scenes, {won} succeeded: {self.animation}")
            return
        folder, films = self._out(), self.films
        loaded = None if self.policy in AGENTS or not films else resolve_policy(self.policy, None, self.suite)
        env = make_vec(
            self.suite,
            len(tasks),
            num_workers=self.workers,
            **{**drawn_for(loaded), "image_size": self.image_size},
            phrasings=self.phrasings,
            perturb=chosen_perturbation(self.perturb, self.randomise),
        )
        try:
            pictures, words = [], []
            for start in range(0, max(self.scenes, len(tasks)), len(tasks)):
                first = self.seed + start
                obs = env.reset(seeds=range(first, first + len(tasks)), tasks=tasks)
                pictures.append(np.concatenate(list(obs.images.values()), axis=2))
                words += obs.instruction
            shown = max(self.scenes, len(tasks))
            contact_sheet([np.concatenate(pictures)[:shown]], words[:shown], folder / "scenes.png")
            say(f"{shown} scenes in {folder / 'scenes.png'}")
            if films:
                seeds = range(self.seed, self.seed + len(tasks))
                policy = (
                    resolve_policy(self.policy, env, self.suite) if loaded is None else fitted(loaded, env, say=say)
                )
                failed = _film(env, policy, tasks, seeds, folder)
                say(f"{len(tasks)} films in {folder}")
                if failed:
                    say(f"{self.policy} failed at: {', '.join(failed)}")
        finally:
            env.close()

    def _out(self) -> Path:
        return self.out or Path("runs") / "view" / Path(self.suite).stem

    def writes(self) -> tuple[Path, ...]:
        """The output folder, or the animation's file."""
        return (self._out() if self.animation is None else self.animation,)

    def _animate(self, tasks: tuple[str, ...], path: Path) -> int:
        """Run the policy in `scenes` scenes at its own image size and film them at `image_size`. Returns the successes.

        Every second control step is a frame.
        """
        from envs import make_vec
        from envs.sim.render_options import drawn_for
        from vla.core.compatibility import fitted
        from vla.runtime.console import progress, say
        from vla.runtime.scene_pictures import Animation

        more = {"phrasings": self.phrasings, "perturb": chosen_perturbation(self.perturb, self.randomise)}
        loaded = None if self.policy in AGENTS else resolve_policy(self.policy, None, self.suite)
        env = make_vec(self.suite, self.scenes, num_workers=self.workers, **drawn_for(loaded), **more)
        try:
            camera = make_vec(self.suite, self.scenes, num_workers=self.workers, image_size=self.image_size, **more)
            try:
                seeds = range(self.seed, self.seed + self.scenes)
                drawn = {"seeds": seeds, "tasks": [tasks[k % len(tasks)] for k in range(self.scenes)]}
                policy = (
                    resolve_policy(self.policy, env, self.suite) if loaded is None else fitted(loaded, env, say=say)
                )
                obs, shown = env.reset(**drawn), camera.reset(**drawn)
                animation = Animation(obs.instruction)
                over, won = np.zeros(self.scenes, bool), np.zeros(self.scenes, bool)
                animation.add(shown.images[env.cameras[0]], won, over)
                with progress("animation", self.scenes, unit="scenes") as update:
                    for step, (action, result) in enumerate(_control_steps(policy, env, obs)):
                        seen = camera.step_chunk(action).obs
                        over |= result.terminated | result.truncated
                        won |= result.info["success"]
                        if step % 2 or over.all():
                            animation.add(seen.images[env.cameras[0]], won, over)
                        update(int(over.sum()))
            finally:
                camera.close()
            animation.save(path, frame_ms=round(2000 / env.action_spec.control_hz))
        finally:
            env.close()
        return int(won.sum())


def _film(env: VecEnv, policy: Policy, tasks: tuple[str, ...], seeds: range, folder: Path) -> list[str]:
    """Write FOLDER/TASK.mp4 of `policy` for each task, one frame per control step. Returns the tasks it failed."""
    from vla.runtime.console import progress
    from vla.runtime.video import FilmWriter

    obs = env.reset(seeds=seeds, tasks=tasks)
    films = [FilmWriter(folder / f"{task}.mp4", env.action_spec.control_hz) for task in tasks]
    over, failed = np.zeros(env.num_envs, bool), []

    def add(seen: Observation, k: int) -> None:
        films[k].add(np.concatenate([image[k] for image in seen.images.values()], axis=1))

    for k in range(len(tasks)):
        add(obs, k)
    with progress("films", len(tasks), unit="tasks") as update:
        for _, result in _control_steps(policy, env, obs):
            for k in np.flatnonzero(~over):
                add(result.obs, k)
            for k in np.flatnonzero((result.terminated | result.truncated) & ~over):
                films[k].close()
                over[k] = True
                failed += [] if result.info["success"][k] else [tasks[k]]
            update(int(over.sum()))
    return failed


def _control_steps(policy: Policy, env: VecEnv, obs: Observation) -> Iterator[tuple[ActionChunk, StepResult]]:
    """Play `policy` in `env` from `obs` until every episode is over, one control step (B, 1, A) at a time."""
    over = np.zeros(env.num_envs, bool)
    policy.reset()
    while not over.all():
        chunk = executed(policy.spec, policy.act(obs))
        for k in range(chunk.shape[1]):
            result = env.step_chunk(chunk[:, k : k + 1])
            over |= result.terminated | result.truncated
            obs = result.obs
            yield chunk[:, k : k + 1], result
            if over.all():
                return
