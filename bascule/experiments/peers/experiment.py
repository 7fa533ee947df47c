"""The arms of `vla experiment peers`, evaluated in the same scenes. May import every package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from bascule.experiments.peers.budget import BUDGETS, Budget, Learnt, on_gpu
from bascule.experiments.peers.lerobot_peers import PEERS, check_installed, learn, starting_weights
from vla.core.config import load_json, lookup
from vla.model.config import DEFAULT_BACKBONE

OURS = ("ours", "ours-rl")
BLIND = "blind"
VERSIONS = ("lerobot", "torch", "torchvision", "diffusers", "accelerate", "mujoco")


@dataclass(frozen=True)
class PeersConfig:
    """Our policies and LeRobot's on the same demonstrations, within the same budgets."""

    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ("ours", "act-small", "diffusion-small", BLIND)
    """ours: imitation by the recipe; ours-rl: online RL after it, within the seconds; blind: one demonstration replayed
    without looking, the floor; the others are LeRobot's (`lerobot_peers.PEERS`)."""
    conditions: tuple[str, ...] = BUDGETS
    """The budgets, one after the other: equal seconds of learning, equal gradient steps of equal batches."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 50
    """Number of demonstrations."""
    recipe: str = "tabletop-few"
    """Our imitation recipe."""
    backbone: str = DEFAULT_BACKBONE
    """The backbone of our policies."""
    seconds: int = 300
    """Seconds of learning: on a CPU on one core, counted in the time it computes; on a GPU by the wall's clock."""
    steps: int = 200
    """Gradient steps of imitation."""
    batch_size: int = 16
    """Frames of a gradient step: of LeRobot's policies, and of all at equal steps."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def peers(config: PeersConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm in every budget with every seed: what `arms.compare` returns, with the "suite" and the "protocol".
    ValueError for an unknown arm, budget or recipe, and where LeRobot's trainer lacks packages."""
    from vla.training.recipes import RECIPES

    for arm in config.arms:
        lookup(arm, {name: None for name in (*OURS, *PEERS, BLIND)}, "arm")
    budgets = [
        Budget(lookup(name, {b: b for b in BUDGETS}, "budget"), getattr(config, name)) for name in config.conditions
    ]
    lookup(config.recipe, RECIPES, "recipe")
    if "ours-rl" in config.arms and "seconds" not in config.conditions:
        raise ValueError("ours-rl learns within seconds alone: name them in --conditions, or leave that arm out")
    usual = PeersConfig()
    for name in BUDGETS:
        if name not in config.conditions and getattr(config, name) != getattr(usual, name):
            raise ValueError(f"--{name} changes nothing with --conditions {' '.join(config.conditions)}: leave it out")
    if any(arm in PEERS for arm in config.arms):
        check_installed()
    runs = {name: run for arm in config.arms for name, run in _runs(config, arm, budgets)}
    result = compare(
        "peers", list(runs), config.seeds, lambda name, seed: _run(config, out, runs[name], name, seed), out,
        asked={
            name: getattr(config, name) for name in ("suite", "demos", "recipe", "backbone", "batch_size", "episodes")
        },
        figures={
            "steps": _mean("steps"),
            "train_seconds": _mean("train_seconds"),
            "parameters": lambda rows: rows[0]["parameters"],
            "trained_parameters": lambda rows: rows[0]["trained_parameters"],
        },
        on_progress=on_progress,
    )  # fmt: skip
    return result | {"suite": config.suite, "protocol": _protocol(config, out)}


Arm = Callable[[int, Path, Path], Learnt]
"""(seed, demonstrations, folder of the run) -> what was learnt."""


def _runs(config: PeersConfig, arm: str, budgets: list[Budget]) -> list[tuple[str, Arm | None]]:
    """[(name, how it learns)] of an arm, once for every budget that it has; None: it learns nothing."""
    if arm == BLIND:
        return [(arm, None)]
    budgets = [budget for budget in budgets if arm != "ours-rl" or budget.kind == "seconds"]
    return [(f"{arm}-{budget.label}", partial(_learn, config, arm, budget)) for budget in budgets]


def _learn(config: PeersConfig, arm: str, budget: Budget, seed: int, dataset: Path, folder: Path) -> Learnt:
    if arm in PEERS:
        return learn(PEERS[arm], dataset, folder, budget, batch_size=config.batch_size, seed=seed)
    from bascule.experiments.peers.ours import imitate, refine

    imitation = budget
    if arm == "ours-rl":  # imitation has half of the time at most
        imitation, folder = Budget("seconds", budget.amount // 2), folder / "imitation"
    before = imitate(
        dataset, folder, imitation, recipe=config.recipe, backbone=config.backbone, batch_size=config.batch_size,
        seed=seed,
    )  # fmt: skip
    if arm == "ours":
        return before
    run = folder.parent / "rl"
    return refine(before, dataset, run, budget, suite=config.suite, seed=seed, workers=config.workers)


def _run(config: PeersConfig, out: Path, how: Arm | None, name: str, seed: int) -> Row:
    """The row of an arm and a seed: learn, then play the suite's evaluation scenes."""
    from envs.evaluation.baselines import blind_replay
    from envs.evaluation.evaluate import evaluate
    from envs.registry import load_suite

    learnt = None if how is None else how(seed, demonstrations(config, out, seed), out / f"{name}-{seed}")
    most = getattr(load_suite(config.suite), "max_envs", config.num_envs)
    scenes = replace(config, num_envs=min(config.num_envs, config.episodes, most))
    with evaluation_scenes(scenes, learnt and learnt.policy) as (env, seeds):
        env.set_rendering(learnt is not None)
        policy = blind_replay(config.suite, env) if learnt is None else learnt.policy
        report = evaluate(policy, env, seeds, suite=config.suite)
    told = (
        {"steps": 0, "train_seconds": 0.0, "parameters": 0, "trained_parameters": 0}
        if learnt is None
        else _told(learnt)
    )
    return told | {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "outcomes": report.outcomes,
        "evaluation_seeds": list(report.seeds),
        "horizon": report.horizon,
        **({"mujoco": report.mujoco} if report.mujoco else {}),
        **({"initial_states": report.initial_states} if report.initial_states else {}),
    }


def _told(learnt: Learnt) -> Row:
    spec = learnt.policy.spec
    return {
        "steps": learnt.steps,
        "batch_size": learnt.batch_size,
        "train_seconds": round(learnt.seconds, 1),
        "wall_seconds": round(learnt.wall_seconds, 1),
        "parameters": learnt.parameters,
        "trained_parameters": learnt.trained_parameters,
        "chunk_size": learnt.chunk_size,
        "n_action_steps": learnt.n_action_steps,
        "observations": spec.observations,
        "cameras": list(spec.cameras or ()),
        "picture_size": spec.picture_size,
        "folder": str(learnt.folder),
    }


def demonstrations(config: PeersConfig, out: Path, seed: int) -> Path:
    """The seed's demonstrations, with pictures as our backbone reads them: those of all arms."""
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE

    return record(
        config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers,
        image_size=getattr(load_backbone(config.backbone), "image_size", IMAGE_SIZE),
    )  # fmt: skip


def _protocol(config: PeersConfig, out: Path) -> dict[str, Any]:
    """The facts that a reader needs to compare these figures with others'."""
    from envs.registry import load_suite

    found = sorted(out.glob("demos-*/meta/info.json"))
    info = load_json(found[0]) if found else {}
    pictures = {name: one["shape"][:2] for name, one in info.get("features", {}).items() if "images" in name}
    used = {arm: PEERS[arm] for arm in config.arms if arm in PEERS}
    return {
        "demonstrations": config.demos,
        "demonstrators": "scripted expert",
        "frames": info.get("total_frames"),
        "cameras": pictures,
        "horizon": load_suite(config.suite).horizon,
        "recipe": config.recipe,
        "clock": "wall" if on_gpu() else "the time that one core computes",
        "lerobot_flags": {arm: [peer.kind, *peer.flags] for arm, peer in used.items()},
        "lerobot_visual_weights": {arm: starting_weights(peer) for arm, peer in used.items()},
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mean(name: str) -> Callable[[list[Row]], float]:
    return lambda rows: round(sum(row[name] for row in rows) / len(rows), 1)
