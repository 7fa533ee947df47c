"""Answers, a token a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vla.language.talking import Said
from vla.model.talking.talker import Heard, Talker, question_tokens
from vla.model.talking.things import padded

LONGEST_ANSWER = 24
"""Tokens after which an answer is cut."""


class Speech:
    """Greedy answers to one question about each of B observations, told together, a token a step
    (`vla.language.talking.Speech`)."""

    def __init__(
        self,
        talker: Talker,
        backbone: Any,
        hear: Callable[[], Heard],
        questions: Sequence[str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`hear` gives the prefill, in the first step; `dtype`: the precision to compute in. ValueError for a question
        without words."""
        self._talker, self._backbone, self._hear, self._dtype = talker, backbone, hear, dtype
        rows = [question_tokens(backbone.tokenizer, text) for text in questions]
        b, device = len(rows), backbone.queries.device
        self._ids_BT = padded(rows).to(device)  # on the left: all answers begin at one place
        self._heard: Heard | None = None
        self._words: list[list[int]] = [[] for _ in rows]
        self._sure_B = torch.ones(b, device=device)
        self._over_B = torch.zeros(b, dtype=torch.bool, device=device)
        self._steps = 0

    @torch.no_grad()
    def step(self) -> bool:
        """Go on by one token. True when all answers have ended."""
        low, kind = self._dtype != torch.float32, self._ids_BT.device.type
        with torch.autocast(kind, dtype=self._dtype if low else torch.bfloat16, enabled=low):
            hidden = self._next()
            logits, words = self._talker.words(self._backbone, hidden[:, -1])
            chance, best = logits.softmax(-1).max(-1)
        token = words[best]
        self._sure_B = torch.where(self._over_B, self._sure_B, torch.minimum(self._sure_B, chance))
        self._over_B = self._over_B | (token == self._backbone.tokenizer.eos_token_id)
        for words, one, over in zip(self._words, token.tolist(), self._over_B.tolist(), strict=True):
            if not over:
                words.append(one)
        self._ids_BT, self._steps = token[:, None], self._steps + 1
        return bool(self._over_B.all()) or self._steps >= LONGEST_ANSWER

    def _next(self) -> Tensor:
        """States (B, T, D) after the tokens that came last."""
        if self._heard is None:
            self._heard = self._hear()
            return self._talker.listen(self._backbone, self._heard, self._ids_BT, self._ids_BT > 0)
        every = torch.ones_like(self._ids_BT, dtype=torch.bool)
        words = self._backbone.vlm.model.get_input_embeddings()(self._ids_BT)
        return self._talker.go_on(self._backbone, self._heard, words, every)

    def said(self) -> list[Said]:
        """The answers, as far as they have come."""
        texts = (self._backbone.tokenizer.decode(words).strip() for words in self._words)
        return [Said(text, sure) for text, sure in zip(texts, self._sure_B.tolist(), strict=True)]

    def whole(self) -> list[Said]:
        """The answers, at once."""
        while not self.step():
            pass
        return self.said()
