"""Experiments by name. An experiment's module is imported when it is asked for: some of them need torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One experiment."""

    about: str
    """The line that says what it compares, in the list of all."""
    settings: str
    """MODULE.CLASS in `bascule.experiments`: see `config`."""
    function: str
    """MODULE.FUNCTION in `bascule.experiments`: see `perform`."""

    @property
    def config(self) -> type[Any]:
        """The dataclass of its settings, whose fields are the command's flags."""
        return _found(self.settings)

    @property
    def perform(self) -> Callable[..., dict[str, Any]]:
        """(config, folder, on_progress) -> the result."""
        return _found(self.function)


def _found(place: str) -> Any:
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"bascule.experiments.{module}"), name)


EXPERIMENTS: dict[str, Entry] = {
    "advantage": Entry(
        "one offline iteration on a policy's own episodes, with labels of a value model",
        "logged.advantage.AdvantageExperimentConfig",
        "logged.advantage.advantage",
    ),
    "ablation": Entry("variants of bridge attention, by imitation", "ablation.AblationConfig", "ablation.ablation"),
    "bridgevla": Entry(
        "heat-maps beside chunks, from three demonstrations of a task",
        "heatmaps.bridgevla.BridgeConfig",
        "heatmaps.bridgevla.bridgevla",
    ),
    "corrections": Entry(
        "corrections by a scripted person in three rounds, beside fresh demonstrations",
        "corrections.experiment.CorrectionsConfig",
        "corrections.experiment.corrections",
    ),
    "distil": Entry(
        "students of a privileged teacher, aligned with it or not",
        "distillation.config.DistilConfig",
        "distillation.comparison.distil",
    ),
    "franka": Entry(
        "policies in a test cell, through libfranka's own protocol", "cell.franka.FrankaConfig", "cell.franka.franka"
    ),
    "l2m": Entry(
        "tasks learnt one after another, and what is left of those before",
        "continual.l2m.L2MConfig",
        "continual.l2m.l2m",
    ),
    "latency": Entry(
        "delayed answers of a policy, and ways to go on meanwhile", "latency.LatencyConfig", "latency.latency"
    ),
    "memory": Entry(
        "policies that remember, by which decisions they look at again", "memory.RememberConfig", "memory.memory"
    ),
    "peers": Entry(
        "LeRobot's ACT, Diffusion, SmolVLA and ours, within the same budgets",
        "peers.experiment.PeersConfig",
        "peers.experiment.peers",
    ),
    "reset-free": Entry(
        "a task and its undo, practised without resets and rewarded by a classifier",
        "resetfree.experiment.ResetFreeExperimentConfig",
        "resetfree.experiment.reset_free",
    ),
    "rl": Entry("variants of online RL at equal control steps", "refinement.RLConfig", "refinement.rl"),
    "robustness": Entry(
        "policies in perturbed environments",
        "robustness.comparison.RobustnessConfig",
        "robustness.comparison.robustness",
    ),
    "talk": Entry(
        "policies that answer questions while they act", "talk.config.TalkExperimentConfig", "talk.experiment.talk"
    ),
    "token-ppo": Entry(
        "PPO over action tokens beside PPO of Gaussians, at equal control steps",
        "tokens.comparison.TokenPPOConfig",
        "tokens.comparison.token_ppo",
    ),
    "words": Entry(
        "sentences that no training text has, or that name nothing in sight", "words.WordsConfig", "words.words"
    ),
    "xyz": Entry(
        "places in the robot's frame before cameras that stand elsewhere",
        "spatial.xyz.XYZExperimentConfig",
        "spatial.xyz.xyz",
    ),
}
"""By name, as `vla experiment --help` lists them."""
