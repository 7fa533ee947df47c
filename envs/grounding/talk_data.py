"""Moments of episodes with questions about them: what a policy learns to talk from, and what it is examined on.

A folder: `images.npy` (F, V, H, W, 3) uint8, `proprio.npy` (F, P) float32, raw units, and `talk.json`: "cameras",
"proprio_names" and "frames", each with its suite, seed, instruction and what is "asked": [kind, question, answer].
`vla.training.talking` reads it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds
from envs.backends.worker import worker_environment
from envs.experts.registry import make_expert
from envs.grounding.episode_questions import Moment, askable
from envs.grounding.expert_scenes import NoisyExpert
from envs.make import episode_source
from envs.perturb.perturbation import Perturbation
from envs.registry import load_suite
from envs.seeds import Stream
from envs.sim.render_options import RenderOptions
from envs.tabletop.episodes import Episode
from envs.tabletop.goals import write_goals
from vla.core.config import save_json
from vla.core.disk import remove, temporary, writing
from vla.core.subprocesses import pool
from vla.core.types import IMAGE_SIZE
from vla.runtime.locks import locked
from vla.runtime.rendering_backend import check

MOMENTS = 3
"""Moments of every episode that are asked about."""
_STRAYS = 0.2
"""Share of the episodes in which the hand is after another thing than it is told: what is seen must be told, too."""
_END = 0.6
"""Share of the episodes whose last moment is one of those asked about."""
_EPISODES_PER_JOB = 25


@dataclass(frozen=True)
class _Request:
    suites: tuple[str, ...]
    seed0: int
    image_size: int
    wording: str
    of: int
    perturb: Perturbation | None


@dataclass(frozen=True)
class Frame:
    """One moment."""

    suite: str
    seed: int
    instruction: str
    images: np.ndarray
    """(V, H, W, 3) uint8."""
    proprio: np.ndarray
    """(P,) raw units."""
    asked: list[list[str]]
    """[kind, question, answer] of each question."""
    names: list[str]
    """The things of the scene, as questions name them."""


class _Stage:
    """One environment of a suite, its expert, and the moments of an episode played in it."""

    def __init__(self, name: str, image_size: int, perturb: Perturbation | None) -> None:
        self.name, suite = name, load_suite(name)
        render = RenderOptions(image_size)
        self.worlds = TabletopWorlds(suite, 1, source=episode_source(perturb), render=render)
        self.expert = make_expert(name, 1)

    def frames(self, seed: int, wording: str, of: int) -> Iterator[Frame]:
        """`MOMENTS` moments of the seed's episode, played by the expert, more or less well."""
        w, rng = self.worlds, np.random.default_rng([seed, Stream.TALK])
        w.render_images = False
        w.reset(seeds=[seed])
        episode: Episode = w.episodes[0]
        strays = bool(episode.swapped_goals) and len(episode.goals) == 1 and rng.random() < _STRAYS
        if strays:
            w.place(0, replace(episode, goals=episode.swapped_goals))
        self.expert.reset()
        hand = NoisyExpert(rng, w.action_spec)
        past = [self._keep()]
        while not w.over[0]:
            w.step_chunk(hand(self.expert.act(w.observation())[:, :1]))
            past.append(self._keep())
        chosen = set(rng.choice(len(past), MOMENTS, replace=len(past) < MOMENTS).tolist())
        if rng.random() < _END:
            chosen = {*list(chosen)[1:], len(past) - 1}
        order = sorted(chosen)
        for step in (order * MOMENTS)[:MOMENTS]:
            self._return(past[step])
            if strays:  # what counts is what was said
                write_goals(w.state, 0, episode.goals, episode.slots)
            moment = Moment(w, 0, episode)
            asked = [[one.kind, one.question, one.answer] for one in moment.ask(rng, wording, strays=strays, of=of)]
            w.render_images = True
            w._render([0])
            shown = w.images[0].copy(), w.proprio()[0]
            yield Frame(self.name, seed, episode.instruction, *shown, asked, list(moment.at))

    def _keep(self) -> tuple[Any, ...]:
        w = self.worlds
        data = mujoco.MjData(w.model)
        mujoco.mj_copyData(data, w.model, w.data[0])
        return data, w._command[0].copy(), float(w._gripper[0]), int(w.state.stage[0]), int(w.elapsed[0])

    def _return(self, kept: tuple[Any, ...]) -> None:
        w = self.worlds
        data, w._command[0], w._gripper[0], w.state.stage[0], w.elapsed[0] = kept
        mujoco.mj_copyData(w.data[0], w.model, data)
        w._read(0)


@functools.cache
def _stage(name: str, image_size: int, perturb: Perturbation | None) -> _Stage:
    return _Stage(name, image_size, perturb)


def _play(arguments: tuple[_Request, range]) -> list[Frame]:
    """The moments of some episodes (worker)."""
    request, numbers = arguments
    frames = []
    for number in numbers:
        suite = request.suites[number % len(request.suites)]
        stage = _stage(suite, request.image_size, request.perturb)
        frames += stage.frames(request.seed0 + number, request.wording, request.of)
    return frames


def check_askable(suites: Sequence[str]) -> None:
    """ValueError for a suite whose episodes cannot be asked about, or none at all."""
    if not suites:
        raise ValueError("name at least one suite to play")
    for name in suites:
        if problem := askable(load_suite(name)):
            raise ValueError(problem)


def generate_talk(
    suites: Sequence[str],
    episodes: int,
    out: Path,
    *,
    seed0: int = 0,
    num_workers: int = 2,
    image_size: int = IMAGE_SIZE,
    wording: str = "train",
    of: int = 4,
    perturb: Perturbation | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Play `episodes` episodes of these suites in turn, from scene `seed0` on, and write moments of them to the folder
    `out`, which appears when it is complete.

    `wording`: train or heldout (`envs.grounding.episode_questions.TEMPLATES`). `of`: how many things' places, and
    neighbours, are asked for at a moment. `num_workers` 0 plays in this process.
    ValueError for a suite that cannot be asked about, or a folder that is there.
    """
    check_askable(suites)
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    check(probe=True)
    request = _Request(tuple(suites), seed0, image_size, wording, of, perturb)
    starts = range(0, episodes, _EPISODES_PER_JOB)
    jobs = [(request, range(start, min(start + _EPISODES_PER_JOB, episodes))) for start in starts]
    frames: list[Frame] = []
    with locked(out), writing(out):
        for part in _played(jobs, num_workers):
            frames += part
            if on_progress:
                on_progress(len(frames) // MOMENTS, episodes)
        _write(frames, request, out)
    return out


def _played(jobs: list[tuple[_Request, range]], num_workers: int) -> Iterator[list[Frame]]:
    if not num_workers:
        yield from map(_play, jobs)
        return
    with worker_environment(), pool(num_workers) as workers:
        yield from workers.map(_play, jobs)


def _write(frames: list[Frame], request: _Request, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    work = temporary(out)
    worlds = _stage(request.suites[0], request.image_size, request.perturb).worlds
    try:
        work.mkdir()
        np.save(work / "images.npy", np.stack([frame.images for frame in frames]))
        np.save(work / "proprio.npy", np.stack([frame.proprio for frame in frames]))
        about = [{"suite": f.suite, "seed": f.seed, "instruction": f.instruction, "asked": f.asked} for f in frames]
        seen = {"cameras": list(worlds.cameras), "proprio_names": list(worlds.proprio_names)}
        names = sorted({name for frame in frames for name in frame.names})
        save_json(work / "talk.json", {**seen, "names": names, "frames": about})
        os.replace(work, out)
    finally:
        remove(work)
