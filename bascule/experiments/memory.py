"""`vla experiment memory`: policies that remember, where the present frame does not say what comes next."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes, imitate
from vla.core.config import load_json, lookup
from vla.model.config import DEFAULT_BACKBONE, MemoryConfig, VLAConfig
from vla.model.memory.recall import EpisodeMemory

if TYPE_CHECKING:
    from vla.core.types import Observation
    from vla.model.policy import VLAPolicy

RULES = ("bank", "uniform", "last", "current")
SHUFFLED = "shuffled"
"""The arm that is the first one's policy, given memories of other episodes: a control that must fail."""
_POOL = 100
_TURNS = 20


@dataclass(frozen=True)
class RememberConfig:
    """Equal demonstrations, training steps, evaluation scenes and number of memory tokens for every arm."""

    suite: str = "tabletop-memory"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ("bank", "uniform", "current", SHUFFLED)
    """Rules of `vla.model.config.MemoryConfig`; current repeats the present frame. The last two must fail."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 100
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1500
    """Gradient steps of imitation."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    frames: int = 4
    """Earlier decisions that a policy looks at."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def memory(config: RememberConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Imitation of every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, dict.fromkeys((*RULES, SHUFFLED)), "arm")
    if config.arms[0] == SHUFFLED:
        raise ValueError("the arm shuffled is the first arm's policy with other memories: name that arm before it")
    _refuse_other_policy(config, out)
    result = compare(
        "memory", config.arms, config.seeds, partial(_imitate_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes", "frames")},
        figures={
            "replan_ratio": lambda rows: round(statistics.median(row["replan_ratio"] for row in rows), 2),
            "per_task": _per_task,
        },
        on_progress=on_progress,
    )  # fmt: skip
    result["columns"].remove("per_task")
    return result


def _refuse_other_policy(config: RememberConfig, out: Path) -> None:
    """ValueError where OUT holds rows of the arm shuffled that another policy played: their name does not tell."""
    for file in (out / f"{SHUFFLED}-{seed}.json" for seed in config.seeds if SHUFFLED in config.arms):
        played = load_json(file).get("played_by", config.arms[0]) if file.is_file() else config.arms[0]
        if played != config.arms[0]:
            raise ValueError(
                f"{file} is of the policy of arm {played}, which is the first one no longer: name it first, or choose "
                "another --out"
            )


def _imitate_and_evaluate(config: RememberConfig, out: Path, arm: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate
    from vla.model.policy import VLAPolicy

    rule = config.arms[0] if arm == SHUFFLED else arm
    folder, first = out / f"{rule}-{seed}", out / f"{config.arms[0]}-{seed}"
    _share_features(first, folder)
    began = time.monotonic()
    model = imitate(config, seed, out, folder, partial(_remembering, config.frames, rule), keep_features=True)
    seconds = time.monotonic() - began
    policy = VLAPolicy(model.eval())
    if arm == SHUFFLED:
        assert model.config.memory is not None
        policy.memory = OthersMemory(model.config.memory, policy.spec.n_action_steps or model.chunk_size, seed=seed)
    with evaluation_scenes(config, policy) as (env, seeds):
        first_scene = env.reset(seeds=[seeds[0]] * env.num_envs).select([0])
        ratio = _replan_ratio(policy, first_scene, config.backbone)
        report = evaluate(policy, env, seeds, suite=config.suite)
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "tasks": {task: [count.successes, count.episodes] for task, count in sorted(report.per_task.items())},
        "replan_ratio": ratio,
        **({"played_by": rule} if arm == SHUFFLED else {}),
        "train_seconds": round(seconds, 1),
    }


def _remembering(frames: int, rule: Any, model: VLAConfig) -> VLAConfig:
    return replace(model, memory=MemoryConfig(frames=frames, rule=rule))


def _share_features(first: Path, folder: Path) -> None:
    """Let the run in `folder` read the features that the `first` of the seed's runs kept: they are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for kept in first.glob("features-*"):
        link = folder / kept.name
        if folder != first and not link.exists():
            os.symlink(kept.resolve(), link, target_is_directory=True)


def _replan_ratio(policy: VLAPolicy, obs: Observation, backbone: str) -> float:
    """Median time of one decision, by that of a policy without memory in the same run."""
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    vla = policy.vla
    plain = VLAPolicy(
        VLA.build(
            replace(vla.config, memory=None, backbone=backbone), stats=vla.processor.stats,
            action_spec=vla.action_spec, cameras=vla.processor.config.cameras, backbone=vla.backbone,
        ).eval()
    )  # fmt: skip
    seconds: dict[VLAPolicy, list[float]] = {plain: [], policy: []}
    for turn in range(2 * _TURNS):  # in turns, so that a busy machine slows both alike
        for one, times in seconds.items():
            began = time.perf_counter()
            one.act(obs)
            if turn >= _TURNS:
                times.append(time.perf_counter() - began)
    policy.reset()
    return statistics.median(seconds[policy]) / statistics.median(seconds[plain])


def _per_task(rows: list[Row]) -> dict[str, list[int]]:
    """Task -> [successes, episodes] over the seeds."""
    return {
        task: [sum(row["tasks"].get(task, [0, 0])[column] for row in rows) for column in (0, 1)]
        for task in sorted({task for row in rows for task in row["tasks"]})
    }


class OthersMemory(EpisodeMemory):
    """A control that must fail: at every decision the memory of another episode, at any moment of it."""

    def __init__(self, config: MemoryConfig, steps: int, *, seed: int) -> None:
        super().__init__(config, steps)
        self._rng = np.random.default_rng(seed)
        self._pool: deque[tuple[list[int], NDArray[np.float32]]] = deque(maxlen=_POOL)

    def read(self, env_ids: Sequence[int], width: int) -> NDArray[np.float32]:
        """See `EpisodeMemory.read`."""
        own = super().read(env_ids, width)
        self._pool.append((list(env_ids), own))
        return np.stack([self._of_another(env) for env in env_ids])

    def _of_another(self, env: int) -> NDArray[np.float32]:
        while True:
            then, row = (int(self._rng.integers(n)) for n in (len(self._pool), 1 << 30))
            others, memories = self._pool[then]
            if others[row % len(others)] != env or len(others) == 1:
                return memories[row % len(others)]
