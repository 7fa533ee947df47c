"""Experiments by name."""

from __future__ import annotations

from collections.abc import Callable
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

EXPERIMENTS: dict[str, tuple[type[Any], Callable[..., dict[str, Any]]]] = {
    "ablation": (AblationConfig, ablation),
    "bridgevla": (BridgeConfig, bridgevla),
    "distil": (DistilConfig, distil),
    "l2m": (L2MConfig, l2m),
    "latency": (LatencyConfig, latency),
    "memory": (RememberConfig, memory),
    "peers": (PeersConfig, peers),
    "rl": (RLConfig, rl),
    "robustness": (RobustnessConfig, robustness),
    "talk": (TalkExperimentConfig, talk),
    "words": (WordsConfig, words),
    "xyz": (XYZExperimentConfig, xyz),
}
"""By name: its configuration, and what runs it."""
