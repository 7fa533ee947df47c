"""Vision-language questions in addition to the actions: a trained backbone keeps its understanding of language.

The scenes, questions and losses are those of pre-training (`vla ground-data`, `vla.training.grounding.pretrain`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla.training.train_config import LanguageConfig


class LanguageTask(nn.Module):
    """The questions of a grounding set, and the small reader that pointing is scored through (it trains along)."""

    def __init__(self, config: LanguageConfig, backbone: nn.Module, *, seed: int) -> None:
        """ValueError if there is no grounding set, or if this backbone cannot answer such questions."""
        super().__init__()
        if not all(hasattr(backbone, name) for name in ("vlm", "ask", "decode", "point", "told")):
            raise ValueError("language questions need the embedded backbone or one made by `vla pretrain`")
        from vla.training.grounding.pointing import Reader
        from vla.training.grounding.questions import GroundingSet
        from vla.training.train_config import PretrainConfig

        self.config = config
        self._scenes = GroundingSet(Path(config.data), backbone.tokenizer)
        views = self._scenes.images.shape[1]
        if views != backbone.num_views:
            raise ValueError(f"{config.data} shows {views} camera views, the policy reads {backbone.num_views}")
        self._questions = PretrainConfig(num_queries=backbone.num_queries)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reader = Reader(backbone.width, backbone.num_queries, backbone.point_dim)

    def draw(self, seed: int) -> tuple[np.ndarray, np.random.Generator]:
        """Scenes of a step, and the generator that chooses among their questions. Held-out scenes are never drawn."""
        rng = np.random.default_rng(seed)
        available = max(self.config.scenes, len(self._scenes) - self._questions.holdout)
        return rng.choice(min(available, len(self._scenes)), self.config.scenes), rng

    def forward(self, backbone: Any, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Mean loss of these scenes' questions."""
        from vla.training.grounding.loss import scene_loss

        return scene_loss(backbone, self.reader, self._scenes, rows, rng, self._questions)[0]
