"""Experiments by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bascule.experiments.ablation import AblationConfig, ablation
from bascule.experiments.continual.l2m import L2MConfig, l2m
from bascule.experiments.distillation.comparison import distil
from bascule.experiments.distillation.config import DistilConfig
from bascule.experiments.heatmaps.bridgevla import BridgeConfig, bridgevla
from bascule.experiments.latency import LatencyConfig, latency
from bascule.experiments.memory import RememberConfig, memory
from bascule.experiments.peers.experiment import PeersConfig, peers
from bascule.experiments.refinement import RLConfig, rl
from bascule.experiments.robustness.comparison import RobustnessConfig, robustness
from bascule.experiments.spatial.xyz import XYZExperimentConfig, xyz
from bascule.experiments.talk.config import TalkExperimentConfig
from bascule.experiments.talk.experiment import talk
from bascule.experiments.words import WordsConfig, words


@dataclass(frozen=True)
class Entry:
    """One experiment."""

    about: str
    """The line that says what it compares, in the list of all."""
    config: type[Any]
    """The dataclass of its settings, whose fields are the command's flags."""
    perform: Callable[..., dict[str, Any]]
    """(config, folder, on_progress) -> the result."""


EXPERIMENTS: dict[str, Entry] = {
    "ablation": Entry("variants of bridge attention, by imitation", AblationConfig, ablation),
    "bridgevla": Entry("heat-maps beside chunks, from three demonstrations of a task", BridgeConfig, bridgevla),
    "distil": Entry("students of a privileged teacher, aligned with it or not", DistilConfig, distil),
    "l2m": Entry("tasks learnt one after another, and what is left of those before", L2MConfig, l2m),
    "latency": Entry("delayed answers of a policy, and ways to go on meanwhile", LatencyConfig, latency),
    "memory": Entry("policies that remember, by which decisions they look at again", RememberConfig, memory),
    "peers": Entry("LeRobot's ACT, Diffusion, SmolVLA and ours, within the same budgets", PeersConfig, peers),
    "rl": Entry("variants of online RL at equal control steps", RLConfig, rl),
    "robustness": Entry("policies in perturbed environments", RobustnessConfig, robustness),
    "talk": Entry("policies that answer questions while they act", TalkExperimentConfig, talk),
    "words": Entry("sentences that no training text has, or that name nothing in sight", WordsConfig, words),
    "xyz": Entry("places in the robot's frame before cameras that stand elsewhere", XYZExperimentConfig, xyz),
}
"""By name, as `vla experiment --help` lists them."""
