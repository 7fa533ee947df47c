"""A small real backbone (random weights, no Hugging Face) with the attributes and save/load path of
vla.backbones.backbone."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vla.backbones.features import Features
from vla.core.types import ActionSpec, Observation
from vla.model.config import VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Stats

SPEC = ActionSpec(
    names=("dx", "dy", "dz", "gripper"), low=(-0.05, -0.05, -0.05, -1.0), high=(0.05, 0.05, 0.05, 1.0), control_hz=20.0
)
CAMERAS = ("front", "wrist")


class ToyTokenizer:
    """Whole words; word 0 is padding, word 1 is unknown. Counts its calls."""

    pad_token_id = 0

    def __init__(self, words):
        self.words = list(words)
        self.calls = 0

    def __call__(self, text, add_special_tokens=True):
        assert add_special_tokens is False
        self.calls += 1
        return {"input_ids": [self.words.index(w) if w in self.words else 1 for w in text.split()]}

    def save_pretrained(self, folder):
        Path(folder, "words.json").write_text(json.dumps(self.words))

    @staticmethod
    def from_pretrained(folder):
        return ToyTokenizer(json.loads(Path(folder, "words.json").read_text()))


WORDS = ["<pad>", "<unk>", "pick", "up", "the", "red", "green", "blue", "cube"]


class ToyBackbone(nn.Module):
    """Patches and words, mixed by a mean at every layer; the queries also point."""

    def __init__(self, tokenizer, width=24, num_layers=3, num_queries=4, point_dim=4, views=2, patches=2, dropout=0.2):
        super().__init__()
        self.tokenizer, self.width, self.num_layers = tokenizer, width, num_layers
        self.num_queries, self.point_dim, self.views, self.patches = num_queries, point_dim, views, patches
        self.patch = nn.Linear(3, width)
        self.place = nn.Parameter(torch.randn(views * patches * patches, width) * 0.3)
        self.words = nn.Embedding(len(tokenizer.words), width)
        self.tied_words = nn.Linear(width, len(tokenizer.words), bias=False)
        self.tied_words.weight = self.words.weight  # as language models do
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.point = nn.Linear(width, point_dim) if point_dim else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, images_BVHWC, token_ids_BT, token_mask_BT):
        batch, views = images_BVHWC.shape[:2]
        images = images_BVHWC.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pooled = nn.functional.adaptive_avg_pool2d(images, self.patches).flatten(2).transpose(1, 2)
        raw = self.patch(pooled.reshape(batch, -1, 3)) + self.place
        keep = token_mask_BT[..., None]
        said = (self.words(token_ids_BT) * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        queries = self.queries.expand(batch, -1, -1)
        raws, asked = [], []
        for layer in self.layers:
            raw = raw + self.dropout(torch.tanh(layer(raw + said)))
            queries = queries + torch.tanh(layer(queries + raw.mean(1, keepdim=True) + said))
            raws.append(raw)
            asked.append(queries)
        axis = torch.linspace(-1, 1, self.patches)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        one = torch.stack([x.flatten(), y.flatten()], -1)
        coords = torch.cat([torch.cat([one, torch.full((len(one), 1), float(v))], -1) for v in range(views)])
        return Features(
            raw_BLND=torch.stack(raws, 1),
            raw_mask_BN=None,
            queries_BLQD=torch.stack(asked, 1),
            points_BQE=torch.tanh(self.point(queries)) if self.point else None,
            coords_NE=coords,
        )

    def to_spec(self):
        return {"kind": "toy", "width": self.width, "num_layers": self.num_layers, "point_dim": self.point_dim}


def load_toy(spec):
    assert spec["kind"] == "toy" and os.path.isdir(spec["tokenizer"])
    tokenizer = ToyTokenizer.from_pretrained(spec["tokenizer"])
    return ToyBackbone(tokenizer, spec["width"], spec["num_layers"], point_dim=spec["point_dim"])


def toy_backbone(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ToyBackbone(ToyTokenizer(WORDS), **kwargs)


def toy_stats(seed=0, frames=400):
    rng = np.random.default_rng(seed)
    proprio = rng.normal(size=(frames, 5)) * [1, 0.1, 2, 0.01, 1] + [0, 1, -3, 0.5, 0]
    action = np.concatenate([rng.normal(size=(frames, 3)) * 0.02, rng.choice([-1.0, 1.0], (frames, 1))], 1)
    return Stats.from_arrays(proprio, action)


def toy_vla(seed=0, stats=None, **config):
    return VLA.build(
        VLAConfig(backbone="toy", **config),
        stats=stats or toy_stats(),
        action_spec=SPEC,
        cameras=CAMERAS,
        image_size=16,
        backbone=toy_backbone(seed),
        seed=seed,
    )


def toy_observation(batch=3, size=16, seed=0):
    rng = np.random.default_rng(seed)
    colours = ("red", "green", "blue")
    return Observation(
        images={name: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for name in CAMERAS},
        proprio=rng.normal(size=(batch, 5)).astype(np.float32),
        instruction=[f"Pick up the {colours[i % 3]} cube." for i in range(batch)],
    )
