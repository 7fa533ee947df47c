"""Text from the policy that acts: the decoder goes on behind the action queries with a question, and says an answer.

After VLA4CD (Li et al., EMNLP 2025): continuous actions and text from one model. The sequence is

    [patches][instruction][queries] | [things][question][answer]

and attention is causal, so what stands behind the bar cannot change the queries' states, from which the action is read:
the action comes of the prefill alone, in training as in use. Behind the bar a frozen decoder computes with low-rank
adapters (LoRA, Hu et al. 2021) of the talker's own, on the keys and values that the bare decoder has of the prefill. So
learning to talk moves nothing that acts. Where the decoder learns from both losses it talks without adapters.

Every token behind the bar starts from its word, from the robot's state, and from the mean of the instruction's words:
a few words among a hundred patches are found late (as the queries' own start, `vla.backbones.backbone.Backbone.ask`).

A policy that has names for things looks before it answers: for what the question names, and for each thing by its
name. Every token starts from the first, too, and the second stand before the question, a token each. The decoder's own
keys and values say too little of places: it was pre-trained to point, not to tell.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from vla.backbones.families import decoder_of
from vla.language.talking import Said
from vla.model.config import TalkerConfig
from vla.model.talking.things import Looked, look_for, places_width, seen_width, text_tokens
from vla.processing.batch import ModelInput
from vla.processing.text import plain_text

LONGEST_ANSWER = 24
"""Tokens after which an answer is cut."""
QUESTION_TOKENS = 64
"""Tokens of a question that are read."""
_MASKED = -30000.0


class _LowRank(nn.Module):
    """x -> scale * B A x, zero to begin with."""

    def __init__(self, inputs: int, outputs: int, config: TalkerConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(config.rank, inputs) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, config.rank))
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


class _Adapted(nn.Module):
    """A frozen linear layer of the decoder and its adapter."""

    def __init__(self, layer: nn.Module, adapter: _LowRank) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.adapter(x)


class SmoothedCrossEntropy(torch.autograd.Function):
    """Mean label-smoothed cross-entropy of logits (N, V), as `F.cross_entropy(..., label_smoothing=...)` has it, with
    half as many passes over them: of a large vocabulary they are most of the work of learning to talk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, smoothing: float) -> Tensor:
        """logsumexp - (1 - smoothing) * logit of the target - smoothing * mean logit, averaged over N."""
        logits = logits_NV.float()
        total = logits.logsumexp(1)
        ctx.save_for_backward(logits_NV, target_N, total)
        ctx.smoothing = smoothing
        chosen = logits.gather(1, target_N[:, None])[:, 0]
        return (total - (1 - smoothing) * chosen - smoothing * logits.mean(1)).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """(softmax - smoothed labels) / N."""
        logits_NV, target_N, total = ctx.saved_tensors
        n, v = logits_NV.shape
        gradient = (logits_NV.float() - total[:, None]).exp_().sub_(ctx.smoothing / v)
        gradient[torch.arange(n, device=target_N.device), target_N] -= 1 - ctx.smoothing
        return gradient.mul_(grad / n).to(logits_NV.dtype), None, None


@dataclass
class Heard:
    """The prefill of B observations: keys and values of patches, instruction and queries."""

    cache: DynamicCache
    mask_BS: Tensor
    last_B: Tensor
    """Position of the last query, (B,)."""
    proprio_BP: Tensor
    """The robot's own state, normalised."""
    said_BD: Tensor
    """Mean of the instruction's word vectors."""
    things_BNF: Tensor | None = None
    """Where the things that the policy has names for are seen (`vla.model.talking.things.look_for`)."""
    looked: Looked | None = None
    """The pictures, for a policy that has names for things."""
    asked_BF: Tensor | None = None
    """Where what the question names is seen; None: to be looked up when it is asked."""
    start_BD: Tensor | None = None
    """Added to the word of every token that follows."""

    def select(self, index: Tensor) -> Heard:
        """The observations in `index`, each as often as it is there: several questions about one. The cache itself is
        changed."""
        self.cache.batch_select_indices(index)
        rows = (tensor[index] for tensor in (self.mask_BS, self.last_B, self.proprio_BP, self.said_BD))
        if self.things_BNF is None or self.looked is None:
            return Heard(self.cache, *rows)
        return Heard(self.cache, *rows, self.things_BNF[index], self.looked.select(index))


class Talker(nn.Module):
    """The part of a policy that only talking needs: where its tokens start, where patches and things are, and the
    adapters."""

    names_NT: Tensor | None

    def __init__(self, config: TalkerConfig, backbone: Any, *, proprio_dim: int) -> None:
        """ValueError for a backbone that cannot talk."""
        super().__init__()
        if problem := talk_problem(backbone):
            raise ValueError(problem)
        width = backbone.width
        self.state = nn.Sequential(nn.Linear(proprio_dim, width), nn.GELU(), nn.Linear(width, width))
        self.told = nn.Linear(width, width)
        layers = _linear_layers(decoder_of(backbone.vlm, backbone.family)) if config.rank else {}
        self.adapters = nn.ModuleDict(
            {
                name.replace(".", "/"): _LowRank(layer.in_features, layer.out_features, config)
                for name, layer in layers.items()
            }
        )
        text = backbone.vlm.config.get_text_config()
        self.kv_heads = text.num_key_value_heads
        places = _waves(backbone.coords_N3)
        self.register_buffer("places_NF", places, persistent=False)
        self.placed = nn.Linear(places.shape[1], text.num_hidden_layers * 2 * self.kv_heads * text.head_dim, bias=False)
        nn.init.zeros_(self.placed.weight)
        self.register_buffer(
            "names_NT", text_tokens(backbone.tokenizer, config.names) if config.names else None, persistent=False
        )
        if config.names:
            seen, self._places = seen_width(backbone), slice(2 * width, 2 * width + places_width(backbone))
            self.asked = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
            beside = seen + places_width(backbone)
            self.thing = nn.Sequential(nn.Linear(beside, width), nn.GELU(), nn.Linear(width, width))
        self._adapted: tuple[Any, nn.Module] | None = None  # a tuple: no submodule, its weights are the backbone's

    def prefill(
        self,
        backbone: Any,
        inp: ModelInput[Tensor],
        *,
        mask_words: bool = False,
        things_BNF: Tensor | None = None,
    ) -> Heard:
        """Run the decoder over observations before anything is asked: over the sequence that it acts on, and then over
        each name, unless `things_BNF` is known already."""
        mask = torch.zeros_like(inp.token_mask_BT) if mask_words else inp.token_mask_BT
        prompt = backbone.prompt(inp.images_BVHWC, inp.token_ids_BT, mask)
        cache = DynamicCache()
        out = decoder_of(backbone.vlm, backbone.family)(
            inputs_embeds=prompt.embeds_BSD,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            past_key_values=cache,
            use_cache=True,
        )
        looked = None
        if self.names_NT is not None:
            looked = Looked.at(backbone, prompt, out.last_hidden_state)
            if things_BNF is None:
                names_BNT = self.names_NT.expand(len(mask), -1, -1)
                things_BNF = look_for(backbone, looked, cache, names_BNT)
        weight = mask[..., None].float()
        words = backbone.vlm.model.get_input_embeddings()(inp.token_ids_BT).float()
        said = (words * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Heard(cache, prompt.mask_BS, prompt.positions[:, -1], inp.proprio_BP, said, things_BNF, looked)

    def listen(self, backbone: Any, heard: Heard, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) after a question's (and answer's) tokens. The cache grows. Without an answer they may
        be padded on the left; with one, `heard.asked_BF` must be known."""
        words = backbone.vlm.model.get_input_embeddings()
        said = F.rms_norm(heard.said_BD, heard.said_BD.shape[-1:])
        heard.start_BD = self.state(heard.proprio_BP) + self.told(said)
        tokens_BTD, n = words(ids_BT), 0
        if heard.things_BNF is not None:
            assert heard.looked is not None
            if heard.asked_BF is None:
                heard.asked_BF = look_for(backbone, heard.looked, heard.cache, ids_BT[:, None])[:, 0]
            heard.start_BD = heard.start_BD + self.asked(heard.asked_BF)
            things_BND = self._things(words, heard.things_BNF, heard.asked_BF)
            tokens_BTD, n = torch.cat([things_BND, tokens_BTD], 1), things_BND.shape[1]
        self._place(heard.cache)
        return self.go_on(backbone, heard, tokens_BTD, F.pad(mask_BT, (n, 0), value=True))[:, n:]

    def _things(self, words: nn.Module, things_BNF: Tensor, asked_BF: Tensor) -> Tensor:
        """A token (B, N, D) for each name: its words, where it is seen, and how far from what the question names."""
        assert self.names_NT is not None
        said_NT1 = (self.names_NT > 0)[..., None].float()
        names_ND = (words(self.names_NT) * said_NT1).sum(1) / said_NT1.sum(1)
        apart_BNP = things_BNF[..., self._places] - asked_BF[:, None, self._places]
        return names_ND + self.thing(torch.cat([things_BNF, apart_BNP], -1)).to(names_ND.dtype)

    def _place(self, cache: DynamicCache) -> None:
        """Tell where in the picture each image token is, which the decoder's own keys and values say in passing only:
        add it to those that talking reads. Acting has others."""
        n = len(self.places_NF)
        told_NLKHD = self.placed(self.places_NF).view(n, len(cache.layers), 2, self.kv_heads, -1)
        for layer, told in zip(cache.layers, told_NLKHD.unbind(1), strict=True):
            keys_HND, values_HND = (part.transpose(0, 1).to(layer.keys.dtype) for part in told.unbind(1))
            layer.keys = torch.cat([layer.keys[:, :, :n] + keys_HND, layer.keys[:, :, n:]], 2)
            layer.values = torch.cat([layer.values[:, :, :n] + values_HND, layer.values[:, :, n:]], 2)

    def go_on(self, backbone: Any, heard: Heard, words_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        """The decoder's last states (B, T, D) of tokens that follow what is in the cache; it and the mask grow."""
        b, t = valid_BT.shape
        assert heard.start_BD is not None
        embeds_BTD = words_BTD + heard.start_BD[:, None].to(words_BTD.dtype)
        before = heard.mask_BS.shape[1]
        positions = heard.last_B[:, None] + valid_BT.long().cumsum(1)
        causal = torch.ones(t, t, dtype=torch.bool, device=valid_BT.device).tril()
        sees = torch.cat(
            [heard.mask_BS[:, None].expand(b, t, before), causal[None] & valid_BT[:, None]], 2
        )  # padding sees itself nowhere, and nothing reads it
        mask = torch.zeros(b, 1, t, before + t, dtype=embeds_BTD.dtype, device=embeds_BTD.device)
        mask = mask.masked_fill(~sees[:, None], _MASKED)
        out = self._speaking(backbone)(
            inputs_embeds=embeds_BTD,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=heard.cache,
            use_cache=True,
        )
        heard.mask_BS = torch.cat([heard.mask_BS, valid_BT], 1)
        heard.last_B = positions[:, -1]
        return out.last_hidden_state

    def _speaking(self, backbone: Any) -> nn.Module:
        """The decoder with the adapters in it: a tree of modules of its own on the very same weights, so that a
        decision that runs at the same time, in another thread, computes what it always does."""
        decoder = decoder_of(backbone.vlm, backbone.family)
        if not self.adapters:
            return decoder
        weight = next(decoder.parameters())
        made_for = (id(decoder), weight.device, weight.dtype)
        if self._adapted is None or self._adapted[0] != made_for:
            shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
            twin = copy.deepcopy(decoder, shared)
            for name, adapter in self.adapters.items():
                parent, _, child = name.replace("/", ".").rpartition(".")
                whole = twin.get_submodule(parent)
                setattr(whole, child, _Adapted(getattr(whole, child), adapter))
            # Explicit attention to all layers: the fused one is slow backward on a CPU (`vla.backbones.tiny`).
            for layer in twin.layers:
                layer.self_attn.config._attn_implementation = "bascule_lean"
            self._adapted = made_for, twin
        return self._adapted[1]

    def loss(
        self, backbone: Any, heard: Heard, ids_BT: Tensor, labels_BT: Tensor, *, smoothing: float, ignored: int
    ) -> Tensor:
        """Label-smoothed cross-entropy of the tokens that count. `ids_BT`: question, answer and end, padded with 0;
        `labels_BT`: the next token of each place, `ignored` where none is to be said."""
        hidden = self.listen(backbone, heard, ids_BT, ids_BT > 0)
        counted = labels_BT != ignored
        logits_NV: Tensor = backbone.vlm.lm_head(hidden[counted])
        return SmoothedCrossEntropy.apply(logits_NV, labels_BT[counted], smoothing)  # type: ignore[no-any-return]


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
        longest, b = max(map(len, rows)), len(rows)
        ids = np.zeros((b, longest), np.int64)
        for row, tokens in zip(ids, rows, strict=True):  # to the right: all answers begin at one place
            row[longest - len(tokens) :] = tokens
        device = backbone.queries.device
        self._ids_BT = torch.from_numpy(ids).to(device)
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
            chance, token = self._backbone.vlm.lm_head(hidden[:, -1]).float().softmax(-1).max(-1)
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


def _waves(coords_N3: Tensor) -> Tensor:
    """(N, F) features of each image token's place: x, y in [-1, 1], waves of both, and which view it is of."""
    xy_N2, view_N = coords_N3[:, :2], coords_N3[:, 2].long()
    waves = [f(k * math.pi * xy_N2) for k in (0.5, 1.0, 2.0) for f in (torch.sin, torch.cos)]
    return torch.cat([xy_N2, *waves, F.one_hot(view_N).float()], 1)


def question_tokens(tokenizer: Any, question: str) -> list[int]:
    """A question's token ids, as plain text is read, at most `QUESTION_TOKENS`. ValueError for one without words."""
    tokens = tokenizer(plain_text(question, "signs"), add_special_tokens=False)["input_ids"][:QUESTION_TOKENS]
    if not tokens:
        raise ValueError(f"a question must say something, got {question!r}")
    return tokens


def talk_problem(backbone: Any) -> str | None:
    """Why a policy on this backbone cannot talk, in a sentence; None for one that can."""
    family = getattr(backbone, "family", None)
    if family is None or not hasattr(backbone, "prompt") or not hasattr(backbone.vlm, "lm_head"):
        return "a policy talks with its backbone's language model, and this one has none: take the backbone small"
    if family.rope_3d or family.sees_ahead != "nothing" or backbone._by_kind or backbone.layout.frame_ids:
        return (
            f"talking is not known for backbones of the family {backbone.family_name}: take small, tiny or "
            "smollm2-135m, or leave --talk out"
        )
    return None


def _linear_layers(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's linear layers by name. ValueError for one that has adapters already."""
    found = {name: one for name, one in decoder.layers.named_modules(prefix="layers") if isinstance(one, nn.Linear)}
    if any("lora_" in name for name in found):
        raise ValueError("a decoder that learns by adapters talks without ones of its own: set talk.rank to 0")
    return found
