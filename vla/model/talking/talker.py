"""Text from the policy that acts: the decoder goes on behind the action queries with a question, and says an answer.

After VLA4CD (Li et al., EMNLP 2025): continuous actions and text from one model. The sequence is

    [patches][instruction][queries] | [question][answer]

and attention is causal, so what stands behind the bar cannot change the queries' states, from which the action is read:
the action comes of the prefill alone, in training as in use. Behind the bar a frozen decoder computes with low-rank
adapters (LoRA, Hu et al. 2021) of the talker's own, on the keys and values that the bare decoder has of the prefill. So
learning to talk moves nothing that acts. Where the decoder learns from both losses it talks without adapters.

Every token behind the bar starts from its word, from the robot's state, and from the mean of the instruction's words:
a few words among a hundred patches are found late (as the queries' own start, `vla.backbones.backbone.Backbone.ask`).

A policy that has names for things looks before it answers: for each thing by its name, for what the question names, and
where the instruction pointed it already. What it sees of things is compared (`vla.model.talking.scene`) and stands
among the keys and values, in the patches' stead, and what the question finds there is in every token's start. The
patches' keys and values say too little of places: the decoder was pre-trained to point, not to tell.

It says the words that the answers it has learnt from consist of, and no others (`Talker.teach`): of 45,000 words that
lie side by side in a table the right one gets half of the probability at best, and "squeezing" comes before "lifting".
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache

from vla.backbones.families import decoder_of
from vla.model.config import TalkerConfig
from vla.model.talking.scene import Scene
from vla.model.talking.things import Looked, look_for, places_width, seen_width, text_tokens, told
from vla.processing.batch import ModelInput
from vla.processing.text import plain_text

QUESTION_TOKENS = 64
"""Tokens of a question that are read."""
TURN_WEIGHT = 0.3
"""Weight of the loss of which things an answer names, all things together; that of a token that is said is 1."""
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


@dataclass
class Asked:
    """Q questions about each of B observations, and their answers, side by side in one row of tokens (B, T) each."""

    ids_BT: Tensor
    """Question, answer and end of one after another, padded with 0."""
    number_BT: Tensor
    """Which question each token belongs to, 0 .. Q - 1; -1: none."""
    place_BT: Tensor
    """The token's place within its question and answer, from 0 on."""
    labels_BT: Tensor
    """The next token of each place, -1 where none is to be said."""
    questions_BQT: Tensor
    """The questions alone, padded with 0."""
    turn_BQN: Tensor
    """For each thing that has a name: 0 if the answer does not name it, 1 if first, 2, 3 if third or later."""

    def to(self, device: torch.device) -> Asked:
        """A copy on a device."""
        return Asked(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass
class Heard:
    """The prefill of B observations."""

    cache: DynamicCache
    """Keys and values of patches, instruction and queries; without the patches where things have names."""
    mask_BS: Tensor
    last_B: Tensor
    """Position of the last query, (B,)."""
    proprio_BP: Tensor
    """The robot's own state, normalised."""
    said_BD: Tensor
    """Mean of the instruction's word vectors."""
    looked: Looked | None = None
    """The pictures, and what is seen of things, for a policy that has names for them."""
    things_BNF: Tensor | None = None
    told_BF: Tensor | None = None
    """Where what the instruction names is seen."""
    start_BD: Tensor | None = None
    """Added to the word of every token that follows."""

    def select(self, index: Tensor) -> Heard:
        """The observations in `index`, each as often as it is there: several questions about one. The cache itself is
        changed."""
        self.cache.batch_select_indices(index)
        rows = (tensor[index] for tensor in (self.mask_BS, self.last_B, self.proprio_BP, self.said_BD))
        if self.looked is None or self.things_BNF is None or self.told_BF is None:
            return Heard(self.cache, *rows)
        return Heard(self.cache, *rows, self.looked.select(index), self.things_BNF[index], self.told_BF[index])


class Talker(nn.Module):
    """The part of a policy that only talking needs: where its tokens start, where patches and things are, and the
    adapters."""

    names_NT: Tensor | None
    says_V: Tensor
    """bool: the tokens that it says; all of them until it has been taught."""

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
        waves = _waves(backbone.coords_N3)
        reads = text.num_hidden_layers * 2 * self.kv_heads * text.head_dim
        if not config.names:
            self.register_buffer("places_NF", waves, persistent=False)
            self.placed = nn.Linear(waves.shape[1], reads, bias=False)
            nn.init.zeros_(self.placed.weight)
        self.register_buffer(
            "names_NT", text_tokens(backbone.tokenizer, config.names) if config.names else None, persistent=False
        )
        words = backbone.vlm.lm_head.weight.shape[0]
        self.register_buffer("says_V", torch.ones(words, dtype=torch.bool))
        self.scene = None
        if config.names:
            places = slice(2 * width, 2 * width + places_width(backbone))
            self.scene = Scene(seen_width(backbone), places, width, reads)
        self._adapted: tuple[Any, nn.Module] | None = None  # a tuple: no submodule, its weights are the backbone's

    def prefill(self, backbone: Any, inp: ModelInput[Tensor], *, mask_words: bool = False) -> Heard:
        """Run the decoder over observations before anything is asked: over the sequence that it acts on, and then over
        each name."""
        mask = torch.zeros_like(inp.token_mask_BT) if mask_words else inp.token_mask_BT
        prompt = backbone.prompt(inp.images_BVHWC, inp.token_ids_BT, mask)
        cache = DynamicCache()
        out = decoder_of(backbone.vlm, backbone.family)(
            inputs_embeds=prompt.embeds_BSD,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        weight = mask[..., None].float()
        words = backbone.vlm.model.get_input_embeddings()(inp.token_ids_BT).float()
        said = (words * weight).sum(1) / weight.sum(1).clamp(min=1)
        heard = Heard(cache, prompt.mask_BS, prompt.positions[:, -1], inp.proprio_BP, said)
        if self.names_NT is not None:
            heard.looked = Looked.at(backbone, prompt, out, cache)
            heard.things_BNF = look_for(backbone, heard.looked, self.names_NT.expand(len(mask), -1, -1))
            heard.told_BF = told(backbone, heard.looked, out[:, -backbone.num_queries :])
            for layer in cache.layers:
                layer.keys, layer.values = (x[:, :, backbone._prefix :] for x in (layer.keys, layer.values))
            heard.mask_BS = heard.mask_BS[:, backbone._prefix :]
        return heard

    def listen(self, backbone: Any, heard: Heard, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) after a question's tokens, which may be padded on the left. The cache grows."""
        asked = None
        if heard.looked is not None:
            asked = look_for(backbone, heard.looked, ids_BT[:, None])
        heard.start_BD = self._begin(backbone, heard, asked, ids_BT[:, None])[0][:, 0]
        return self.go_on(backbone, heard, backbone.vlm.model.get_input_embeddings()(ids_BT), mask_BT)

    def _begin(
        self, backbone: Any, heard: Heard, asked_BQF: Tensor | None, questions_BQT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add to the cache what only talking reads. (what all tokens of each question start from, (B, Q, D); whether
        its answer names a thing, `Sought.turn_BQNR`)."""
        said = F.rms_norm(heard.said_BD, heard.said_BD.shape[-1:])
        start_BD = self.state(heard.proprio_BP) + self.told(said)
        start_BQD = start_BD[:, None].expand(-1, questions_BQT.shape[1], -1)
        turn_BQNR = None
        if self.scene is None:
            self._place(heard.cache)
        else:
            assert self.names_NT is not None and heard.things_BNF is not None and heard.told_BF is not None
            things_BNF, told_BF = heard.things_BNF, heard.told_BF
            scene_BND = self.scene(_mean_word(backbone, self.names_NT), things_BNF, told_BF, start_BD)
            words_BQD = _mean_word(backbone, questions_BQT)
            sought = self.scene.seek(asked_BQF, words_BQD, things_BNF, told_BF, scene_BND)
            start_BQD, turn_BQNR = start_BQD + sought.found_BQD, sought.turn_BQNR
            parts = (len(heard.cache.layers), 2, self.kv_heads, -1)
            read_BNLKHD = sought.read_BQNK.flatten(1, 2).unflatten(-1, parts)
            for layer, read in zip(heard.cache.layers, read_BNLKHD.unbind(2), strict=True):
                keys, values = (part.transpose(1, 2).to(layer.keys.dtype) for part in read.unbind(2))
                layer.keys = torch.cat([layer.keys, keys], 2)
                layer.values = torch.cat([layer.values, values], 2)
            heard.mask_BS = F.pad(heard.mask_BS, (0, read_BNLKHD.shape[1]), value=True)
        return start_BQD, turn_BQNR

    def _place(self, cache: DynamicCache) -> None:
        """Tell where in the picture each image token is, which the decoder's own keys and values say in passing only:
        add it to those that talking reads. Acting has others."""
        n = len(self.places_NF)
        told_NLKHD = self.placed(self.places_NF).view(n, len(cache.layers), 2, self.kv_heads, -1)
        for layer, at in zip(cache.layers, told_NLKHD.unbind(1), strict=True):
            keys_HND, values_HND = (part.transpose(0, 1).to(layer.keys.dtype) for part in at.unbind(1))
            layer.keys = torch.cat([layer.keys[:, :, :n] + keys_HND, layer.keys[:, :, n:]], 2)
            layer.values = torch.cat([layer.values[:, :, :n] + values_HND, layer.values[:, :, n:]], 2)

    def go_on(self, backbone: Any, heard: Heard, words_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        """The decoder's last states (B, T, D) of tokens that follow what is in the cache; it and the mask grow."""
        t = valid_BT.shape[1]
        assert heard.start_BD is not None
        embeds_BTD = words_BTD + heard.start_BD[:, None].to(words_BTD.dtype)
        positions = heard.last_B[:, None] + valid_BT.long().cumsum(1)
        causal = torch.ones(t, t, dtype=torch.bool, device=valid_BT.device).tril()
        # padding sees itself nowhere, and nothing reads it
        before = heard.mask_BS[:, None].expand(-1, t, -1)
        out = self._say(backbone, heard, embeds_BTD, positions, torch.cat([before, causal & valid_BT[:, None]], 2))
        heard.mask_BS = torch.cat([heard.mask_BS, valid_BT], 1)
        heard.last_B = positions[:, -1]
        return out

    def _say(self, backbone: Any, heard: Heard, embeds_BTD: Tensor, positions_BT: Tensor, sees: Tensor) -> Tensor:
        """The decoder's last states (B, T, D) of tokens that see of the cache and of each other what `sees`
        (B, T, S + T) says. The cache grows."""
        mask = torch.zeros(sees.shape, dtype=embeds_BTD.dtype, device=embeds_BTD.device)
        out: Tensor = self._speaking(backbone)(
            inputs_embeds=embeds_BTD,
            attention_mask=mask.masked_fill(~sees, _MASKED)[:, None],
            position_ids=positions_BT,
            past_key_values=heard.cache,
            use_cache=True,
        ).last_hidden_state
        return out

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
        self,
        backbone: Any,
        heard: Heard,
        asked: Asked,
        asked_BQF: Tensor | None,
        *,
        smoothing: float,
    ) -> Tensor:
        """Mean cross-entropy of the tokens that are to be said, among those that it says, labels smoothed; and that of
        which things the answers name. `asked_BQF`: where what each question names is seen."""
        questions, front = asked.questions_BQT.shape[1], heard.mask_BS.shape[1]
        start_BQD, turn_BQNR = self._begin(backbone, heard, asked_BQF, asked.questions_BQT)
        number_BT1 = asked.number_BT.clamp(min=0)[..., None]
        words_BTD = backbone.vlm.model.get_input_embeddings()(asked.ids_BT)
        embeds_BTD = words_BTD + start_BQD.gather(1, number_BT1.expand(-1, -1, words_BTD.shape[-1])).to(words_BTD.dtype)
        t = embeds_BTD.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=embeds_BTD.device).tril()
        mine = asked.number_BT[:, :, None] == asked.number_BT[:, None]
        before = heard.mask_BS[:, None].expand(-1, t, -1)
        if self.scene is not None:  # each question has what it reads of things for itself
            things = heard.mask_BS.shape[1] - front
            owner_S = torch.arange(questions, device=mine.device).repeat_interleave(things // questions)
            before = torch.cat([before[..., :front], asked.number_BT[:, :, None] == owner_S], 2)
        positions_BT = heard.last_B[:, None] + 1 + asked.place_BT
        hidden = self._say(backbone, heard, embeds_BTD, positions_BT, torch.cat([before, causal & mine], 2))
        counted = asked.labels_BT >= 0
        logits, words = self.words(backbone, hidden[counted])
        labels = torch.searchsorted(words, asked.labels_BT[counted])
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if turn_BQNR is None:
            return loss
        turns = F.cross_entropy(turn_BQNR.float().flatten(0, 2), asked.turn_BQN.flatten(), reduction="sum")
        return loss + TURN_WEIGHT * turns / asked.turn_BQN[..., 0].numel()

    def teach(self, ids: Tensor) -> None:
        """Say these tokens (N,) from now on, and no others."""
        self.says_V.zero_()
        self.says_V[ids] = True

    def words(self, backbone: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., K), float32, of the tokens that it says after these states (..., D); and their ids (K,)."""
        head, words = backbone.vlm.lm_head, self.says_V.nonzero()[:, 0]
        logits: Tensor = functional_call(head, {"weight": head.weight[words]}, (hidden,))
        return logits.float(), words


def _mean_word(backbone: Any, ids: Tensor) -> Tensor:
    """Mean word vectors (..., D) of texts (..., T), padded with 0."""
    said = (ids > 0)[..., None].float()
    words = backbone.vlm.model.get_input_embeddings()(ids).float()
    return (words * said).sum(-2) / said.sum(-2).clamp(min=1)


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
