"""Reader of grounding sets (`envs.grounding.generate.generate`): images on disk, questions as tokens, target points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla.backbones.tiny import train_tokenizer
from vla.data.dataset_meta import require_grounding_set

POINT_QUESTIONS = 5
"""The first five questions of a scene name things to point at; the rest have answers (envs/grounding/generate.py)."""
PROMPT_TOKENS, ANSWER_TOKENS = 16, 22
"""Length of a padded question, unless one is longer."""
IGNORED = -100
"""Label of a token that is not to be predicted."""


class GroundingSet:
    """The folders that `envs.grounding.generate.generate` wrote, one after the other, with their questions
    tokenised."""

    def __init__(self, folder: Path | Sequence[Path], tokenizer: object | None = None) -> None:
        folders = [folder] if isinstance(folder, Path) else list(folder)
        for one in folders:
            require_grounding_set(one)
        self.images = _Pictures([np.load(one / "images.npy", mmap_mode="r") for one in folders])
        self.points = torch.from_numpy(np.concatenate([np.load(one / "points.npy") for one in folders]))
        self.grip = torch.from_numpy(np.concatenate([np.load(one / "grip.npy") for one in folders]))
        questions = read_questions(folders)
        self.tokenizer = tokenizer or train_tokenizer(words_of(questions) * 50)
        unique = sorted({text for scene in questions for pair in scene for text in pair})
        tokens = dict(zip(unique, self.tokenizer(unique, add_special_tokens=False)["input_ids"], strict=True))
        end = self.tokenizer.eos_token_id
        scenes, per_scene = len(questions), len(questions[0])
        asked = [len(tokens[p]) for scene in questions for p, _ in scene[:POINT_QUESTIONS]]
        answered = [len(tokens[p]) + len(tokens[a]) + 1 for scene in questions for p, a in scene[POINT_QUESTIONS:]]
        self.prompts = torch.zeros(scenes, POINT_QUESTIONS, max(PROMPT_TOKENS, *asked), dtype=torch.int64)
        self.answers = torch.zeros(
            scenes, per_scene - POINT_QUESTIONS, max(ANSWER_TOKENS, *answered), dtype=torch.int64
        )
        self.labels = torch.full_like(self.answers, IGNORED)
        """Next-token targets: only the answer and its end count."""
        for s, scene in enumerate(questions):
            for q, (prompt, answer) in enumerate(scene):
                ids = tokens[prompt]
                if q < POINT_QUESTIONS:
                    self.prompts[s, q, : len(ids)] = torch.tensor(ids)
                    continue
                full = ids + tokens[answer] + [end]
                self.answers[s, q - POINT_QUESTIONS, : len(full)] = torch.tensor(full)
                self.labels[s, q - POINT_QUESTIONS, len(ids) - 1 : len(full) - 1] = torch.tensor(full[len(ids) :])

    def __len__(self) -> int:
        return len(self.images)

    def split(self, holdout: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per folder, the rows to learn from and its last `holdout` rows."""
        bounds = self.images.bounds
        rows = [np.arange(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
        return [(one[: len(one) - holdout], one[len(one) - holdout :]) for one in rows]


class _Pictures:
    """Arrays (S, V, H, W, 3) on disk, read as if they were one."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self.bounds[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        which = np.searchsorted(self.bounds, rows, side="right") - 1
        for k in np.unique(which):
            out[which == k] = self.parts[k][rows[which == k] - self.bounds[k]]
        return out


def read_questions(folders: Sequence[Path]) -> list[list[list[str]]]:
    """[prompt, answer] pairs of every scene."""
    return [scene for one in folders for scene in json.loads((one / "questions.json").read_text())]


def words_of(questions: list[list[list[str]]]) -> list[str]:
    """The words of all questions and answers, each once, sorted."""
    texts = {text for scene in questions for pair in scene for text in pair}
    return sorted({word for text in texts for word in text.split()})
