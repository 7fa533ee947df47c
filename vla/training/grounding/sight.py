"""The last step of pre-training: whether what a sentence names is in sight, and from which confidence on.

`vla.backbones.pointer.Sight` learns on the finished backbone, which stays as it is: its states for each sentence are
computed once, and the rest takes seconds. Sentences about nothing that is there are as many as the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla.backbones.backbone import Backbone
from vla.backbones.features import mishearing
from vla.backbones.pointer import Sight
from vla.core.grounding import calibrate
from vla.training.grounding.loss import answered
from vla.training.grounding.questions import POINT_QUESTIONS, GroundingSet

_SCENES = 32
"""Scenes that are looked at together."""
_EPOCHS, _LEAST_STEPS = 40, 50
_BATCH, _LR, _DECAY = 1024, 3e-3, 0.05
HEARD = 0.8
"""Strength of the noise on every other batch's words, where pre-training's is 1: people say new words, too."""


@dataclass(frozen=True)
class Sentences:
    """A backbone's states at the end of n sentences."""

    queries: Tensor
    """(n, Q, D) states of the queries after the last layer, half precision."""
    points: Tensor
    """(n, Q, E) as in `vla.backbones.features.Features`."""

    def confidence(self, backbone: Backbone) -> Tensor:
        """(n,) as `Backbone.confidence` gives it."""
        return backbone.confidence(self.queries, self.points)


@torch.no_grad()
def heard(
    backbone: Backbone,
    data: GroundingSet,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    new_words: bool = False,
    noise: float = 0.0,
    on_scenes: Callable[[int], None] | None = None,
) -> tuple[Sentences, Sentences]:
    """Paraphrases of the instructions about scenes `rows`: about things that are there, and about things that are not.

    `new_words`: some of the former have words that are not learnt from. `noise`: on the words of every other batch.
    `on_scenes` is told how many scenes are done."""
    found: tuple[list[Sentences], list[Sentences]] = ([], [])
    learns, done = backbone.training, 0
    backbone.eval()
    for number, part in enumerate(np.array_split(rows, max(1, len(rows) // _SCENES))):
        part = np.sort(part)
        asked = np.tile(np.arange(POINT_QUESTIONS - 1), (len(part), 1))  # the instructions
        seen = backbone.look(backbone.normalise(torch.from_numpy(data.images[part])))
        for absent in (0.0, 1.0):
            prompts, answers, _, _ = data.spoken(part, asked, asked[:, :1] * 0, rng, absent, new_words=new_words)
            episodes = torch.from_numpy(rng.integers(1 << 20, size=prompts[..., 0].numel()))
            with mishearing(backbone, (noise * (number % 2), episodes)):
                points, queries, _ = answered(backbone, seen, prompts, answers)
            points = torch.cat([points[..., :2], points[..., 2:].sigmoid()], -1).flatten(2)
            found[int(absent)].append(Sentences(queries.half(), points))
        done += len(part)
        if on_scenes is not None:
            on_scenes(done)
    backbone.train(learns)
    there, gone = (
        Sentences(torch.cat([one.queries for one in kind]), torch.cat([one.points for one in kind])) for kind in found
    )
    return there, gone


def fit_sight(backbone: Backbone, there: Sentences, gone: Sentences, *, seed: int) -> None:
    """Give the backbone a `Sight` that tells the sentences about things that are `there` from the others."""
    torch.manual_seed(seed)
    backbone.sight = Sight(backbone.width).to(backbone.queries.device)
    first = backbone.naming[0]
    queries = torch.cat([there.queries, gone.queries])
    named, mean = queries[:, first], queries.float().mean(1)
    points = torch.cat([there.points, gone.points])[:, first]
    visible = points.unflatten(-1, (backbone.num_views, 3))[..., 2]
    goal = torch.cat([torch.ones(len(there.queries)), torch.zeros(len(gone.queries))])
    optimiser = torch.optim.AdamW(backbone.sight.parameters(), lr=_LR, weight_decay=_DECAY)
    steps = max(_LEAST_STEPS, _EPOCHS * len(goal) // _BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    backbone.sight.train()
    for _ in range(steps):
        rows = torch.randint(len(goal), (_BATCH,))
        loss = F.binary_cross_entropy_with_logits(backbone.sight(named[rows], mean[rows], visible[rows]), goal[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    backbone.sight.eval()


@torch.no_grad()
def set_threshold(backbone: Backbone, there: Sentences, gone: Sentences) -> dict[str, float]:
    """Give the backbone the confidence below which it sees nothing of what is named, from sentences about held-out
    scenes. Returns the threshold, and the shares of both kinds that lie below it."""
    present, absent = there.confidence(backbone), gone.confidence(backbone)
    threshold = calibrate(present.numpy(), absent.numpy())
    backbone.grounding_threshold = threshold
    return {
        "grounding_threshold": threshold,
        "absent_noticed": (absent < threshold).float().mean().item(),
        "present_missed": (present < threshold).float().mean().item(),
    }
