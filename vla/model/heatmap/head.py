"""The heat-map head: what the backbone saw in the three views -> a heat-map for each, and verdicts at a place.

BridgeVLA's decoder: coarse maps from the image tokens, made fine by convex up-sampling (Teed and Deng 2020), features
gathered at the peak for everything that is no position. Ours also reads the backbone's finer look, where it has one,
and where the hand is, which a picture of 96 pixels hardly shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.features import TensorBatch
from vla.model.heatmap.orthographic import COMPONENTS, SIGNS
from vla.model.heatmap.volume import sample_views

SLOTS = ("object", "place")
"""Questions of pre-training: the thing that the instruction names, and the place it names for it."""
_SPARE = 2
"""Further slots, which only keyframes use: a pose that belongs to no thing."""
_NEAR_M = 0.05
_COORDINATES = 8


@dataclass(frozen=True, eq=False)
class Seen(TensorBatch):
    """The backbone's account of the three views of B scenes; fit for caching, also in half precision."""

    tokens_BVPD: Tensor
    """Image tokens after the last layer, a square grid of each view."""
    queries_BQD: Tensor
    """Action queries after the last layer."""
    fine_BVCHW: Tensor | None
    """Features of the finer look, if there is one."""
    looks_BKVHW: Tensor | None
    """Where the finer look looks for the K named things: logits."""

    def float(self) -> Seen:
        """Everything in float32."""
        return self.map(Tensor.float)


class _Verdict(nn.Module):
    """One hidden layer over features and the robot's state.

    The state has weights of its own, which begin as large as a thousand features' together: two numbers that say
    whether the gripper is closed would drown otherwise, and a hand that has closed would not know that it has.
    """

    def __init__(self, features: int, state_dim: int, *, hidden: int, out: int) -> None:
        super().__init__()
        self.features = nn.Linear(features, hidden)
        self.state = nn.Parameter(torch.randn(state_dim, hidden))
        self.out = nn.Linear(hidden, out)

    def forward(self, features_BF: Tensor, state_BS: Tensor) -> Tensor:
        """Logits (B, out)."""
        return self.out(F.gelu(self.features(features_BF) + state_BS @ self.state))


class HeatmapHead(nn.Module):
    """Features of three views -> logits of their heat-maps (B, V, R, R), and features from which verdicts are told."""

    _parts: Tensor
    _along: Tensor

    def __init__(
        self,
        *,
        width: int,
        token_width: int,
        num_queries: int,
        side: int,
        fine_channels: int,
        fine_side: int,
        looks: int,
        resolution: int,
        state_dim: int,
        flags: int = 2,
        turns: int = 0,
    ) -> None:
        """`side` of the token grid; `fine_channels` and `fine_side` of the finer look (0: none), `looks` its logits;
        `state_dim`: numbers about the robot that are no positions; `flags` and logits of bins (`turns`) to tell of a
        keyframe. ValueError for grids that do not divide."""
        super().__init__()
        self.grid = fine_side if fine_channels else side
        if resolution % self.grid or self.grid % side:
            raise ValueError(f"views of {resolution} pixels do not divide into a grid of {self.grid} cells")
        self.factor, self.repeat = resolution // self.grid, self.grid // side
        self.from_tokens = nn.Linear(token_width, width)
        self.from_fine = nn.Conv2d(fine_channels, width, 1) if fine_channels else None
        self.from_looks = nn.Conv2d(looks, width, 1) if looks else None
        self.from_coordinates = nn.Conv2d(_COORDINATES, width, 1)
        self.view = nn.Parameter(0.02 * torch.randn(3, width))
        self.ask = nn.Sequential(
            nn.Linear(num_queries * token_width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width)
        )
        slots = len(SLOTS) + _SPARE
        self.slots = nn.Parameter(torch.randn(slots, 2 * width))
        # The finer look's own verdict is where the heat-map begins.
        self.prior = nn.Parameter(torch.eye(slots, looks)) if looks else None
        self.choose = _Verdict(num_queries * token_width, state_dim, hidden=2 * width, out=slots)
        nn.init.zeros_(self.choose.out.weight)
        with torch.no_grad():  # until it has learnt otherwise, the hand goes to what is named
            self.choose.out.bias.copy_(2.0 * torch.eye(slots)[0])
        self.modulate = nn.ModuleList([nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 2 * width)])
        self.mix = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=2, dilation=2)]
        )
        self.heat = nn.Conv2d(width, 1, 3, padding=1)
        self.mask = nn.Conv2d(width, 9 * self.factor**2, 1)
        # Right and down of every view: the component, and where along it the cells are, in halves of the cube.
        axis = (torch.arange(self.grid) + 0.5) / self.grid * 2 - 1
        signs = torch.tensor([sign for triple in SIGNS for sign in triple[:2]])
        parts = torch.tensor([part for triple in COMPONENTS for part in triple[:2]])
        self.register_buffer("_parts", parts, persistent=False)
        self.register_buffer("_along", signs[:, None] * axis, persistent=False)
        self.flags = _Verdict(3 * width + 2 * width, state_dim, hidden=2 * width, out=flags)
        self.turn = _Verdict(3 * width + 2 * width, state_dim, hidden=4 * width, out=turns) if turns else None

    def fixed_slot(self, slot_B: Tensor) -> Tensor:
        """(B, slots) weights that ask for slots of `SLOTS` by number, in pre-training."""
        return F.one_hot(slot_B, len(self.slots)).to(self.slots.dtype)

    def chosen_slot(self, seen: Seen, state_BS: Tensor) -> Tensor:
        """(B, slots) weights: what the next keyframe is about, by the instruction and the robot's state."""
        return self.choose(_normal(seen.queries_BQD).flatten(1), state_BS).softmax(-1)

    def forward(
        self, seen: Seen, slot_BK: Tensor, hand_B3: Tensor, centre_B3: Tensor, half_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, V, R, R); features (B, V, C, grid, grid) and the question (B, 2 width) for `verdicts_at`.

        `hand_B3`: the hand's position; `centre_B3`, `half_B`: the cube shown. All in the robot's frame, m.
        """
        batch, views = seen.tokens_BVPD.shape[:2]
        side = self.grid // self.repeat
        # Maps (M, H, W, C) of all views: channels last throughout, so that no layer has to copy them into its order.
        x = self.from_tokens(_normal(seen.tokens_BVPD)) + self.view[:, None]
        x = x.flatten(0, 1).unflatten(1, (side, side))
        if self.repeat > 1:
            x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=self.repeat, mode="bilinear", align_corners=False)
            x = x.permute(0, 2, 3, 1)
        # Everything else that is read of a cell enters by two products, whose parts have weights of their own.
        layers, given = [self.from_coordinates], [self._coordinates(hand_B3, centre_B3, half_B).flatten(0, 1)]
        if self.from_looks is not None:
            assert seen.looks_BKVHW is not None
            looks = (seen.looks_BKVHW / 8).permute(0, 2, 3, 4, 1)
            layers, given = [*layers, self.from_looks], [*given, looks.flatten(0, 1)]
        weight, bias = torch.cat([layer.weight for layer in layers], 1)[:, :, 0, 0], sum(p.bias for p in layers)
        x = x + F.linear(torch.cat(given, -1), weight, bias)
        if self.from_fine is not None:
            assert seen.fine_BVCHW is not None
            fine = seen.fine_BVCHW.flatten(0, 1).permute(0, 2, 3, 1)
            x = x + F.linear(fine, self.from_fine.weight[:, :, 0, 0], self.from_fine.bias)
        asked = F.gelu(self.ask(_normal(seen.queries_BQD).flatten(1)) + slot_BK @ self.slots)
        for modulate, mix in zip(self.modulate, self.mix, strict=True):
            scale, shift = (part.repeat_interleave(views, 0)[:, None, None] for part in modulate(asked).chunk(2, -1))
            y = torch.addcmul(shift, F.layer_norm(x, x.shape[1:]), 1 + scale)
            x = x + mix(F.gelu(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = F.gelu(x)
        # A convolution to one channel, as nine products with a cell that are summed where they belong.
        nine = F.linear(y, self.heat.weight[0].flatten(1).T.flip(0))
        coarse = F.fold(nine.flatten(1, 2).mT, (self.grid, self.grid), 3, padding=1) + self.heat.bias
        coarse, y = coarse[:, 0].unflatten(0, (batch, views)), y.unflatten(0, (batch, views))
        if self.prior is not None:
            assert seen.looks_BKVHW is not None
            coarse = coarse + ((slot_BK @ self.prior)[..., None, None, None] * seen.looks_BKVHW).sum(1)
        return self.upsampled(coarse, y), y.permute(0, 1, 4, 2, 3), asked

    def upsampled(self, coarse: Tensor, cells: Tensor) -> Tensor:
        """Logits of the cells (B, V, grid, grid), whose features are (B, V, grid, grid, C), on the views' pixels
        (B, V, R, R): each a convex combination of the nine cells around its own, with weights that the cell's features
        tell. Teed and Deng 2020, RAFT."""
        batch, views, height, width = coarse.shape
        factor = self.factor
        weight = F.linear(cells.flatten(0, 1), 0.1 * self.mask.weight[:, :, 0, 0], 0.1 * self.mask.bias)
        weight = weight.unflatten(-1, (9, factor**2)).softmax(-2)
        around = F.unfold(F.pad(coarse.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate"), 3).mT
        fine = (around.unflatten(1, (height, width))[..., None] * weight).sum(-2)
        fine = fine.unflatten(-1, (factor, factor)).permute(0, 1, 3, 2, 4)
        return fine.reshape(batch, views, height * factor, width * factor)

    def verdicts_at(
        self, maps: Tensor, asked_BW: Tensor, state_BS: Tensor, at_B3: Tensor, centre_B3: Tensor, half_B: Tensor
    ) -> Tensor:
        """Logits (B, flags + turns) of a keyframe at positions `at_B3`, by the features of the cells onto which it
        falls."""
        found = torch.cat([sample_views(maps, at_B3, centre_B3, half_B), asked_BW], 1)
        told = [self.flags(found, state_BS)]
        return torch.cat(told if self.turn is None else [*told, self.turn(found, state_BS)], 1)

    def _coordinates(self, hand_B3: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
        """(B, V, grid, grid, 8): where each cell is from the hand and in the robot's frame, near and far, and how large
        the cube is."""
        # Along one direction of the picture at a time: right and down of every view.
        at = torch.addcmul(centre_B3[:, self._parts, None], self._along, half_B[:, None, None])
        from_hand = at - hand_B3[:, self._parts, None]
        told = [torch.tanh(from_hand / _NEAR_M), torch.tanh(from_hand / (5 * _NEAR_M)), at]
        right, down = torch.stack(told, -1).unflatten(1, (-1, 2)).unbind(2)
        right, down = right[:, :, None], down[:, :, :, None]
        near = torch.exp(-(right[..., :1].square() + down[..., :1].square()))
        shape = (-1, -1, self.grid, self.grid, -1)
        size = half_B[:, None, None, None, None].expand_as(near)
        return torch.cat([right.expand(shape), down.expand(shape), size, near], -1)


def _normal(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:])
