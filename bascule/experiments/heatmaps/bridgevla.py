"""`vla experiment bridgevla`: heat-maps and chunks from the same three demonstrations of a task, and what must fail.

BridgeVLA (arXiv 2506.07961): a policy whose answers lie in the same image space as its inputs learns from a few
demonstrations. The controls: cameras whose calibration is wrong by 20 degrees, a head that has not been pre-trained on
named things, demonstrations whose instructions were shuffled, and another object asked for than the one counted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from bascule.experiments.spatial.calibration import WRONG_DEG, Miscalibrated
from bascule.experiments.spatial.xyz import replan_times
from vla.core.config import lookup
from vla.core.types import ActionSpec
from vla.model.config import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from vla.core.types import Observation, Policy
    from vla.data.lerobot_dataset import DemoSet

ARMS = ("heatmap", "chunk", "no-pretraining", "shuffled", "wrong-extrinsics", "swapped-instruction")
"""The last two are the first one's policy, in front of badly calibrated cameras and told of another object."""


@dataclass(frozen=True)
class BridgeConfig:
    """Heat-maps against chunks: equal backbone, demonstrations and evaluation scenes."""

    suite: str = "tabletop-object"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ARMS
    """heatmap; chunk: the usual policy; no-pretraining: a head that has not learnt where named things are; shuffled:
    instructions exchanged between demonstrations; the others are heatmap's policy with cameras that are calibrated
    wrongly by 20 degrees, and told of another object."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 3
    """Demonstrations of each task."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1300
    """Gradient steps of the chunk policy."""
    episodes: int = 96
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 24
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def bridgevla(config: BridgeConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, dict.fromkeys(ARMS), "arm of the experiment")
    return compare(
        "bridgevla", config.arms, config.seeds, partial(_run, config, out), out,
        asked={name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes")},
        figures={
            "train_seconds": lambda rows: round(statistics.mean(row["train_seconds"] for row in rows), 1),
            "replan_ms": lambda rows: round(statistics.median(row["replan_ms"] for row in rows), 1),
            "replan_ratio": _median_ratio,
        },
        on_progress=on_progress,
    )  # fmt: skip


def _run(config: BridgeConfig, out: Path, arm: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate

    began = time.monotonic()
    policy = _policy(config, out, arm, seed)
    seconds = time.monotonic() - began
    if arm == "wrong-extrinsics":
        policy = Miscalibrated(policy, WRONG_DEG)
    with evaluation_scenes(config, policy) as (env, seeds):
        report = evaluate(policy, env, seeds, suite=config.suite, swap_instruction=arm == "swapped-instruction")
        one = env.observation().select([0])
    replan_ms, ratio = replan_times(policy, *_plain(config, one))
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "per_task": {task: [count.successes, count.episodes] for task, count in sorted(report.per_task.items())},
        "train_seconds": round(seconds, 1),
        "replan_ms": round(replan_ms, 2),
        "replan_ratio": round(ratio, 3),
    }


def _median_ratio(rows: list[Row]) -> float | None:
    """None for rows of an earlier version, which did not measure it."""
    measured = [row["replan_ratio"] for row in rows if "replan_ratio" in row]
    return round(statistics.median(measured), 2) if measured else None


def demonstrations(config: BridgeConfig, out: Path, seed: int) -> DemoSet:
    """The seed's demonstrations of every task, with depth; recorded once."""
    from envs.demos.record import record
    from envs.registry import load_suite
    from envs.seeds import DEMO_BLOCK
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.heatmap.config import HeatmapConfig

    tasks = load_suite(config.suite).tasks
    folder = record(
        config.suite, config.demos * len(tasks), out / f"demos-{seed}", seed0=DEMO_BLOCK * seed,
        num_workers=config.workers, image_size=HeatmapConfig().picture_size, tasks=tasks, depth=True,
    )  # fmt: skip
    return load_dataset(folder, depth=True)


def shuffled(demos: DemoSet, seed: int) -> DemoSet:
    """The same demonstrations, each with the instruction of another one."""
    episodes = demos.episodes
    others = np.roll(np.random.default_rng(seed).permutation(len(episodes)), 1)
    order = np.random.default_rng(seed).permutation(len(episodes))
    given = {episodes[a]: episodes[b] for a, b in zip(order, others, strict=True)}
    first = {number: int(np.argmax(demos.episode_index == number)) for number in episodes}
    return replace(demos, instruction=[demos.instruction[first[given[number]]] for number in demos.episode_index])


def _policy(config: BridgeConfig, out: Path, arm: str, seed: int) -> Policy:
    """The arm's policy in OUT, trained unless it is there."""
    if arm == "chunk":
        return _chunk_policy(config, out, seed)
    from vla.model.heatmap.policy import HeatmapPolicy
    from vla.training.heatmap.train import HeatmapTrainConfig, build, train

    name = arm if arm in ("no-pretraining", "shuffled") else "heatmap"
    folder = out / f"policy-{name}-{seed}"
    if (folder / "config.json").is_file():
        return HeatmapPolicy.load(folder)
    demos = demonstrations(config, out, seed)
    demos = shuffled(demos, seed) if arm == "shuffled" else demos
    recipe = HeatmapTrainConfig(
        model=replace(HeatmapTrainConfig().model, backbone=config.backbone), seed=seed,
        pretrained=None if arm == "no-pretraining" else HeatmapTrainConfig().pretrained,
    )  # fmt: skip
    policy = build(recipe, demos)
    train(recipe, policy, demos, folder)
    return policy


def _chunk_policy(config: BridgeConfig, out: Path, seed: int) -> Policy:
    from vla.model.policy import VLAPolicy
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    folder = out / f"policy-chunk-{seed}"
    recipe = RECIPES["tabletop-few"]()
    model = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, steps=config.steps, seed=seed, model=model, num_threads=0)
    demos = demonstrations(config, out, seed)
    vla = build_vla(recipe, demos)
    if train(recipe, vla, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return VLAPolicy(vla.eval())


def _plain(config: BridgeConfig, obs: Observation) -> tuple[Policy, Observation, Observation]:
    """An untrained chunk policy of the same cameras and backbone, with which the time of a decision about `obs` is
    compared; `obs` itself; and what that policy is shown: pictures as it has them drawn, and no depth."""
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy
    from vla.processing.stats import Stats
    from vla.training.recipes import RECIPES

    model = replace(RECIPES["tabletop-few"]().model, backbone=config.backbone)
    spec = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)
    stats = Stats.from_arrays(np.concatenate([obs.proprio - 1, obs.proprio + 1]), np.array([spec.low, spec.high]))
    vla = VLA.build(model, stats=stats, action_spec=spec, cameras=tuple(obs.images)).eval()
    size = vla.processor.config.image_size
    picked = {name: np.arange(size) * image.shape[1] // size for name, image in obs.images.items()}
    images = {name: image[:, picked[name][:, None], picked[name]] for name, image in obs.images.items()}
    return VLAPolicy(vla), obs, replace(obs, images=images, depth=None, intrinsics=None, extrinsics=None)
