"""Reader of grounding sets (`envs.grounding.generate.generate`): images on disk, questions as tokens, target points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.data.dataset_meta import require_grounding_set
from vla.language.paraphrase import about_nothing, others_than_named, paraphrase
from vla.language.reserved import with_new_words
from vla.processing.text import plain_text

POINT_QUESTIONS = 5
"""The first five questions of a scene name things to point at; the rest have answers (envs/grounding/generate.py)."""
PROMPT_TOKENS, ANSWER_TOKENS = 16, 22
"""Length of a padded question, unless one is longer."""
IGNORED = -100
"""Label of a token that is not to be predicted."""


class GroundingSet:
    """The folders that `envs.grounding.generate.generate` wrote, one after the other, with their questions
    tokenised."""

    def __init__(self, folder: Path | Sequence[Path], tokenizer: Any) -> None:
        folders = [folder] if isinstance(folder, Path) else list(folder)
        for one in folders:
            require_grounding_set(one)
            _check_files(one)
        self.images = _Pictures([np.load(one / "images.npy", mmap_mode="r") for one in folders], folders)
        self.points = torch.from_numpy(np.concatenate([np.load(one / "points.npy") for one in folders]))
        self.grip = torch.from_numpy(np.concatenate([np.load(one / "grip.npy") for one in folders]))
        questions = self.questions = read_questions(folders)
        self.tokenizer = tokenizer
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
                row = s, q - POINT_QUESTIONS
                _fill(self.answers[row], self.labels[row], ids, tokens[answer], end)

    def __len__(self) -> int:
        return len(self.images)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a question that is in no set."""
        return self.tokenizer(plain_text(text, "signs"), add_special_tokens=False)["input_ids"]

    def things(self, scene: int) -> list[str]:
        """Names of the things that the scene's description tells."""
        return self.questions[scene][-1][1].split(" and ")

    def spoken(
        self,
        scenes: np.ndarray,
        asked: np.ndarray,
        answered: np.ndarray,
        rng: np.random.Generator,
        absent: float,
        *,
        new_words: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Questions of scenes (B,) in other words. `asked` (B, Kp) are numbers of those that point, `answered` (B, Ka)
        of those with answers; a share `absent` of the former is about nothing that is there.
        `new_words`: some of the others have words that are not learnt from (`vla.language.reserved`).

        Returns prompts (B, Kp, Tp), answers (B, Ka, Ta), their labels, and which prompts are about nothing (B, Kp).
        """
        nothing = rng.random(asked.shape) < absent
        prompts: list[list[int]] = []
        full: list[tuple[list[int], list[int]]] = []
        for s, points, answers, missing in zip(scenes, asked, answered, nothing, strict=True):
            told, things = self.questions[s], self.things(s)
            for k, gone in zip(points, missing, strict=True):
                text = told[k][0]
                others = [] if gone else others_than_named(text, things)
                if gone:
                    text = about_nothing(text, rng, things=things)
                elif new_words:
                    text = with_new_words(text, rng)
                prompts.append(self.tokens(paraphrase(text, rng, others=others)))
            for k in answers:
                prompt, answer = told[POINT_QUESTIONS + k]
                full.append((self.tokens(paraphrase(prompt, rng)), self.tokens(answer)))
        asked_tokens = torch.zeros(*asked.shape, max(map(len, prompts)), dtype=torch.int64)
        for row, ids in zip(asked_tokens.flatten(0, 1), prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        longest = max(len(prompt) + len(answer) + 1 for prompt, answer in full)
        answer_tokens = torch.zeros(*answered.shape, longest, dtype=torch.int64)
        labels = torch.full_like(answer_tokens, IGNORED)
        for row, label, (prompt, answer) in zip(answer_tokens.flatten(0, 1), labels.flatten(0, 1), full, strict=True):
            _fill(row, label, prompt, answer, self.tokenizer.eos_token_id)
        return asked_tokens, answer_tokens, labels, torch.from_numpy(nothing)

    def split(self, holdout: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per folder, the rows to learn from and its last `holdout` rows."""
        bounds = self.images.bounds
        rows = [np.arange(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
        return [(one[: len(one) - holdout], one[len(one) - holdout :]) for one in rows]


def _check_files(folder: Path) -> None:
    """ValueError unless the files of a set have a row for each scene, of the kind that is read: a set with a file of
    another one teaches what is not to be seen."""
    remedy = "copy the set again, or make it anew (vla ground-data)"
    arrays = {}
    for name in ("images.npy", "points.npy", "grip.npy"):
        try:
            arrays[name] = np.load(folder / name, mmap_mode="r")
        except (OSError, ValueError, EOFError) as problem:
            raise ValueError(f"{folder / name} cannot be read ({type(problem).__name__}): {remedy}") from None
    try:
        asked = read_questions([folder])
    except ValueError:
        raise ValueError(f"{folder / 'questions.json'} is damaged: {remedy}") from None
    counts = {name: len(array) for name, array in arrays.items()} | {"questions.json": len(asked)}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise ValueError(f"the files of {folder} are of different numbers of scenes ({told}): {remedy}")
    images, points, grip = arrays.values()
    pictures = images.dtype == np.uint8 and images.ndim == 5 and images.shape[-1] == 3
    places = 3 + 3 * images.shape[1] if images.ndim == 5 else -1
    for name, fits, wanted in (
        ("images.npy", pictures, "(S, V, H, W, 3) uint8"),
        ("points.npy", points.ndim == 4 and points.shape[2:] == (2, places), "(S, questions, 2, 3 + 3 V)"),
        ("grip.npy", grip.shape[1:] == (3,) and bool(np.isfinite(grip).all()), "(S, 3) finite numbers"),
        ("questions.json", len(set(map(len, asked))) == 1, "as many questions for each scene"),
    ):
        if not fits:
            raise ValueError(f"{folder / name} does not hold {wanted}: {remedy}")


def _fill(row: Tensor, label: Tensor, prompt: list[int], answer: list[int], end: int) -> None:
    """A question, its answer and the end into one row of tokens, and into that of next-token targets."""
    full = [*prompt, *answer, end]
    row[: len(full)] = torch.tensor(full)
    label[len(prompt) - 1 : len(full) - 1] = torch.tensor(full[len(prompt) :])


class _Pictures:
    """Arrays (S, V, H, W, 3) on disk, read as if they were one."""

    def __init__(self, parts: list[np.ndarray], names: Sequence[object]) -> None:
        """ValueError for parts of several sizes; `names` are theirs."""
        for part, name in zip(parts, names, strict=True):
            if part.shape[1:] != parts[0].shape[1:]:
                one, other = (f"{p.shape[1]} views of {p.shape[2]}x{p.shape[3]} pixels" for p in (parts[0], part))
                raise ValueError(
                    f"{names[0]} has {one}, {name} {other}: make both alike (vla ground-data --image-size)"
                )
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
