"""`vla experiment talk`: what talking costs acting, and how true it is. May import every package.

After VLA4CD (EMNLP 2025), whose reviewers asked for what is measured here: that the text is true of the simulator's
state, and that the object which the text names is the one that the hand takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bascule.experiments.arms import Report, Row, begin, in_turn, kept
from bascule.experiments.talk.config import TalkExperimentConfig
from vla.core.config import lookup

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet
    from vla.model.model import VLA
    from vla.training.train_config import TrainConfig

Counts = dict[str, list[int]]
"""By what was counted: [k, n]."""


def talk(config: TalkExperimentConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed: {"experiment", "seeds", "arms": {"ARM: what": counts}, "columns", "figures",
    "seconds"}. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, ARMS, "arm")
    started = time.monotonic()
    asked = {
        name: getattr(config, name)
        for name in ("suite", "demos", "backbone", "steps", "tuned_steps", "talk_episodes", "episodes")
    }
    begin(out, "talk", asked, [out / f"{arm}-{seed}.json" for arm in config.arms for seed in config.seeds])
    _questions(config, out)
    rows: dict[str, list[Row]] = {}
    pairs = [(seed, arm) for seed in config.seeds for arm in config.arms]
    for seed, arm in in_turn(pairs, lambda pair: f"{pair[1]}, seed {pair[0]}", on_progress):
        row = kept(out / f"{arm}-{seed}.json", asked, partial(_run, config, out, arm, seed))
        rows.setdefault(arm, []).append(row | {"seed": seed})
    return {
        "experiment": "talk",
        "seeds": list(config.seeds),
        "arms": {f"{arm}: {what}": counted for arm, found in rows.items() for what, counted in _summed(found).items()},
        "columns": ["per_seed"],
        "figures": {
            f"{arm}: {name}": {str(row["seed"]): row["figures"][name] for row in found}
            for arm, found in rows.items()
            for name in found[0]["figures"]
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def _summed(rows: list[Row]) -> dict[str, Any]:
    """Counts of an arm over its seeds."""
    from envs.evaluation.evaluate import Count

    found = {}
    for what in dict.fromkeys(name for row in rows for name in row["counts"]):
        each = {str(row["seed"]): row["counts"][what] for row in rows if what in row["counts"]}
        total = Count(sum(k for k, _ in each.values()), sum(n for _, n in each.values()))
        found[what] = total.to_dict() | {"per_seed": each}
    return found


def _questions(config: TalkExperimentConfig, out: Path) -> None:
    """The sets to learn from and to be examined on; those that are there stay."""
    from envs.grounding.talk_data import generate_talk
    from envs.seeds import FIRST_EVALUATION_SEED
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE

    size = getattr(load_backbone(config.backbone), "image_size", IMAGE_SIZE)
    suites = ("tabletop-pick", "tabletop-ten")
    for name, episodes, seed0, wording, of in (
        ("talk-train", config.talk_episodes, 0, "train", 4),
        ("talk-exam", config.episodes, FIRST_EVALUATION_SEED, "train", 2),
        ("talk-words", config.episodes // 2, FIRST_EVALUATION_SEED, "heldout", 2),
    ):
        if not (out / name).exists():
            generate_talk(
                suites, episodes, out / name, seed0=seed0, num_workers=config.workers, image_size=size,
                wording=wording, of=of,
            )  # fmt: skip


def _run(config: TalkExperimentConfig, out: Path, arm: str, seed: int) -> Row:
    began = time.monotonic()
    vla = ARMS[arm](config, out, seed)
    figures: dict[str, Any] = {"train_seconds": round(time.monotonic() - began, 1)}
    counts: Counts = {}
    if vla.talker is not None:
        counts |= _examined(vla, out)
        figures["talker_parameters"] = sum(p.numel() for p in vla.talker.parameters())
    if arm not in ("shuffled", "text-tuned"):
        from bascule.experiments.talk.rollout import play, timed

        counts |= play(vla, config)
        if arm == "adapter":
            figures |= timed(vla, config.suite)
    return {"counts": counts, "figures": figures}


def _examined(vla: VLA, out: Path) -> Counts:
    """Exact match on held-out scenes, in all and by kind of question; and what must fail."""
    from vla.training.talking import TalkSet, examine

    exam, words = TalkSet(out / "talk-exam"), TalkSet(out / "talk-words")
    rows = range(len(exam))
    replies = examine(vla, exam, rows)
    counts: Counts = {}

    def count(what: str, right: bool) -> None:
        k, n = counts.get(what, [0, 0])
        counts[what] = [k + right, n + 1]

    for reply in replies:
        count(f"answers right, {exam.suite[reply.moment]}", reply.right)
        count(f"answers right, {reply.kind}", reply.right)
        count("answers right when sure (confidence above 0.5)", reply.right) if reply.confidence > 0.5 else None
    for reply in examine(vla, words, range(len(words))):
        count("answers right, wordings not trained on", reply.right)
        count(f"answers right, wordings not trained on, {reply.kind}", reply.right)
    for kind, right in _most_common(exam).items():  # what a reader of questions alone could reach
        counts[f"most common answer, {kind}"] = right
    shown = np.roll(np.arange(len(exam)), 2 * MOMENTS_APART)  # of the same suite
    for reply in examine(vla, exam, rows[::4], pictures_of=list(shown[::4])):
        count(f"answers right, another scene's pictures, {reply.kind}", reply.right)
    return counts


MOMENTS_APART = 3
"""Moments of one episode in a set (`envs.grounding.talk_data.MOMENTS`); suites alternate by episode."""


def _most_common(data: Any) -> Counts:
    """By kind of question, how often its most frequent answer would be right."""
    answers: dict[str, list[str]] = {}
    for frame in data.asked:
        for kind, _, answer in frame:
            answers.setdefault(kind, []).append(answer)
    return {kind: [max(map(given.count, set(given))), len(given)] for kind, given in answers.items()}


# ---------------------------------------------------------------------- the arms
def _demos(config: TalkExperimentConfig, out: Path, seed: int) -> DemoSet:
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE
    from vla.data.lerobot_dataset import load_dataset

    size = getattr(load_backbone(config.backbone), "image_size", IMAGE_SIZE)
    return load_dataset(
        record(
            config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers,
            image_size=size,
        )
    )  # fmt: skip


def _recipe(
    config: TalkExperimentConfig, out: Path, seed: int, *, tuned: bool, talks: bool, shuffled: bool = False
) -> TrainConfig:
    """The quickstart's imitation, its backbone frozen or learning by adapters, and questions beside it."""
    from vla.backbones.lora import LoRAConfig
    from vla.training.recipes import RECIPES
    from vla.training.talking import talker_for
    from vla.training.train_config import TalkConfig

    recipe = RECIPES["tabletop-few"]()
    model = replace(recipe.model, backbone=config.backbone, lora=LoRAConfig() if tuned else None)
    if talks:
        model = replace(model, talk=talker_for(out / "talk-train", learns=tuned))
    questions = TalkConfig(data=str(out / "talk-train"), shuffled=shuffled) if talks else None
    recipe = replace(recipe, model=model, steps=config.steps, seed=seed, talk=questions, num_threads=1)
    if tuned:
        recipe = replace(recipe, steps=config.tuned_steps, batch_size=32, backbone_lr=1.0)
    return recipe


def _imitated(config: TalkExperimentConfig, out: Path, seed: int, *, name: str, **recipe: bool) -> VLA:
    from vla.model.model import VLA
    from vla.training.talking import TalkTask
    from vla.training.train import build_vla, train

    cfg, demos, folder = _recipe(config, out, seed, **recipe), _demos(config, out, seed), out / f"{name}-{seed}"
    begun = (folder / "config.json").exists()
    vla = VLA.load(folder, merge=False) if begun else build_vla(cfg, demos)
    if cfg.talk is not None and not recipe["tuned"]:
        TalkTask(cfg.talk, vla).keep_sights()  # the backbone is the same for all seeds
    if train(cfg, vla, demos, folder, resume=begun).interrupted:
        raise KeyboardInterrupt
    vla.merge_adapters()
    return vla.eval()


def _text_tuned(config: TalkExperimentConfig, out: Path, seed: int) -> VLA:
    """The decoder learns from the questions alone, as the joint arm's does; its actions are never learnt."""
    import torch

    from vla.training.talking import TalkTask
    from vla.training.train import build_vla
    from vla.training.train_config import learning_rate

    cfg = _recipe(config, out, seed, tuned=True, talks=True)
    vla = build_vla(cfg, _demos(config, out, seed)).train()
    task, learns = TalkTask(cfg.talk, vla), [p for part in (vla.backbone, vla.talker) for p in part.parameters()]
    learns = [p for p in learns if p.requires_grad]
    optimiser = torch.optim.AdamW(learns, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    with torch.random.fork_rng(devices=[]):
        for step in range(cfg.steps):
            torch.manual_seed(seed * 1_000_003 + step)
            optimiser.param_groups[0]["lr"] = learning_rate(cfg, step)
            optimiser.zero_grad()
            task(None, *task.draw(seed * 1_000_003 + step)).backward()
            torch.nn.utils.clip_grad_norm_(learns, cfg.grad_clip)
            optimiser.step()
    vla.merge_adapters()
    return vla.eval()


ARMS: dict[str, Callable[[TalkExperimentConfig, Path, int], VLA]] = {
    "action-only": partial(_imitated, name="action-only", tuned=False, talks=False),
    "adapter": partial(_imitated, name="adapter", tuned=False, talks=True),
    "shuffled": partial(_imitated, name="shuffled", tuned=False, talks=True, shuffled=True),
    "action-tuned": partial(_imitated, name="action-tuned", tuned=True, talks=False),
    "joint": partial(_imitated, name="joint", tuned=True, talks=True),
    "text-tuned": _text_tuned,
}
"""By name: what trains it."""
