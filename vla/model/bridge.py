"""Bridge attention: an action latent that reads every layer of a vision-language backbone. Pure nn.Module maths.

VLA-Adapter, arXiv 2509.09372, section 3.3, as the equation says: the gate multiplies an attention's *output*, so gate 0
contributes exactly 0; the feed-forward is residual; chunk positions are learned and the same in training and inference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.model.advantage import AdvantageStem
from vla.model.config import AdvantageConfig, BridgeConfig, MemoryConfig
from vla.model.memory.tokens import MemoryTokens


def resolve_taps(taps: tuple[int, ...] | str | None, num_layers: int) -> tuple[int, ...]:
    """The layer, 0 .. num_layers - 1, that feeds each block.

    "every:K" counts down from the last layer, which it always includes. "first:N" lets the backbone stop after N
    layers. "last:N" is N blocks that all read the last layer: the usual action head; "last:all" has it at full depth.
    Raises ValueError for anything that does not name layers of this backbone.
    """
    layers = range(num_layers)
    if taps is None or taps == "all":
        return tuple(layers)
    if isinstance(taps, str):
        rule, _, given = taps.partition(":")
        count = num_layers if taps == "last:all" else int(given) if given.isdecimal() else None
        if taps == "last" or (rule == "last" and count):
            return (num_layers - 1,) * (count or 1)
        if rule == "every" and count and count <= num_layers:
            return tuple(layers[num_layers - 1 :: -count][::-1])
        if rule == "first" and count and count <= num_layers:
            return tuple(layers[:count])
        raise ValueError(
            f"bridge taps '{taps}' must be all, last, last:N, last:all, every:K, first:N (K, N from 1 to {num_layers}) "
            "or a list of layers"
        )
    if not taps or not all(tap in layers for tap in taps):
        raise ValueError(f"bridge taps {taps} must name layers 0..{num_layers - 1} of the backbone")
    return taps


def rope_table(length: int, head_width: int, *, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_width / 2) of rotary angles. Su et al. 2021; `base` small because chunks are short."""
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., length, head_width) by position: component i pairs with i + head_width / 2, as in the table."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_weights(score: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, in at least float32. `mask` bool, True = may be attended.

    Spelled out instead of F.scaled_dot_product_attention, whose backward is several times slower on CPU.
    """
    kept = score.dtype
    if kept in (torch.float16, torch.bfloat16):
        score = score.float()
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    return score.softmax(dim=-1).to(kept)


class BridgeBlock(nn.Module):
    """x + o([CA(x, raw) * tanh(g); CA(x, [queries, proprio]); SA(x, x)]), then x + FFN(LN(x))."""

    def __init__(self, config: BridgeConfig, *, feature_width: int, point_dim: int, remembers: bool = False) -> None:
        """`feature_width` D is the backbone's; `point_dim` E > 0 when this block sees pointed coordinates.
        `remembers`: it reads tokens of earlier decisions, too."""
        super().__init__()
        width, self.heads, self.kv_heads = config.width, config.heads, config.kv_heads
        self.head_width = width // config.heads
        self.scale = self.head_width**-0.5
        self.norm = nn.LayerNorm(width)
        self.attentions = 3 if config.raw else 2
        self.shared = config.shared_projections
        self.repeat = config.heads // config.kv_heads if config.grouped else 1
        kv_width = width // self.repeat
        # Queries of each attention, then keys and values of the self-attention, in one product.
        asked = 1 if self.shared else self.attentions
        self.parts_of_x = [width] * asked + [kv_width] * 2
        self.project_x = nn.Linear(width, sum(self.parts_of_x), bias=False)
        self.project_queries = nn.Linear(feature_width, 2 * kv_width, bias=False) if config.queries else None
        self.project_proprio = nn.Linear(width, 2 * kv_width, bias=False)
        self.project_points = nn.Linear(point_dim, 2 * kv_width, bias=False) if point_dim else None
        if config.raw:
            self.raw_key = nn.Parameter(torch.empty(config.kv_heads, self.head_width, feature_width))
            self.raw_value = nn.Parameter(torch.empty(config.kv_heads, self.head_width, feature_width))
            for weight in (self.raw_key, self.raw_value):
                nn.init.uniform_(weight, -(feature_width**-0.5), feature_width**-0.5)
            self.coordinate_value = nn.Parameter(torch.empty(config.kv_heads, self.head_width, 3))
            if config.coordinate_values:
                nn.init.uniform_(self.coordinate_value, -(3**-0.5), 3**-0.5)
            else:
                self.coordinate_value = None
            self.gate = nn.Parameter(torch.tensor(float(config.gate_init)))
        self.out = nn.Linear((1 if self.shared else self.attentions) * width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn_multiple * width), nn.GELU(), nn.Linear(config.ffn_multiple * width, width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.project_memory = nn.Linear(width, 2 * kv_width, bias=False) if remembers else None

    def forward(
        self,
        x_BCD: Tensor,
        raw_BND: Tensor | None,
        queries_BQD: Tensor | None,
        proprio_BD: Tensor,
        *,
        points_BQE: Tensor | None = None,
        coords_NE: Tensor | None = None,
        raw_mask_BN: Tensor | None = None,
        raw_stats: tuple[Tensor, Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        memory_BTD: Tensor | None = None,
    ) -> Tensor:
        """The latent (B, C, width) after this block. Queries come already normalised: zero mean, unit variance.

        Raw tokens do too, or else with their `raw_stats`: mean and 1 / standard deviation, each (B, N).
        """
        *asked, key_self, value_self = self.project_x(self.norm(x_BCD)).split(self.parts_of_x, dim=-1)
        # The order of the reads: raw tokens, conditions, the chunk itself.
        query_cond, query_self = self._split(asked[-2] if len(asked) > 1 else asked[-1]), self._split(asked[-1])
        key_self, value_self = self._split(key_self), self._split(value_self)
        if rope is not None:
            query_self, key_self = rotate(query_self, *rope), rotate(key_self, *rope)
        cond_BQK = self.project_proprio(proprio_BD)[:, None]
        if self.project_queries is not None:
            assert queries_BQD is not None
            told_BQK = self.project_queries(queries_BQD)
            if self.project_points is not None:
                assert points_BQE is not None
                told_BQK = told_BQK + self.project_points(points_BQE)
            cond_BQK = torch.cat([told_BQK, cond_BQK], dim=1)
        if self.project_memory is not None:
            assert memory_BTD is not None
            cond_BQK = torch.cat([cond_BQK, self.project_memory(memory_BTD)], dim=1)
        key_cond, value_cond = (self._split(part) for part in cond_BQK.chunk(2, dim=-1))

        reads = [self._attend(query_cond, key_cond, value_cond), self._attend(query_self, key_self, value_self)]
        if self.attentions == 3:
            assert raw_BND is not None
            raw_read = self._read_raw(asked[0], raw_BND, coords_NE, raw_mask_BN, raw_stats)
            reads.insert(0, raw_read * torch.tanh(self.gate))
        x_BCD = x_BCD + self.dropout(self.out(sum(reads) if self.shared else torch.cat(reads, dim=-1)))
        return x_BCD + self.dropout(self.ffn(self.ffn_norm(x_BCD)))

    def _attend(self, query_BHCW: Tensor, key_BGTW: Tensor, value_BGTW: Tensor) -> Tensor:
        """Attention of all heads over T tokens with G groups of keys and values, (B, C, width)."""
        chunk = query_BHCW.shape[2]
        if self.repeat > 1:  # the heads of a group ask together, as more rows of one product
            query_BHCW = query_BHCW.unflatten(1, (-1, self.repeat)).flatten(2, 3)
        read = attention_weights(query_BHCW @ key_BGTW.transpose(-1, -2) * self.scale) @ value_BGTW
        if self.repeat > 1:
            read = read.unflatten(2, (self.repeat, chunk)).flatten(1, 2)
        return read.transpose(1, 2).flatten(2)

    def _read_raw(
        self,
        query_BCD: Tensor,
        raw_BND: Tensor,
        coords_NE: Tensor | None,
        mask_BN: Tensor | None,
        stats: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention over the raw tokens, (B, C, width).

        Few queries read many tokens, so the key and value projections move to the query's side of each product:
        q . (Wk r) = (Wk' q) . r and sum_n a_n Wv r_n = Wv sum_n a_n r_n. Keys and values of N tokens are never formed.
        Nor are normalised tokens: p . (r - m) s = (p . r - m sum p) s, and sum_n a_n (r_n - m_n) s_n likewise.
        """
        batch, chunk, _ = query_BCD.shape
        groups, per_group = self.kv_heads, self.heads // self.kv_heads
        query = query_BCD.reshape(batch, chunk, groups, per_group, self.head_width)
        query = query.permute(2, 0, 3, 1, 4).reshape(groups, -1, self.head_width)  # (G, B*R*C, head)
        probe = torch.bmm(query * self.scale, self.raw_key).view(groups, batch, per_group * chunk, -1)
        probe = probe.transpose(0, 1).reshape(batch, groups * per_group * chunk, -1)  # (B, G*R*C, D)
        score = torch.bmm(probe, raw_BND.transpose(1, 2))  # (B, G*R*C, N)
        if stats is not None:
            mean_B1N, inverse_B1N = (stat[:, None] for stat in stats)
            score = (score - probe.sum(-1, keepdim=True) * mean_B1N) * inverse_B1N
        weight = attention_weights(score, None if mask_BN is None else mask_BN[:, None, :])
        if stats is None:
            mixed = torch.bmm(weight, raw_BND)
        else:
            scaled = weight * inverse_B1N
            mixed = torch.bmm(scaled, raw_BND) - (scaled @ mean_B1N.transpose(1, 2))

        def per_kv_head(read: Tensor) -> Tensor:
            return read.view(batch, groups, per_group * chunk, -1).transpose(0, 1).reshape(groups, -1, read.shape[-1])

        value = torch.bmm(per_kv_head(mixed), self.raw_value.transpose(1, 2))
        if self.coordinate_value is not None:
            assert coords_NE is not None
            value = value + torch.bmm(per_kv_head(weight @ coords_NE), self.coordinate_value.transpose(1, 2))
        value = value.view(groups, batch, per_group, chunk, self.head_width)
        return value.permute(1, 3, 0, 2, 4).reshape(batch, chunk, -1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class Bridge(nn.Module):
    """Conditions of every tapped layer and the robot's state -> one latent per step of the chunk."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        config: BridgeConfig,
        *,
        chunk_size: int,
        feature_width: int,
        num_layers: int,
        proprio_dim: int,
        point_dim: int = 0,
        num_queries: int = 0,
        num_views: int = 1,
        raw_xyz_dim: int = 0,
        memory: MemoryConfig | None = None,
        advantage: AdvantageConfig | None = None,
    ) -> None:
        """`feature_width`, `num_layers`, `point_dim`: the backbone's width D, tapped layers L and E (0: no points).

        `num_queries` Q is only needed by the point stem and the `memory`, `num_views` by the latter; `raw_xyz_dim`:
        numbers of a raw token's coordinates in the robot's frame (0: it has none).

        Raises ValueError for a configuration that fits neither itself nor the backbone.
        """
        super().__init__()
        if problem := config.problem():
            raise ValueError(problem)
        taps = resolve_taps(config.taps, num_layers)
        points_at = tuple(range(len(taps))) if config.points_at is None else config.points_at
        if not all(0 <= block < len(taps) for block in points_at):
            raise ValueError(f"bridge points_at {points_at} must name blocks 0..{len(taps) - 1}")
        points_at = points_at if config.queries else ()  # points belong to queries
        self.config, self.taps = config, taps
        self.layers_needed = max(taps) + 1
        """Number of backbone layers that must run; the ones behind them may be left out."""
        self.chunk_size, self.width, self.proprio_dim = chunk_size, config.width, proprio_dim
        self.needs_points = point_dim > 0 and len(points_at) > 0
        self.position = nn.Parameter(torch.randn(chunk_size, config.width) * 0.5)
        self.embed_proprio = nn.Sequential(
            nn.Linear(proprio_dim, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.proprio_norm = nn.LayerNorm(config.width)
        self.embed_points = None
        if config.point_stem and self.needs_points and num_queries:
            hidden = 2 * config.width
            self.embed_points = nn.Sequential(
                nn.Linear(num_queries * point_dim + proprio_dim, hidden),
                nn.GELU(),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Linear(hidden, config.width),
            )
        self.embed_xyz = None
        if raw_xyz_dim and config.raw:
            self.embed_xyz = nn.Sequential(
                nn.Linear(raw_xyz_dim, config.width), nn.GELU(), nn.Linear(config.width, feature_width)
            )
        self.blocks = nn.ModuleList(
            BridgeBlock(
                config,
                feature_width=feature_width,
                point_dim=point_dim if block in points_at else 0,
                remembers=memory is not None,
            )
            for block in range(len(taps))
        )
        self.memory = None
        if memory is not None:
            sizes = {"num_queries": num_queries, "point_dim": point_dim, "proprio_dim": proprio_dim, "views": num_views}
            self.memory = MemoryTokens(memory, width=config.width, feature_width=feature_width, **sizes)
        self.num_points = num_queries * point_dim if self.needs_points else 0
        self.advantage = None if advantage is None else self.advantage_stem()
        if config.rope:
            cos, sin = rope_table(chunk_size, config.width // config.heads)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def advantage_stem(self) -> AdvantageStem:
        """A fresh one for this bridge."""
        return AdvantageStem(self.num_points + self.proprio_dim, self.width)

    def forward(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """Action latent (B, C, width). `proprio_BP` normalised. Features of any float precision are read in ours."""
        dtype = self.position.dtype
        if proprio_BP.shape[-1] != self.proprio_dim:
            raise ValueError(f"the bridge reads {self.proprio_dim} proprio values, got {proprio_BP.shape[-1]}")
        points = None
        if self.needs_points:
            pointed = features.pointed_BQE
            if pointed is None:
                raise ValueError("this bridge was built for a backbone that points, but the features hold no points")
            points = pointed.to(dtype)
        coords = features.coords_NE.to(dtype)
        rope = (self.rope_cos.to(dtype), self.rope_sin.to(dtype)) if self.config.rope else None
        state = self.embed_proprio(proprio_BP.to(dtype))
        if self.advantage is not None:
            seen = [proprio_BP.to(dtype)] if points is None else [points.flatten(1), proprio_BP.to(dtype)]
            state = state + self.advantage(features.advantage_B, torch.cat(seen, 1))
        token = self.proprio_norm(state)
        x_BCD = self.position + state[:, None]
        if self.embed_points is not None:
            assert points is not None
            x_BCD = x_BCD + self.embed_points(torch.cat([points.flatten(1), proprio_BP.to(dtype)], 1))[:, None]
        placed = None
        if self.embed_xyz is not None:
            if features.raw_xyz_BNE is None:
                raise ValueError("this bridge reads where raw tokens are in the robot's frame, which is not given")
            placed = self.embed_xyz(features.raw_xyz_BNE.to(dtype))
        remembered = None
        if self.memory is not None:
            if features.memory_BMK is None:
                raise ValueError("this policy remembers: it acts through VLAPolicy, which keeps an episode's memory")
            remembered, stem = self.memory(features, proprio_BP.to(dtype))
            x_BCD = x_BCD + stem[:, None]
        for tap, block in zip(self.taps, self.blocks, strict=True):
            raw = features.raw_BLND[:, tap].to(dtype) if self.config.raw else None
            if raw is not None and placed is not None:
                raw = layer_normal(raw) + placed
            x_BCD = block(
                x_BCD,
                raw,
                layer_normal(features.queries_BLQD[:, tap].to(dtype)) if self.config.queries else None,
                token,
                points_BQE=points,
                coords_NE=coords,
                raw_mask_BN=features.raw_mask_BN,
                raw_stats=None if raw is None or placed is not None else layer_stats(raw),
                rope=rope,
                memory_BTD=remembered,
            )
        return x_BCD


def layer_normal(hidden_BTD: Tensor) -> Tensor:
    """LayerNorm of one layer's conditions. Without scale and shift: each block's projections hold them already."""
    return F.layer_norm(hidden_BTD, hidden_BTD.shape[-1:])


def layer_stats(hidden_BTD: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation that `layer_normal` applies, each (B, T).

    From the norm, because torch.var_mean is 20 times slower on a CPU; hidden states have means far below their norms.
    """
    mean = hidden_BTD.mean(dim=-1)
    square = torch.linalg.vector_norm(hidden_BTD, dim=-1).square() / hidden_BTD.shape[-1]
    return mean, ((square - mean.square()).clamp(min=0.0) + eps).rsqrt()
