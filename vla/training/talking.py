"""Learning to talk: questions about moments of episodes, with the answers that the simulator's state gives.

The sets are those of `vla talk-data` (`envs.grounding.talk_data`). The loss is label-smoothed cross-entropy of the
answers' tokens (VLA4CD). A frozen backbone's actions are learnt as if nothing were said: other parameters, another
clipping of their gradient, no random draw of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla.core.compatibility import fit
from vla.core.config import load_json
from vla.core.types import PolicySpec
from vla.model.config import TalkerConfig
from vla.model.model import VLA, evaluating
from vla.model.talking.talker import Heard, Speech, question_tokens
from vla.model.talking.things import look_for, text_tokens
from vla.processing.batch import ModelInput
from vla.processing.text import plain_text
from vla.training.train_config import TalkConfig

IGNORED = -100
"""Label of a token that is not to be said."""
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
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
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
        ids, labels = self._pairs([(self._data.asked[row][q][1], self._answers[row][q]) for row, q in chosen])
        device = vla.device
        low = vla.backbone_dtype != torch.float32
        with torch.autocast(device.type, dtype=vla.backbone_dtype if low else torch.bfloat16, enabled=low):
            with torch.set_grad_enabled(torch.is_grad_enabled() and vla.backbone_learns):
                inp = self.observed(rows).to(device)
                things = self._look(inp, rows)
                heard = vla.talker.prefill(vla.backbone, inp.without_padding(), things_BNF=things)
            heard = heard.select(torch.arange(len(rows), device=device).repeat_interleave(config.questions))
            heard.asked_BF = self._asked(heard, chosen)
            return vla.talker.loss(
                vla.backbone, heard, ids.to(device), labels.to(device), smoothing=config.smoothing, ignored=IGNORED
            )

    def _look(self, inp: ModelInput[Tensor], rows: np.ndarray) -> Tensor | None:
        """Where a frozen backbone sees the things that it has names for, looked up once a moment, with what all of the
        moment's questions name. Each moment is looked at by itself: in another batch the last bits may be others, and a
        resumed run would not be the same."""
        vla = self._vla[0]
        if vla.backbone_learns or vla.talker.names_NT is None:
            return None
        for place, row in enumerate(rows.tolist()):
            if row not in self._seen:
                one = vla.talker.prefill(vla.backbone, inp.select([place]).without_padding())
                questions = [question for _, question, _ in self._data.asked[row]]
                asked = look_for(vla.backbone, one.looked, one.cache, self._ids(questions)[None])
                self._seen[row] = one.things_BNF[0].half(), asked[0].half()  # 14 kB for 22 names
        return torch.stack([self._seen[row][0].float() for row in rows.tolist()])

    def _asked(self, heard: Heard, chosen: list[tuple[int, int]]) -> Tensor | None:
        """Where what each chosen question names is seen, (B, F); None for a policy without names."""
        vla = self._vla[0]
        if vla.talker.names_NT is None:
            return None
        if vla.backbone_learns:
            ids = self._ids([self._data.asked[row][q][1] for row, q in chosen])
            return look_for(vla.backbone, heard.looked, heard.cache, ids[:, None])[:, 0]
        return torch.stack([self._seen[row][1][q].float() for row, q in chosen])

    def _ids(self, questions: list[str]) -> Tensor:
        vla = self._vla[0]
        return text_tokens(vla.backbone.tokenizer, questions).to(vla.device)

    def observed(self, rows: np.ndarray) -> ModelInput[Tensor]:
        """These moments as the policy reads them."""
        processor = self._vla[0].processor
        ids, mask = processor.tokenise([self._data.instruction[row] for row in rows])
        proprio = processor.normalise_proprio(self._data.proprio[rows])
        return ModelInput(torch.from_numpy(self._data.images[rows]), ids, mask, proprio)

    def _pairs(self, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Tokens (N, T) of question, answer and end, padded with 0, and each place's next token where one counts."""
        rows = [(self._tokens[question], [*self._tokens[answer], self._end]) for question, answer in pairs]
        ids = torch.zeros(len(rows), max(len(q) + len(a) for q, a in rows), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, label, (question, answer) in zip(ids, labels, rows, strict=True):
            row[: len(question) + len(answer)] = torch.tensor(question + answer)
            label[len(question) - 1 : len(question) + len(answer) - 1] = torch.tensor(answer)
        return ids, labels


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
