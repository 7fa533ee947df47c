"""`vla experiment reset-free`: a task and its undo practised without resets, from one imitation policy.

May import every package. Arms differ in how they learn offline and online, and in who rewards them; the demonstrations,
the imitation policy and the logged episodes of a seed are theirs together. Success is the simulator's word.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare
from vla.core.config import load_json, lookup
from vla.model.config import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from rl.configs.offline import ResetFreeConfig
    from vla.model.model import VLA

IMITATION = "imitation"
ARMS: dict[str, tuple[str, str]] = {
    "cal-ql": ("cal-ql", "classifier"),
    "cql": ("cql", "classifier"),
    "awac": ("awac", "classifier"),
    "rlpd": ("rlpd", "classifier"),
    "filtered": ("filtered", "classifier"),
    "shuffled": ("cal-ql", "shuffled"),
    "cal-ql-simulator": ("cal-ql", "simulator"),
    "cql-simulator": ("cql", "simulator"),
    "awac-simulator": ("awac", "simulator"),
    "rlpd-simulator": ("rlpd", "simulator"),
}
"""Algorithm and reward of every arm that learns."""


@dataclass(frozen=True)
class ResetFreeExperimentConfig:
    """Practice without resets: equal logs, decisions and evaluation scenes for every arm."""

    suite: str = "tabletop-tray"
    """The suite that has both tasks; its other tasks are prior experience, in the demonstrations."""
    arms: tuple[str, ...] = (IMITATION, "filtered", "cal-ql", "cql", "awac", "shuffled", "cal-ql-simulator")
    """imitation: the initial policy of all arms. filtered: its residual imitates the demonstrations and what is
    rewarded. cal-ql, cql, awac, rlpd: offline and online RL of the same residual. A classifier learnt from the logs
    rewards them all. shuffled: cal-ql with a classifier learnt from shuffled labels, a control that must not improve.
    cal-ql-simulator and the like: rewarded by the simulator."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and imitation policy."""
    demos: int = 96
    """Demonstrations: a third of each task of the pair, the rest of the suite's other tasks."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1300
    """Training steps of imitation."""
    logged_episodes: int = 96
    """Episodes of the imitation policy, with noise, that are logged with their outcomes before anything is learnt."""
    offline_steps: int = 1500
    """Critic updates on demonstrations and logs."""
    decisions: int = 6_000
    """Chunks executed while practising, over all environments."""
    episodes: int = 50
    """Evaluation scenes of each of the two tasks."""
    num_envs: int = 16
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def reset_free(config: ResetFreeExperimentConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, {IMITATION: None, **ARMS}, "arm")
    names = ("suite", "demos", "backbone", "steps", "logged_episodes", "offline_steps", "decisions", "episodes")
    result = compare(
        "reset-free", config.arms, config.seeds, partial(_learn_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in (*names, "num_envs")},
        figures={
            "forward": lambda rows: _told(rows, "end", 0),
            "undo": lambda rows: _told(rows, "end", 1),
            "at_switch": lambda rows: _told(rows, "switch"),
            "practised": lambda rows: [row["practised"] for row in rows],
            "resets": lambda rows: [row["resets"] for row in rows],
            "classifier": lambda rows: [row["classifier"] for row in rows],
            "train_seconds": lambda rows: [row["train_seconds"] for row in rows],
        },
        on_progress=on_progress,
    )  # fmt: skip
    for shown_elsewhere in ("practised", "resets", "classifier"):
        result["columns"].remove(shown_elsewhere)
    return result


def _told(rows: list[Row], when: str, task: int | None = None) -> str:
    """Successes of all rows at this moment, in one of the two tasks or both, as "k/n"; "" where there was none."""
    counts = [
        count
        for row in rows
        for evaluation in row["evaluations"]
        if evaluation["when"] == when
        for number, count in enumerate(evaluation["tasks"].values())
        if task in (None, number)
    ]
    return "{}/{}".format(*(sum(column) for column in zip(*counts, strict=True))) if counts else ""


def settings(config: ResetFreeExperimentConfig, arm: str, seed: int) -> ResetFreeConfig:
    """The run of an arm."""
    from rl.configs.offline import ResetFreeConfig

    algorithm, reward = ARMS[arm]
    run = ResetFreeConfig()
    return replace(
        run, suite=config.suite, num_envs=config.num_envs, logged_episodes=config.logged_episodes,
        offline_steps=config.offline_steps, decisions=config.decisions, reward=reward, seed=seed,
        evaluate_at=("switch", "online", "end"), evaluate_every=max(1, config.decisions // 2),
        window=max(1, config.decisions // 10), agent=replace(run.agent, algorithm=algorithm),
    )  # fmt: skip


def imitated(config: ResetFreeExperimentConfig, seed: int, out: Path) -> tuple[VLA, Path]:
    """The seed's imitation policy, and the folder of its demonstrations: both made unless they are there."""
    from envs.demos.record import record
    from envs.registry import load_suite
    from envs.seeds import DEMO_BLOCK
    from rl.configs.offline import ResetFreeConfig
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE
    from vla.data.lerobot_dataset import load_dataset
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    recipe = RECIPES["tabletop-few"]()
    model = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, steps=config.steps, seed=seed, num_threads=1, model=model)
    backbone = load_backbone(config.backbone)
    pair = ResetFreeConfig().pair
    others = tuple(task for task in load_suite(config.suite).tasks if task not in pair)
    dataset = record(
        config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers,
        image_size=getattr(backbone, "image_size", IMAGE_SIZE), tasks=(*pair, *pair, *others),
    )  # fmt: skip
    demos, folder = load_dataset(dataset), out / f"policy-{seed}"
    vla = build_vla(recipe, demos, backbone=backbone)
    if train(recipe, vla, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return vla.eval(), dataset


def _learn_and_evaluate(config: ResetFreeExperimentConfig, out: Path, arm: str, seed: int) -> Row:
    import torch

    from envs import make_vec
    from envs.registry import load_suite
    from envs.sim.render_options import drawn_for
    from rl.configs.offline import ResetFreeConfig
    from rl.offline.session import learn_without_resets, true_success
    from vla.core.checkpoint import CONFIG
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.policy import VLAPolicy

    vla, dataset = imitated(config, seed, out)
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it saves
    first = load_suite(config.suite).eval_seed0
    drawn = drawn_for(VLAPolicy(vla))
    referee = make_vec(config.suite, config.num_envs, num_workers=config.workers, **drawn)
    pair = ResetFreeConfig().pair
    try:
        judge = true_success(vla, referee, pair, range(first, first + config.episodes))
        if arm == IMITATION:
            tasks = judge()
            return _row([{"decisions": 0, "when": "end", "tasks": tasks}], None, {}, 0.0)
        folder, run = out / f"{arm}-{seed}", settings(config, arm, seed)
        worlds = make_vec(config.suite, config.num_envs, num_workers=config.workers, **drawn)
        began = time.monotonic()
        try:
            outcome = learn_without_resets(
                vla, worlds, load_dataset(dataset), run, folder, evaluate=judge, logs_at=out / f"logs-{seed}",
                resume=(folder / "last" / CONFIG).is_file(),
            )  # fmt: skip
        finally:
            worlds.close()
    finally:
        referee.close()
    told = folder / "classifier.json"
    row = _row(outcome.evaluations, load_json(told) if told.is_file() else None, outcome.resets, began)
    windows = [{k: v for k, v in window.items() if k != "resets"} for window in outcome.windows]
    return row | {"practised": windows, "control_steps": outcome.control_steps}


def _row(
    evaluations: list[dict[str, Any]], classifier: dict[str, Any] | None, resets: dict[str, int], began: float
) -> Row:
    counts = list(evaluations[-1]["tasks"].values())
    return {
        "successes": sum(k for k, _ in counts),
        "episodes": sum(n for _, n in counts),
        "wrong_object": 0,
        "evaluations": evaluations,
        "classifier": classifier,
        "resets": resets,
        "practised": [],
        "control_steps": 0,
        "train_seconds": round(time.monotonic() - began, 1) if began else 0.0,
    }
