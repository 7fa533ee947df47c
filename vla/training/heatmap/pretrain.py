"""Heat-map pre-training on language-given places: "where is the red cube", before any demonstration is seen.

The data is a set of `vla ground-data --depth`: scenes with depth, questions, and where the named things are. BridgeVLA
pre-trains on boxes in photographs; here views and answers are already those that the policy will have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from vla.model.heatmap.head import FLAGS, SLOTS
from vla.model.heatmap.model import Cloud, HeatmapModel
from vla.processing.text import plain_text
from vla.training.grounding.questions import POINT_QUESTIONS
from vla.training.heatmap.looks import Lesson, Task, encode

_BATCH = 16


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


def _tasks(
    model: HeatmapModel, folder: Path, rows: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[Task]:
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
            torch.full((batch, len(FLAGS)), float("nan")),
        )  # fmt: skip


assert SLOTS == ("object", "place")  # as a grounding set orders them
