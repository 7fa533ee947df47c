"""Run any Policy in any VecEnv: success as k/n with a Wilson interval, per task and per phrasing, over stated seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from envs.evaluation.baselines import Film
from envs.evaluation.failures import Failures, Outcome
from vla.core.compatibility import fitted
from vla.core.grounding import FirstSight, confidence_of, threshold_of
from vla.core.statistics import wilson95
from vla.core.types import Observation, Policy, VecEnv, executed

_log = logging.getLogger(__name__)
_MAX_REPLAYS = 2
"""Repeats of an episode whose worker died; one that kills it every time counts as a failure."""
Progress = Callable[[int, int, int], None]
"""(finished, wanted, successes), called after every decision in which an episode ended."""


@dataclass(frozen=True)
class Count:
    """k successes of n."""

    successes: int = 0
    episodes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The count, its rate and 95% interval, as JSON holds them."""
        rate = self.successes / self.episodes if self.episodes else 0.0
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "success_rate": rate,
            "wilson95": list(wilson95(self.successes, self.episodes)),
        }


@dataclass(frozen=True)
class Episode:
    """One episode that was counted."""

    seed: int
    task: str
    phrasing: str
    """The template of the instruction."""
    outcome: Outcome
    steps: int
    """Control steps until it ended."""


@dataclass
class EvalReport:
    """One evaluation. `to_dict` has the field names that programs read (docs/evaluate.md)."""

    suite: str
    policy: str
    backend: str
    successes: int
    episodes: int
    wrong_object: int
    """Episodes that ended because another object than the one counted was lifted."""
    mean_steps: float
    """Control steps of the successful episodes."""
    per_task: dict[str, Count]
    per_phrasing: dict[str, Count]
    seeds: tuple[int, int]
    deterministic: bool
    horizon: int
    chunk_size: int
    n_action_steps: int
    diverged: int = 0
    """Episodes that ended because the simulation blew up; failures."""
    mujoco: str = ""
    """Version of the MuJoCo that simulated; "" where the environments do not say."""
    initial_states: str = ""
    """Where the scenes come from, of a suite that says so; "" is: drawn from the seeds."""
    held: dict[str, int] | None = None
    """With `hold_ungrounded`: "episodes" in which the policy was held at least once, and of all its "decisions" how
    many were "held_decisions"."""
    films: list[Film] = field(default_factory=list)
    each: list[Episode] = field(default_factory=list)
    """The episodes in the order of the seeds."""
    until_width: float | None = None
    """The width of the interval at which no more episodes were to be counted; None: all seeds were asked for."""
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def success_rate(self) -> float:
        """Successes per episode, 0..1."""
        return self.successes / max(1, self.episodes)

    @property
    def outcomes(self) -> list[Outcome]:
        """How each episode ended, in the order of the seeds."""
        return [episode.outcome for episode in self.each]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without films; the writer adds commit and machine (`vla.runtime.provenance`). `by_seed` holds
        the episodes as columns: one entry each in "seed", "task", "phrasing", "outcome" and "steps"."""
        return {
            "suite": self.suite,
            "policy": self.policy,
            "backend": self.backend,
            **Count(self.successes, self.episodes).to_dict(),
            "wrong_object": self.wrong_object,
            "mean_steps": self.mean_steps,
            "diverged": self.diverged,
            "per_task": {name: count.to_dict() for name, count in sorted(self.per_task.items())},
            "per_phrasing": {name: count.to_dict() for name, count in sorted(self.per_phrasing.items())},
            "seeds": list(self.seeds),
            "deterministic": self.deterministic,
            "horizon": self.horizon,
            "chunk_size": self.chunk_size,
            "n_action_steps": self.n_action_steps,
            **{name: value for name in ("mujoco", "initial_states") if (value := getattr(self, name))},
            **({} if self.held is None else {"held": self.held}),
            **({} if self.until_width is None else {"until_width": self.until_width}),
            "controls": self.controls,
            "by_seed": {one.name: [getattr(episode, one.name) for episode in self.each] for one in fields(Episode)},
        }


def evaluate(
    policy: Policy,
    env: VecEnv,
    seeds: Sequence[int],
    *,
    name: str = "policy",
    suite: str = "",
    backend: str = "cpu",
    swap_instruction: bool = False,
    deterministic: bool = True,
    hold_ungrounded: bool = False,
    until_width: float | None = None,
    num_films: int = 0,
    failures: Failures | None = None,
    on_progress: Progress | None = None,
) -> EvalReport:
    """Play one episode per seed and count.

    `swap_instruction` tells the policy to handle another object than the one that counts: a policy that listens fails.
    `hold_ungrounded`: the robot stands still, its gripper as it is, until the policy first sees in the episode what its
    instruction names (`vla.core.grounding.FirstSight`); ValueError for a policy that does not tell.
    `until_width`: count no more episodes, in the order of the seeds, than make the 95% interval this narrow (0..1); all
    of them where it stays wider. Which environment plays a seed does not matter, nor how many there are: the scene
    follows from the seed alone, and so does which episodes are counted. `num_films` keeps the first
    episodes' frames, one per decision, and `failures` is shown how every episode begins and ends. A policy whose
    components lie in another order is reordered by name; ValueError for one that does not fit the environment
    (`vla.core.compatibility`), and for a `suite` that is not the environments' own.
    """
    policy = fitted(policy, env, say=_log.warning)
    seeds = [int(s) for s in seeds]
    if until_width is not None and not 0 < until_width < 1:
        raise ValueError(f"the interval's width lies between 0 and 1, got {until_width:g}")
    if not seeds:
        raise ValueError("evaluate needs at least one seed")
    if len(set(seeds)) < len(seeds):  # the interval takes every episode as one scene more
        twice = next(seed for k, seed in enumerate(seeds) if seed in seeds[:k])
        raise ValueError(f"seed {twice} is given more than once: the same scene would count as several episodes")
    scenes = getattr(env, "suite", None)
    played = getattr(scenes, "name", "")
    if suite and played and Path(suite).stem != played:
        raise ValueError(f"these environments are of the suite {played}, not {suite}")
    if hasattr(scenes, "lacks") and (problem := next(filter(None, map(scenes.lacks, seeds)), None)):
        raise ValueError(problem)  # now, not when the others have been played
    width = min(env.num_envs, len(seeds))
    playing = np.full(env.num_envs, -1)
    playing[:width] = np.arange(width)
    following = width
    # Spare worlds play the first seed too, uncounted: the environment wants every world to have an episode.
    env.reset(seeds=[seeds[max(0, k)] for k in playing])
    sight = FirstSight(threshold_of(policy)) if hold_ungrounded else None

    def forget(worlds: list[int] | None) -> None:
        """New episodes begin in these environments."""
        policy.reset(worlds)
        if sight is not None:
            sight.reset(worlds)

    forget(None)
    obs = env.observation()
    films = {k: Film(obs.instruction[k]) for k in range(min(num_films, width))}
    success = np.zeros(len(seeds), bool)
    wrong, diverged = np.zeros(len(seeds), bool), np.zeros(len(seeds), bool)
    steps, replays = np.zeros(len(seeds), np.int64), np.zeros(len(seeds), np.int64)
    labels: list[tuple[str, str]] = [("", "")] * len(seeds)
    for world in range(width):
        labels[world] = _labels(env, world)
    finished, chunk_size, n_action_steps = 0, 0, 0
    held_once = np.zeros(len(seeds), bool)
    held_decisions, decisions = np.zeros((2, len(seeds)), int)
    counting = _Counting(len(seeds), until_width)
    while finished < len(seeds) and not counting.enough:
        told = env.alternative_instructions() if swap_instruction else obs.instruction
        for k, film in films.items():
            for world in np.flatnonzero(playing == k):
                film.add(obs, world, told[world])
        if failures is not None:
            for world in np.flatnonzero((playing >= 0) & (steps[playing] == 0)):
                failures.begin(int(playing[world]), obs, world, told[world])
        seen = replace(obs, instruction=told, live=playing >= 0)
        whole = policy.act(seen)
        chunk = executed(policy.spec, whole)
        chunk_size, n_action_steps = whole.shape[1], chunk.shape[1]
        if sight is not None:
            held = sight.holds(confidence_of(policy), told) & seen.live
            chunk = np.where(held[:, None, None], _still(env, obs)[:, None], chunk)
            held_once[playing[held]] = True
            held_decisions[playing[held]] += 1
            decisions[playing[seen.live]] += 1
        result = env.step_chunk(chunk)
        live = playing >= 0
        steps[playing[live]] += result.n_steps[live]
        over = live & (result.terminated | result.truncated)
        obs = result.obs
        lost = over & result.worker_restarted
        lost[lost] = replays[playing[lost]] < _MAX_REPLAYS
        if lost.any():  # the machine's failure, not the policy's: the same episode once more
            again, over = np.flatnonzero(lost), over & ~lost
            replays[playing[again]] += 1
            steps[playing[again]] = 0
            for k in set(playing[again].tolist()) & set(films):
                films[k].frames.clear()
            obs = env.reset(seeds=[seeds[playing[w]] for w in again], env_ids=again.tolist())
            held_once[playing[again]] = False
            forget(again.tolist())
        if over.any():
            ended = np.flatnonzero(over)
            indices = playing[ended]
            success[indices] = result.info["success"][ended]
            wrong[indices] = result.info["wrong_object"][ended]
            diverged[indices] = result.diverged[ended]
            counting.ended(indices, success)
            for k, film in films.items():
                for world in ended[indices == k]:
                    film.finish(obs, world, bool(success[k]), bool(wrong[k]))
            if failures is not None:
                for world, k in zip(ended, indices.tolist(), strict=True):
                    failures.end(k, obs, world, _outcome(bool(success[k]), bool(wrong[k]), bool(diverged[k])))
            finished += len(ended)
            fresh = [w for w in ended if following + list(ended).index(w) < len(seeds)]
            playing[ended] = -1
            for world in fresh:
                playing[world] = following
                following += 1
            if fresh:
                obs = env.reset(seeds=[seeds[playing[w]] for w in fresh], env_ids=fresh)
                forget(fresh)
                for world in fresh:
                    labels[playing[world]] = _labels(env, world)
            if on_progress:
                on_progress(finished, len(seeds), int(success.sum()))
    n = counting.episodes
    success, wrong, diverged, steps, labels = success[:n], wrong[:n], diverged[:n], steps[:n], labels[:n]
    outcomes: list[Outcome] = [_outcome(*map(bool, flags)) for flags in zip(success, wrong, diverged, strict=True)]
    return EvalReport(
        suite=suite,
        policy=name,
        backend=backend,
        successes=int(success.sum()),
        episodes=n,
        wrong_object=int(wrong.sum()),
        mean_steps=float(steps[success].mean()) if success.any() else 0.0,
        per_task=_group([task for task, _ in labels], success),
        per_phrasing=_group([template for _, template in labels], success),
        seeds=(seeds[0], seeds[n - 1]),
        deterministic=deterministic,
        horizon=env.horizon,
        chunk_size=chunk_size,
        n_action_steps=n_action_steps,
        diverged=int(diverged.sum()),
        mujoco=getattr(env, "mujoco_version", ""),
        initial_states=scenes.initial_states(seeds[:n]) if hasattr(scenes, "initial_states") else "",
        held=None
        if sight is None
        else {
            "episodes": int(held_once[:n].sum()),
            "held_decisions": int(held_decisions[:n].sum()),
            "decisions": int(decisions[:n].sum()),
        },
        films=[films[k] for k in sorted(films) if k < n],
        each=[
            Episode(seed, *words, outcome, int(taken))
            for seed, words, outcome, taken in zip(seeds[:n], labels, outcomes, steps, strict=True)
        ],
        until_width=until_width,
    )


class _Counting:
    """How many episodes count: all, or the fewest whose 95% interval is narrow enough.

    Only the order of the seeds decides, not that in which episodes end: successes end early, and a count of whatever
    ended first would be too high, and would depend on the number of environments.
    """

    def __init__(self, wanted: int, width: float | None) -> None:
        self.episodes, self.enough = wanted, False
        self._width = width
        self._over = np.zeros(wanted, bool)
        self._seen, self._won = 0, 0

    def ended(self, indices: np.ndarray, success: np.ndarray) -> None:
        """These episodes have ended; `success` (episodes,) is of all."""
        self._over[indices] = True
        while self._width is not None and not self.enough and self._seen < len(self._over) and self._over[self._seen]:
            self._won += int(success[self._seen])
            self._seen += 1
            low, high = wilson95(self._won, self._seen)
            if high - low <= self._width:
                self.episodes, self.enough = self._seen, True


def _outcome(success: bool, wrong: bool, diverged: bool) -> Outcome:
    return "success" if success else "wrong object" if wrong else "diverged" if diverged else "out of time"


def _still(env: VecEnv, obs: Observation) -> np.ndarray:
    """(B, A) the action that leaves every robot as it is: no displacement, the gripper as commanded before."""
    action = np.zeros((env.num_envs, env.action_spec.dim), np.float32)
    if "gripper" in env.action_spec.names and "gripper_command" in env.proprio_names:
        place = env.proprio_names.index("gripper_command")
        action[:, env.action_spec.names.index("gripper")] = obs.proprio[:, place]
    return action


def _labels(env: VecEnv, world: int) -> tuple[str, str]:
    return env.tasks[world] or "task", env.templates[world] or "instruction"


def _group(keys: Sequence[str], success: np.ndarray) -> dict[str, Count]:
    out: dict[str, Count] = {}
    for key in dict.fromkeys(keys):
        mine = np.array([k == key for k in keys])
        out[key] = Count(int(success[mine].sum()), int(mine.sum()))
    return out
