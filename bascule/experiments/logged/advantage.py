"""`vla experiment advantage`: one offline iteration on a policy's own episodes, by imitation and by labels of a value
model.

May import every package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from vla.core.checkpoint import CONFIG
from vla.core.config import load_json, lookup
from vla.model.config import DEFAULT_BACKBONE, AdvantageConfig
from vla.training.train_config import JudgeConfig, TrainConfig

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet
    from vla.model.model import VLA

ARMS = ("start", "successes", "everything", "good", "untold", "bad", "shuffled")
LEARNT_AS = {"untold": "good", "bad": "good"}
"""Arms that are another one's policy, asked otherwise."""
_LOGGED_FROM = 10_000
"""Scenes of the logs begin so many after those of the demonstrations."""


@dataclass(frozen=True)
class AdvantageExperimentConfig:
    """Equal logs, training steps and evaluation scenes for every arm; the start has neither."""

    suite: str = "tabletop-pick"
    """The suite to log and evaluate in."""
    arms: tuple[str, ...] = ARMS
    """start: the policy that is logged; successes: it imitates the demonstrations and its own successes; everything:
    its failures too; good: it is told labels, and asked for good actions. untold, bad: the same policy, told nothing,
    and asked for bad ones; shuffled: labels of other frames. The last two are controls."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations, logs and initial weights."""
    demos: int = 12
    """Number of demonstrations."""
    start_steps: int = 800
    """Gradient steps of the start: with so few demonstrations it succeeds in about half of the scenes."""
    logs: int = 300
    """Number of episodes that it is logged for."""
    noise: float = 0.1
    """Noise on the logged actions, in halves of their range."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1300
    """Gradient steps of every arm, from the start on."""
    good: float = JudgeConfig.good
    """Share of the logged frames that are called good."""
    steps_ahead: int = JudgeConfig.steps_ahead
    """Control steps after which the value model looks again."""
    guidance: float = 8.0
    """Classifier-free guidance of the arms that are told something: of 3, 8 and 16 the best on validation scenes."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if not 0 <= self.noise < 10:
            return f"--noise must be from 0 to 10 halves of the actions' range, got {self.noise}"
        judge = JudgeConfig(good=self.good, steps_ahead=self.steps_ahead)
        return judge.problem() or AdvantageConfig(self.guidance).problem()


def advantage(config: AdvantageExperimentConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. Its columns: "logged", the successes among the
    logged episodes, and "auc", how well the value model tells at an episode's beginning how it will end. ValueError for
    an unknown arm."""
    for arm in config.arms:
        lookup(arm, dict.fromkeys(ARMS), "arm")
    same = ("suite", "demos", "start_steps", "logs", "noise", "backbone", "steps", "good", "steps_ahead", "episodes")
    return compare(
        "advantage", config.arms, config.seeds, partial(_learn_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in (*same, "guidance")},
        figures={
            "logged": _logged,
            "good_of_failures": partial(_mean, "good_of_failures"),
            "auc": partial(_mean, "auc"),
        },
        on_progress=on_progress,
    )  # fmt: skip


def _logged(rows: list[Row]) -> str:
    return f"{sum(row['logged'][0] for row in rows)}/{sum(row['logged'][1] for row in rows)}"


def _mean(name: str, rows: list[Row]) -> float | str:
    values = [row["judged"][name] for row in rows if row["judged"]]
    return round(sum(values) / len(values), 3) if values else ""


def _learn_and_evaluate(config: AdvantageExperimentConfig, out: Path, arm: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate
    from vla.model.advantage import BAD, GOOD, UNTOLD
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy
    from vla.training.advantage.labels import FIGURES

    lesson = Lesson(config, seed, out / f"seed-{seed}")
    folder = lesson.policy(LEARNT_AS.get(arm, arm))
    model = VLA.load(folder)
    if model.bridge.advantage is not None:
        model.bridge.advantage.asked = {"bad": BAD, "untold": UNTOLD}.get(arm, GOOD)
        model.config = replace(model.config, advantage=AdvantageConfig(config.guidance))
    policy = VLAPolicy(model)
    with evaluation_scenes(config, policy) as (env, seeds):
        report = evaluate(policy, env, seeds, suite=config.suite)
    judged = load_json(folder / FIGURES)["logs"] if (folder / FIGURES).is_file() else {}
    won = lesson.logs.success
    assert won is not None
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "logged": [int(won.sum()), len(lesson.logs.episodes)],
        "judged": judged,
    }


class Lesson:
    """One seed's demonstrations, the policy that they teach, its logged episodes, and what is learnt from them. All are
    kept in a folder, where an interrupted run goes on."""

    def __init__(self, config: AdvantageExperimentConfig, seed: int, folder: Path) -> None:
        from vla.data.lerobot_dataset import load_dataset
        from vla.training.recipes import RECIPES

        self._config, self._seed, self._folder = config, seed, folder
        recipe = RECIPES["tabletop-few"]()
        recipe = replace(recipe, seed=seed, num_threads=1, model=replace(recipe.model, backbone=config.backbone))
        self._recipe = recipe
        self.demos = load_dataset(self._recorded("demos", config.demos))
        self._start = self._learnt("start", replace(recipe, steps=config.start_steps), self._fresh, self.demos)
        self.logs = load_dataset(self._recorded("logs", config.logs, of=self._start))

    def policy(self, arm: str) -> Path:
        """The folder of the arm's policy, trained unless it is there."""
        from vla.model.advantage import add_advantage
        from vla.model.model import VLA

        if arm == "start":
            return self._start
        config = replace(self._recipe, steps=self._config.steps, keep_features=True)
        logs = self.logs
        if arm == "successes":
            assert logs.success is not None
            logs = logs.subset(logs.episode_index[logs.success].tolist())
        told = arm in ("good", "shuffled")
        if told:
            judge = JudgeConfig(
                good=self._config.good, steps_ahead=self._config.steps_ahead, shuffled=arm == "shuffled"
            )
            config = replace(config, advantage=judge)

        def begun() -> VLA:
            model = VLA.load(self._start)
            if told:
                add_advantage(model, AdvantageConfig(), seed=self._seed)
            return model

        self._share_features(arm)
        return self._learnt(arm, config, begun, {"demos": self.demos, "logs": logs})

    def _fresh(self) -> VLA:
        from vla.training.train import build_vla

        return build_vla(self._recipe, self.demos)

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

    def _recorded(self, name: str, episodes: int, of: Path | None = None) -> Path:
        """Demonstrations, or the episodes `of` a policy."""
        from envs.demos.record import record
        from envs.seeds import DEMO_BLOCK
        from policies.load import load_policy
        from vla.core.checkpoint import weights_digest

        config = self._config
        first = DEMO_BLOCK * self._seed + (0 if of is None else _LOGGED_FROM)
        return record(
            config.suite, episodes, self._folder / name, seed0=first, num_workers=config.workers,
            image_size=_picture_size(config.backbone),
            **({} if of is None else {"noise": config.noise, "policy": (weights_digest(of), partial(load_policy, of))}),
        )  # fmt: skip

    def _share_features(self, arm: str) -> None:
        """Let the arm read the features that an earlier one kept of the same frames."""
        folder = self._folder / arm
        folder.mkdir(parents=True, exist_ok=True)
        for other in ARMS:
            for kept in (self._folder / other).glob("features-*"):
                if other != arm and not kept.is_symlink() and not (link := folder / kept.name).exists():
                    os.symlink(kept.resolve(), link, target_is_directory=True)


def _picture_size(backbone: str) -> int:
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE

    return getattr(load_backbone(backbone), "image_size", IMAGE_SIZE)
