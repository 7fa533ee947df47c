"""`vla experiment corrections`: rounds of corrected episodes, beside fresh demonstrations and a control.

A scripted corrector stands in for the person (`envs.experts.corrector`). May import every package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from vla.core.checkpoint import CONFIG
from vla.core.config import lookup
from vla.model.config import DEFAULT_BACKBONE
from vla.training.train_config import InterventionConfig, TrainConfig

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet
    from vla.model.model import VLA

ROUNDS = 3
ARMS = ("start", "round-1", "round-2", "corrections", "everything", "demonstrations", "shuffled")
_ROUND = {"round-1": 1, "round-2": 2, "corrections": 3}
_FRESH_FROM, _CORRECTED_FROM, _APART = 5_000, 10_000, 1_000
"""Scenes of fresh demonstrations and of corrected episodes begin so many after those of the first demonstrations; and
rounds are so far apart."""


@dataclass(frozen=True)
class CorrectionsConfig:
    """Equal training steps, episodes and evaluation scenes for every arm but the start and the earlier rounds."""

    suite: str = "tabletop-pick"
    """The suite to correct and evaluate in, one of picking and placing."""
    arms: tuple[str, ...] = ARMS
    """start: the policy before. round-1, round-2, corrections: it, after one, two, three rounds, each of which goes on
    from the one before with its corrected episodes, too; only the corrector's frames are learnt. everything: the
    policy's own frames of the same episodes, too. demonstrations: as many fresh demonstrations instead. shuffled: the
    corrector's actions permuted among their frames, a control that must fail."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations, corrected episodes and initial weights."""
    demos: int = 20
    """Number of demonstrations that the start learns from; every arm learns from them, too."""
    corrected: int = 20
    """Corrected episodes of each of the three rounds."""
    noise: float = 0.15
    """Noise on the actions while they are recorded, in halves of their range, of demonstrations and corrected episodes
    alike. What the expert and the corrector wanted is what is learnt."""
    recipe: str = "tabletop"
    """Recipe of the start, see `vla list recipes`."""
    start_steps: int = 1300
    """Gradient steps of the start."""
    steps: int = 600
    """Gradient steps of a round. Arms without rounds get three times as many."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    seed0: int = 5_000_000
    """First of the evaluation scenes, the same for every arm and seed."""
    episodes: int = 96
    """Evaluation scenes."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if not 0 <= self.noise < 10:
            return f"--noise must be from 0 to 10 halves of the actions' range, got {self.noise}"
        if self.demos >= _FRESH_FROM // 2:
            return f"--demos must be less than {_FRESH_FROM // 2}, or their scenes meet those of fresh demonstrations"
        return None


def corrections(config: CorrectionsConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. Its columns: "takeovers", how often the
    corrector took over in the episodes learnt from, and "frames", theirs beside all frames of these episodes.
    ValueError for an unknown arm, or a suite whose tasks the corrector does not know."""
    from envs.experts.corrector import check_corrected

    for arm in config.arms:
        lookup(arm, dict.fromkeys(ARMS), "arm")
    check_corrected(config.suite)
    same = ("suite", "demos", "corrected", "noise", "recipe", "start_steps", "steps", "backbone", "seed0", "episodes")
    return compare(
        "corrections", config.arms, config.seeds, partial(_learn_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in same},
        figures={
            "takeovers": lambda rows: sum(row["takeovers"] for row in rows),
            "frames": lambda rows: f"{sum(row['by_hand'] for row in rows)}/{sum(row['frames'] for row in rows)}",
        },
        on_progress=on_progress,
    )  # fmt: skip


def _learn_and_evaluate(config: CorrectionsConfig, out: Path, arm: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate
    from vla.model.policy import VLAPolicy

    lesson = Lesson(config, seed, out / f"seed-{seed}")
    policy = VLAPolicy.load(lesson.policy(arm))
    with evaluation_scenes(config, policy, seed0=config.seed0) as (env, seeds):
        report = evaluate(policy, env, seeds, suite=config.suite)
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        **lesson.shown(arm),
    }


class Lesson:
    """One seed's demonstrations, the policy that they teach, its rounds of corrected episodes, and what is learnt from
    them. All are kept in a folder, where an interrupted run goes on."""

    def __init__(self, config: CorrectionsConfig, seed: int, folder: Path) -> None:
        from vla.training.recipes import RECIPES

        self._config, self._seed, self._folder = config, seed, folder
        recipe = lookup(config.recipe, RECIPES, "recipe")()
        model = replace(recipe.model, backbone=config.backbone)
        self._recipe = replace(recipe, seed=seed, num_threads=1, model=model)
        self.demos = cache(lambda: self._recorded("demos", config.demos, 0))
        self.fresh = cache(lambda: self._recorded("fresh", ROUNDS * config.corrected, _FRESH_FROM))
        self.corrected = cache(self._corrected)

    def policy(self, arm: str) -> Path:
        """The folder of the arm's policy, trained unless it is there."""
        config = self._config
        if arm == "start":
            first = replace(self._recipe, steps=config.start_steps)
            return self._learnt("start", first, self._untrained, self.demos())
        if arm in _ROUND:
            before = self.policy(ARMS[_ROUND[arm] - 1])
            return self._gone_on(arm, before, 1, self._rounds(_ROUND[arm]), InterventionConfig())
        if arm == "demonstrations":
            return self._gone_on(arm, self.policy("start"), ROUNDS, {"fresh": self.fresh()}, None)
        how = InterventionConfig(policy_frames="learn" if arm == "everything" else "leave")
        if arm == "shuffled":
            how = replace(how, shuffle_seed=self._seed)
        return self._gone_on(arm, self.policy("start"), ROUNDS, self._rounds(ROUNDS), how)

    def shown(self, arm: str) -> dict[str, int]:
        """How often the corrector took over in the episodes that the arm learns from, their frames, and all frames."""
        import numpy as np

        from vla.training.interventions import stretches

        told = {"takeovers": 0, "by_hand": 0, "frames": 0}
        rounds = {"start": 0, "demonstrations": 0}.get(arm, _ROUND.get(arm, ROUNDS))
        for part in self._rounds(rounds).values():
            assert part.intervention is not None
            by_hand = part.intervention
            told["takeovers"] += len(np.unique(stretches(by_hand, part.episode_index)[by_hand]))
            told["by_hand"] += int(by_hand.sum())
            told["frames"] += part.num_frames
        return told

    def _rounds(self, count: int) -> dict[str, DemoSet]:
        return {f"corrected-{number}": self.corrected(number) for number in range(1, count + 1)}

    def _untrained(self) -> VLA:
        from vla.training.train import build_vla

        return build_vla(self._recipe, self.demos())

    def _gone_on(
        self, arm: str, before: Path, rounds: int, data: Mapping[str, DemoSet], how: InterventionConfig | None
    ) -> Path:
        """The policy that goes on from `before` with the demonstrations and `data`."""
        from vla.model.model import VLA

        config = replace(self._recipe, steps=rounds * self._config.steps, interventions=how)
        return self._learnt(arm, config, lambda: VLA.load(before), {"demos": self.demos(), **data})

    def _learnt(
        self, name: str, config: TrainConfig, begun: Callable[[], VLA], data: DemoSet | Mapping[str, DemoSet]
    ) -> Path:
        """The policy's folder; an interrupted run continues exactly. KeyboardInterrupt when it is stopped again."""
        from vla.model.model import VLA
        from vla.training.train import train

        folder = self._folder / name
        there = (folder / CONFIG).is_file()
        model = VLA.load(folder, merge=False) if there else begun()
        if train(replace(config, model=model.config), model, data, folder, resume=there).interrupted:
            raise KeyboardInterrupt
        return folder

    def _corrected(self, number: int) -> DemoSet:
        """The corrected episodes of a round: of the policy of the round before."""
        from policies.load import load_policy
        from vla.core.checkpoint import weights_digest

        of = self.policy(ARMS[number - 1])
        played = weights_digest(of), partial(load_policy, of)
        first = _CORRECTED_FROM + _APART * (number - 1)
        return self._recorded(f"corrected-{number}", self._config.corrected, first, policy=played, corrected=True)

    def _recorded(self, name: str, episodes: int, first: int, **more: Any) -> DemoSet:
        from envs.demos.record import record
        from envs.seeds import DEMO_BLOCK
        from vla.backbones.hub import load as load_backbone
        from vla.core.types import IMAGE_SIZE
        from vla.data.lerobot_dataset import load_dataset

        config = self._config
        size = getattr(load_backbone(config.backbone), "image_size", IMAGE_SIZE)
        seed0 = DEMO_BLOCK * self._seed + first
        folder = self._folder / name
        return load_dataset(
            record(
                config.suite,
                episodes,
                folder,
                seed0=seed0,
                num_workers=config.workers,
                image_size=size,
                noise=config.noise,
                **more,
            )  # fmt: skip
        )
