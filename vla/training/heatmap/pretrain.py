"""Heat-map pre-training on language-given places: "where is the red cube", before any demonstration is seen.

The data is a set of `vla ground-data --depth`: scenes with depth, questions, and where the named things are. BridgeVLA
pre-trains on boxes in photographs; here views and answers are already those that the policy will have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from vla.model.heatmap.config import HeatmapConfig
from vla.model.heatmap.head import SLOTS
from vla.model.heatmap.model import Cloud, HeatmapModel
from vla.model.heatmap.pretrained import write_head
from vla.processing.text import plain_text
from vla.training.grounding.questions import POINT_QUESTIONS
from vla.training.heatmap.learning import errors_mm, learn
from vla.training.heatmap.looks import Lesson, Task, encode

_BATCH = 16
Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class HeatmapPretrainConfig:
    """Configuration of a pre-training run."""

    model: HeatmapConfig = field(default_factory=HeatmapConfig)
    steps: int = 500
    batch_size: int = 32
    lr: float = 3e-4
    questions: int = 1
    """Number of named things and places of each scene that are looked for."""
    holdout: int = 64
    """The last scenes of the set, for evaluation only."""
    shift_m: float = 0.03
    """The workspace is moved at random by up to this along each axis."""
    seed: int = 0


def pretrain(
    config: HeatmapPretrainConfig, folder: Path, out: Path, *, backbone: str, on_step: Progress | None = None
) -> dict[str, str]:
    """Train a new head on the set in `folder` and write it to the file `out`; returns what it does on the scenes held
    out. ValueError for a set that is too small or has no depth."""
    from vla.backbones.hub import load

    tell = on_step or (lambda stage, done, total, loss: None)
    scenes = len(np.load(folder / "images.npy", mmap_mode="r"))
    if scenes <= config.holdout:
        raise ValueError(f"{folder} has {scenes} scenes, of which {config.holdout} are for evaluation: make more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HeatmapModel(replace(config.model, backbone=backbone), load(backbone, num_views=3), state_dim=0)
    learnt = scenes - config.holdout

    def lesson(rows: np.ndarray, seed: int, shift_m: float) -> Lesson:
        told = lambda done: tell("encoding", done, len(rows) * config.questions, None)  # noqa: E731
        return grounding_lesson(
            model, folder, rows, questions=config.questions, seed=seed, shift_m=shift_m, on_scenes=told
        )

    held_out = lesson(np.arange(learnt, scenes), config.seed + 1, 0.0)
    learn(
        model, lesson(np.arange(learnt), config.seed, config.shift_m), steps=config.steps,
        batch_size=config.batch_size, lr=config.lr, seed=config.seed,
        on_step=lambda step, heat, _: tell("learning", step, config.steps, heat),
    )  # fmt: skip
    error = errors_mm(model, held_out)
    wide = held_out.half_B > 0.9 * config.model.workspace.half_m
    figures = {}
    for name, rows in (("whole workspace", wide), ("zoomed", ~wide)):
        figures[f"{name}, median mm"] = f"{float(error[rows].median()):.1f}"
        figures[f"{name}, within 10 mm"] = f"{100 * float((error[rows] < 10).float().mean()):.0f}%"
    digest = hashlib.blake2b((folder / "questions.json").read_bytes(), digest_size=8).hexdigest()
    write_head(model, out, {"backbone": backbone, "set": digest, "scenes": learnt, "steps": config.steps, **figures})
    return figures


def grounding_lesson(
    model: HeatmapModel,
    folder: Path,
    rows: np.ndarray,
    *,
    questions: int,
    seed: int,
    shift_m: float = 0.03,
    on_scenes: Callable[[int], None] | None = None,
) -> Lesson:
    """Looks for `questions` of what each of these scenes' questions name. ValueError for a set without depth."""
    if not (folder / "depth.npy").is_file():
        raise ValueError(f"{folder} has no depth: make the set with `vla ground-data --depth`")
    tasks = _tasks(model, folder, rows, questions, np.random.default_rng(seed))
    return encode(model, tasks, torch.Generator().manual_seed(seed), shift_m=shift_m, on_scenes=on_scenes)


def _tasks(model: HeatmapModel, folder: Path, rows: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[Task]:
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("images", "depth", "intrinsics", "extrinsics", "centre", "points", "grip")
    }
    texts = json.loads((folder / "questions.json").read_text())
    tokenizer = model.backbone.tokenizer
    for start in range(0, len(rows), _BATCH):
        scenes, at, slots, asked = [], [], [], []
        for scene in rows[start : start + _BATCH]:
            named = arrays["points"][scene, :POINT_QUESTIONS, :, :3]
            there = np.argwhere(np.isfinite(named).all(-1))
            for question, slot in there[rng.permutation(len(there))[:count]]:
                scenes.append(scene)
                at.append(named[question, slot] + arrays["centre"][scene])
                slots.append(slot)
                asked.append(plain_text(texts[scene][question][0], "signs"))
        scenes = np.array(scenes)
        ids = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")

        def of(name: str, scenes: np.ndarray = scenes) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(arrays[name][scenes]))

        cloud = Cloud.of(of("images"), of("depth").float() / 1000, of("intrinsics"), of("extrinsics"))
        batch = len(scenes)
        yield Task(
            cloud, ids["input_ids"], ids["attention_mask"].bool(), torch.from_numpy(np.array(at, np.float32)),
            of("grip") + of("centre"), torch.tensor(slots), torch.zeros(batch, model.state_dim),
            torch.full((batch, len(model.config.flags)), float("nan")), torch.full((batch, 3), -1),
        )  # fmt: skip


assert SLOTS == ("object", "place")  # as a grounding set orders them
