"""Learning to talk: questions about moments of episodes, with the answers that the simulator's state gives.

The sets are those of `vla talk-data` (`envs.grounding.talk_data`). The loss is label-smoothed cross-entropy of the
answers' tokens (VLA4CD). A frozen backbone's actions are learnt as if nothing were said: other parameters, another
clipping of their gradient, no random draw of torch's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla.core.checkpoint import load_tensors, save_tensors
from vla.core.compatibility import fit
from vla.core.config import load_json
from vla.core.types import PolicySpec
from vla.model.config import TalkerConfig
from vla.model.model import VLA, evaluating
from vla.model.talking.recall import kept, recalled
from vla.model.talking.scene import TURNS
from vla.model.talking.speech import Speech
from vla.model.talking.talker import Asked, Heard, question_tokens
from vla.model.talking.things import look_for, padded, seen_width
from vla.processing.batch import ModelInput
from vla.processing.text import plain_text
from vla.training.train_config import TalkConfig

INDEX = "talk.json"
_EXAMINED = 16
"""Moments that are examined at a time."""


class TalkSet:
    """The folder that `vla talk-data` wrote: pictures, states and instructions of moments, and questions about them."""

    def __init__(self, folder: Path) -> None:
        """ValueError for a folder that is none."""
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} is no set of questions about episodes: `vla talk-data` makes one")
        about = load_json(folder / INDEX)
        self.folder = folder
        self.cameras: tuple[str, ...] = tuple(about["cameras"])
        self.proprio_names: tuple[str, ...] = tuple(about["proprio_names"])
        self.images = np.load(folder / "images.npy", mmap_mode="r")  # (F, V, H, W, 3) uint8
        self.proprio = np.load(folder / "proprio.npy")  # (F, P) float32
        self.instruction: list[str] = [frame["instruction"] for frame in about["frames"]]
        self.asked: list[list[list[str]]] = [frame["asked"] for frame in about["frames"]]
        """[kind, question, answer] of each question, by moment."""
        self.suite: list[str] = [frame["suite"] for frame in about["frames"]]
        counts = len(self.images), len(self.proprio), len(self.instruction)
        if len(set(counts)) > 1 or self.images.dtype != np.uint8 or not np.isfinite(self.proprio).all():
            raise ValueError(
                f"{folder} holds {counts[0]} rows of pictures ({self.images.dtype}), {counts[1]} of states and "
                f"{counts[2]} moments, which must be as many, bytes and finite: copy the set again, or make it anew"
            )
        self.names: tuple[str, ...] = tuple(about.get("names", ()))
        """The things that its scenes hold, by name."""

    def __len__(self) -> int:
        return len(self.instruction)


def talker_for(folder: str | Path, *, learns: bool) -> TalkerConfig:
    """The talker that learns from this set, which knows the names of its things. `learns`: the decoder learns from the
    answers itself, and needs no adapters. ValueError for a folder that is no set."""
    names = TalkSet(Path(folder)).names
    return TalkerConfig(rank=0, names=names) if learns else TalkerConfig(names=names)


class TalkTask(nn.Module):
    """Questions of a set as a loss beside that of the actions. It has no parameters: what talks is the policy's."""

    def __init__(self, config: TalkConfig, vla: VLA) -> None:
        """ValueError for a set that does not fit the policy."""
        super().__init__()
        if vla.talker is None:
            raise ValueError("this policy has no talker: build it with talk set (vla train --talk DATA)")
        self.config = config
        self._vla = (vla,)  # a tuple: no submodule
        data = self._data = TalkSet(Path(config.data))
        reads = vla.processor.config
        if data.cameras != tuple(reads.cameras):
            raise ValueError(
                f"{config.data} shows the cameras {', '.join(data.cameras)}, the policy reads "
                f"{', '.join(reads.cameras)}: give those of the set (--cameras), or a set of this robot (vla talk-data)"
            )
        if data.proprio.shape[1] != reads.proprio_dim:
            raise ValueError(
                f"{config.data} has a state of {data.proprio.shape[1]} components, the policy reads "
                f"{reads.proprio_dim}: give a set of this robot (vla talk-data)"
            )
        told = PolicySpec(proprio_dim=reads.proprio_dim, proprio_names=data.proprio_names)
        if (order := fit(vla.processor.policy_spec(1, 1), told, where=f"set {config.data}").proprio_order) is not None:
            data.proprio = data.proprio[:, list(order)]
        tokenizer = vla.backbone.tokenizer
        texts = sorted({text for frame in data.asked for _, *pair in frame for text in pair})
        self._tokens = {text: question_tokens(tokenizer, text) for text in texts}
        self._end = tokenizer.eos_token_id
        self._answers = _shuffled(data.asked) if config.shuffled else [[a for _, _, a in one] for one in data.asked]
        names = vla.config.talk.names
        self._turns = {text: _turns(text, names) for answers in self._answers for text in answers}
        used = sorted({token for answers in self._answers for text in answers for token in self._tokens[text]})
        vla.talker.teach(torch.tensor([*used, self._end]))
        self._keeps = not vla.backbone_learns and vla.talker.scene is not None
        self._seen = _kept_sights(vla, data) if self._keeps else {}
        for text in set(data.instruction):  # long and odd ones are refused now
            vla.processor.tokens(text)

    def draw(self, seed: int) -> tuple[np.ndarray, np.random.Generator]:
        """Moments of a step, and the generator that chooses among their questions."""
        rng = np.random.default_rng(seed)
        return rng.choice(len(self._data), min(self.config.moments, len(self._data)), replace=False), rng

    def forward(self, _: Any, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Mean loss of some of these moments' questions."""
        vla, config = self._vla[0], self.config
        rows = np.sort(rows)
        chosen: list[tuple[int, int]] = []
        for row in rows.tolist():
            order = rng.permutation(len(self._data.asked[row]))
            chosen += [(row, int(q)) for q in np.resize(order, config.questions)]  # of a moment with fewer, some twice
        asked = self._row_by_row(rows.tolist(), chosen)
        with self._precision():
            with torch.set_grad_enabled(torch.is_grad_enabled() and vla.backbone_learns):
                heard, asked_BQF = self._listen(rows, chosen)
            return vla.talker.loss(vla.backbone, heard, asked.to(vla.device), asked_BQF, smoothing=config.smoothing)

    def _listen(self, rows: np.ndarray, chosen: list[tuple[int, int]]) -> tuple[Heard, Tensor | None]:
        """(what the decoder reads of these moments, where what each chosen question names is seen, (B, Q, F)). The
        latter is None for a policy without names."""
        vla, about = self._vla[0], (-1, self.config.questions)
        if self._keeps:
            for row in rows.tolist():
                self._look(row)
            proprio = vla.processor.normalise_proprio(self._data.proprio[rows]).to(vla.device)
            heard = recalled(vla.backbone, [self._seen[row] for row in rows.tolist()], proprio)
            asked = torch.stack([self._seen[row][-1][q].float() for row, q in chosen]).unflatten(0, about)
            return heard, asked.to(vla.device)
        heard = vla.talker.prefill(vla.backbone, self.observed(rows).to(vla.device).without_padding())
        if heard.looked is None:
            return heard, None
        ids = padded([self._tokens[self._data.asked[row][q][1]] for row, q in chosen]).to(vla.device)
        return heard, look_for(vla.backbone, heard.looked, ids.unflatten(0, about))

    def _look(self, row: int) -> None:
        """Let a frozen backbone see a moment, once, for all of its questions, and keep what talking reads of it. Each
        moment is looked at by itself: in another batch the last bits may be others, and a resumed run would not be the
        same."""
        if row in self._seen:
            return
        vla = self._vla[0]
        one = vla.talker.prefill(vla.backbone, self.observed(np.array([row])).to(vla.device).without_padding())
        ids = padded([self._tokens[question] for _, question, _ in self._data.asked[row]]).to(vla.device)
        asked = look_for(vla.backbone, one.looked, ids[None])[0].half()
        self._seen[row] = tuple(part.cpu() for part in (*kept(one), asked))  # some 80 kB

    def _precision(self) -> torch.autocast:
        vla = self._vla[0]
        low = vla.backbone_dtype != torch.float32
        return torch.autocast(vla.device.type, dtype=vla.backbone_dtype if low else torch.bfloat16, enabled=low)

    @torch.no_grad()
    def keep_sights(self) -> None:
        """Look at every moment now and keep in the set's folder what is seen there, for all runs that learn from this
        set on this frozen backbone; at what is kept already, not again. ValueError for a policy that looks at
        nothing."""
        if not self._keeps:
            raise ValueError("what is seen is kept for a policy with a frozen backbone that has names for things")
        path = _sights(self._vla[0], self._data)
        if path.is_file():
            return
        with self._precision():
            for row in range(len(self._data)):
                self._look(row)
        things, told, said, read, asked = zip(*(self._seen[row] for row in range(len(self._data))), strict=True)
        tensors = {"things": torch.stack(things), "told": torch.stack(told), "said": torch.stack(said)}
        tensors |= {"read": torch.cat(read), "asked": torch.cat(asked), "length": torch.tensor([len(x) for x in read])}
        save_tensors(path, tensors, {})

    def observed(self, rows: np.ndarray) -> ModelInput[Tensor]:
        """These moments as the policy reads them."""
        processor = self._vla[0].processor
        ids, mask = processor.tokenise([self._data.instruction[row] for row in rows])
        proprio = processor.normalise_proprio(self._data.proprio[rows])
        return ModelInput(torch.from_numpy(self._data.images[rows]), ids, mask, proprio)

    def _row_by_row(self, rows: list[int], chosen: list[tuple[int, int]]) -> Asked:
        """The chosen questions, those about one moment in one row."""
        each = self.config.questions
        lines = []
        for k, _ in enumerate(rows):
            line = []
            for number, (row, q) in enumerate(chosen[k * each : (k + 1) * each]):
                question = self._tokens[self._data.asked[row][q][1]]
                answer = [*self._tokens[self._answers[row][q]], self._end]
                labels = [-1] * (len(question) - 1) + answer
                ids = [*question, *answer[:-1]]  # the end is said, and nothing follows it
                line += [(*pair, number, place) for place, pair in enumerate(zip(ids, labels, strict=True))]
            lines.append(line)
        longest = max(map(len, lines))
        padding = (0, -1, -1, 0)
        packed = np.array([line + [padding] * (longest - len(line)) for line in lines])
        ids, labels, numbers, places = torch.from_numpy(packed).unbind(-1)
        questions = padded([self._tokens[self._data.asked[row][q][1]] for row, q in chosen])
        turns = torch.tensor([self._turns[self._answers[row][q]] for row, q in chosen])
        about = (len(rows), each)
        return Asked(ids, numbers, places, labels, questions.unflatten(0, about), turns.unflatten(0, about))


def _sights(vla: VLA, data: TalkSet) -> Path:
    """The file with what this backbone sees of this set."""
    told = hashlib.sha256(
        repr((vla.config.talk.names, seen_width(vla.backbone), data.instruction, data.asked)).encode()
    )
    for name, tensor in sorted(vla.backbone.state_dict().items()):
        told.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return data.folder / f"seen-{told.hexdigest()[:16]}.safetensors"


def _kept_sights(vla: VLA, data: TalkSet) -> dict[int, tuple[Tensor, ...]]:
    """By moment, what `TalkTask.keep_sights` kept of this backbone; empty where that is nothing."""
    if not any(data.folder.glob("seen-*")) or not (path := _sights(vla, data)).is_file():
        return {}
    tensors = load_tensors(path)
    asked = tensors["asked"].split([len(frame) for frame in data.asked])
    read = tensors["read"].split(tensors["length"].tolist())
    return dict(enumerate(zip(tensors["things"], tensors["told"], tensors["said"], read, asked, strict=True)))


def _turns(answer: str, names: Sequence[str]) -> list[int]:
    """`vla.model.talking.talker.Asked.turn_BQN` of one answer."""
    places = {k: at for k, name in enumerate(names) if (at := f" {answer} ".find(f" {name} ")) >= 0}
    turn = {k: min(place, TURNS - 1) for place, k in enumerate(sorted(places, key=places.__getitem__), 1)}
    return [turn.get(k, 0) for k in range(len(names))]


def _shuffled(asked: list[list[list[str]]]) -> list[list[str]]:
    """Every question's answer from another question of its kind, drawn once: a control that must not learn."""
    by_kind: dict[str, list[str]] = {}
    for frame in asked:
        for kind, _, answer in frame:
            by_kind.setdefault(kind, []).append(answer)
    rng = np.random.default_rng(0)
    stacks = {kind: list(rng.permutation(answers)) for kind, answers in by_kind.items()}
    return [[str(stacks[kind].pop()) for kind, *_ in frame] for frame in asked]


@dataclass(frozen=True)
class Reply:
    """One question of a set, its true answer, and what the policy said."""

    moment: int
    kind: str
    question: str
    answer: str
    said: str
    confidence: float

    @property
    def right(self) -> bool:
        """Exact match, but for how it is written down."""
        return plain_text(self.said, "signs") == plain_text(self.answer, "signs")


def examine(vla: VLA, data: TalkSet, rows: Sequence[int], *, pictures_of: Sequence[int] | None = None) -> list[Reply]:
    """Every question about these moments, answered greedily. `pictures_of`: show the pictures and the state of these
    other moments instead, a control that must fail where something is to be seen."""
    processor, replies = vla.processor, []
    seen = rows if pictures_of is None else pictures_of
    for start in range(0, len(rows), _EXAMINED):
        part, shown = rows[start : start + _EXAMINED], seen[start : start + _EXAMINED]
        asked = [(row, place, one) for place, row in enumerate(part) for one in data.asked[row]]
        ids, mask = processor.tokenise([data.instruction[row] for row in part])
        inp = ModelInput(
            torch.from_numpy(data.images[np.asarray(shown)]), ids, mask,
            processor.normalise_proprio(data.proprio[np.asarray(shown)]),
        )  # fmt: skip
        with torch.no_grad(), evaluating(vla):
            heard = vla.talker.prefill(vla.backbone, inp.to(vla.device).without_padding())
            heard = heard.select(torch.tensor([place for _, place, _ in asked], device=vla.device))
            questions = [question for _, _, (_, question, _) in asked]
            said = Speech(vla.talker, vla.backbone, lambda heard=heard: heard, questions).whole()
        replies += [
            Reply(row, *one, answer.text, answer.confidence) for (row, _, one), answer in zip(asked, said, strict=True)
        ]
    return replies
