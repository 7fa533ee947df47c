"""Image coordinates that the queries attend to: over the decoder's patches, then over the image itself.

A softmax over places and its expected coordinate (a soft argmax, as in Levine et al. 2016) learns positions in minutes
where regression from a transformer's features takes hours (figures: docs/research-log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTER_WIDTH = 64
STRIDE_PX = 4
PEAK_CELLS, PEAK_PX = 1, 16
"""How far from where a query looks most a coordinate is still read: patches of the first look, pixels of the second."""
SIGHT_WIDTH, SIGHT_DROPOUT = 256, 0.5


def _weights(logits_BQVP: Tensor, grid_P2: Tensor, reach: float | None) -> Tensor:
    """Softmax over places; with `reach`, only over those within it (in both directions, the image's side is 2) of the
    likeliest place. Between two things that both may be meant there is nothing, but their mean is there."""
    weight = logits_BQVP.softmax(-1)
    if reach is None:
        return weight
    peak_BQV12 = grid_P2[weight.argmax(-1)][..., None, :]
    weight = weight * ((grid_P2 - peak_BQV12).abs().amax(-1) < reach)
    return weight / weight.sum(-1, keepdim=True)


class Pointer(nn.Module):
    """Attention of each query: per view, softmax over its patches -> expected coordinate, and its visibility."""

    def __init__(self, width: int, *, patch_half: float, peak: bool = False) -> None:
        """`patch_half`: half a patch's side, where the image's is 2. `peak`: when it does not learn, it reads the
        coordinate of the likeliest place alone."""
        super().__init__()
        self.peak = peak
        self.query = nn.Linear(width, POINTER_WIDTH)
        self.key = nn.Linear(width, POINTER_WIDTH)
        self.shift = nn.Linear(width, 2)
        self.visible = nn.Linear(width, 1)
        self.patch_half = patch_half

    def forward(self, query_BQD: Tensor, patch_BVPD: Tensor, grid_P2: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, Q, V, 3) = x, y in [-1, 1] and a visibility logit, float32; attention logits (B, Q, V, P)."""
        logits = self.scores(query_BQD, patch_BVPD)
        reach = (2 * PEAK_CELLS + 1) * self.patch_half if self.peak and not self.training else None
        weight = _weights(logits, grid_P2, reach)
        # Each patch may move its coordinate within (and a little beyond) itself: precision below the patch size.
        at_BVP2 = grid_P2 + 1.5 * self.patch_half * torch.tanh(self.shift(patch_BVPD).float())
        xy = torch.einsum("bqvp,bvpc->bqvc", weight, at_BVP2)
        seen = torch.einsum("bqvp,bvpc->bqvc", weight, patch_BVPD.float()) + query_BQD.float()[:, :, None]
        logit = F.linear(seen, self.visible.weight.float(), self.visible.bias.float())
        return torch.cat([xy, logit], dim=-1), logits

    def scores(self, query_BQD: Tensor, patch_BVPD: Tensor) -> Tensor:
        """Attention logits (B, Q, V, P) alone, float32."""
        q, k = self.query(query_BQD), self.key(patch_BVPD)
        return torch.einsum("bqd,bvpd->bqvp", q, k).float() * POINTER_WIDTH**-0.5

    def found(self, patch_BVPD: Tensor, logits_BQVP: Tensor, grid_P2: Tensor) -> Tensor:
        """The patches that each query found (B, Q, D): those that it looks at, the views weighed by how strongly; when
        it does not learn and reads peaks, those of the view with the strongest alone."""
        sure = self.peak and not self.training
        weight = _weights(logits_BQVP, grid_P2, (2 * PEAK_CELLS + 1) * self.patch_half if sure else None)
        strength_BQV = logits_BQVP.logsumexp(-1)
        view = (strength_BQV == strength_BQV.amax(-1, keepdim=True)).float() if sure else strength_BQV.softmax(-1)
        return torch.einsum("bqvp,bqv,bvpd->bqd", weight, view, patch_BVPD.float())


class SharpPointer(nn.Module):
    """Refinement of `Pointer` on the image itself: each query attends to a convolution's cells of 4 pixels.

    The patches that went through the language model know *what* is where, on a grid of 12 pixels; a small convolution
    beside it knows *where* exactly. The coarse attention enters as a prior, so that it starts where the first look was.
    """

    grid_P2: Tensor

    def __init__(
        self, width: int, *, image_size: int, side: int, channels: int = 3, peak: bool = False, agree: bool = False
    ) -> None:
        """`width` of the queries; `side` of the coarse grid; `channels`: 3 to look at the picture, or those of features
        on the fine grid; `peak` as of `Pointer`. `agree`: what the first looks found in any view is looked for in all
        of them, and compared with what is seen in each. ValueError if the fine grid does not divide the coarse one
        evenly."""
        super().__init__()
        self.peak, self.side = peak, image_size // STRIDE_PX
        if image_size % STRIDE_PX or self.side % side:
            raise ValueError(
                f"a sharp pointer needs patches of a multiple of {STRIDE_PX} pixels, not {image_size}/{side}"
            )
        self.repeat = self.side // side
        self.look = _of_pictures() if channels == 3 else _of_features(channels)
        channels = POINTER_WIDTH
        self.key = nn.Conv2d(channels, channels, 1)
        self.shift = nn.Conv2d(channels, 2, 1)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, channels)
        self.prior = nn.Parameter(torch.tensor(0.5))
        self.visible = nn.Sequential(nn.Linear(width + channels, channels), nn.GELU(), nn.Linear(channels, 1))
        self.agree = agree
        if agree:
            self.taken = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
            self.asked = nn.Linear(width, channels)
            self.alike = nn.Linear(channels, channels, bias=False)
            # They begin without effect, so that a pointer that has learnt may go on with them.
            nn.init.zeros_(self.taken[1].weight)
            nn.init.zeros_(self.taken[1].bias)
            nn.init.zeros_(self.alike.weight)
        axis = (torch.arange(self.side) + 0.5) / self.side * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("grid_P2", torch.stack([x, y], -1).view(-1, 2), persistent=False)

    def forward(
        self, pixels_BVCHW: Tensor, query_BQD: Tensor, coarse_BQVP: Tensor, found_BQD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the same as `Pointer`. `pixels_BVCHW` are normalised images, or features on the fine grid;
        `coarse_BQVP` its logits; `found_BQD` its `found`, if the views are to agree."""
        seen_BVPC, query, logits = self._compared(pixels_BVCHW, query_BQD, coarse_BQVP, found_BQD)
        # The coordinates themselves in float32.
        with torch.autocast(pixels_BVCHW.device.type, enabled=False):
            at_BVP2 = self.grid_P2 + (1.5 / self.side) * torch.tanh(_pointwise(self.shift, seen_BVPC))
            reach = (2 * PEAK_PX / STRIDE_PX + 1) / self.side if self.peak and not self.training else None
            weight = _weights(logits, self.grid_P2, reach)
            xy = torch.einsum("bqvp,bvpc->bqvc", weight, at_BVP2)
            there = torch.einsum("bqvp,bvpc->bqvc", weight, seen_BVPC)
            first, *rest = self.visible
            verdict = first(torch.cat([query[:, :, None].expand(-1, -1, xy.shape[2], -1), there], -1))
            if self.agree:
                verdict = verdict + self.alike(self.asked(query)[:, :, None] * there)
            logit = nn.Sequential(*rest)(verdict)
            return torch.cat([xy, logit], -1), logits

    def scores(
        self, pixels_BVCHW: Tensor, query_BQD: Tensor, coarse_BQVP: Tensor, found_BQD: Tensor | None = None
    ) -> Tensor:
        """Attention logits (B, Q, V, P) alone, of `forward`'s arguments."""
        return self._compared(pixels_BVCHW, query_BQD, coarse_BQVP, found_BQD)[2]

    def _compared(
        self, pixels_BVCHW: Tensor, query_BQD: Tensor, coarse_BQVP: Tensor, found_BQD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what is seen (B, V, P, C), queries (B, Q, D), attention logits (B, Q, V, P)), float32."""
        b, v = pixels_BVCHW.shape[:2]
        # In whatever precision surrounds us, four times as fast in bfloat16: < 0.01 px worse (docs/research-log.md).
        seen = self.look(pixels_BVCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        seen_BVPC = seen.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (b, v))
        with torch.autocast(pixels_BVCHW.device.type, enabled=False):
            query = self.norm(query_BQD.float())
            if found_BQD is not None:
                query = query + self.taken(found_BQD.float())
            key_BVPC = _pointwise(self.key, seen_BVPC)
            logits = torch.einsum("bqc,bvpc->bqvp", self.query(query), key_BVPC) * POINTER_WIDTH**-0.5
            return seen_BVPC, query, logits + self.prior * self._finer(coarse_BQVP.float())

    def _finer(self, coarse_BQVP: Tensor) -> Tensor:
        side = self.side // self.repeat
        square = coarse_BQVP.unflatten(-1, (side, side))
        return square.repeat_interleave(self.repeat, -1).repeat_interleave(self.repeat, -2).flatten(-2)


class Sight(nn.Module):
    """How surely what is named is in sight: a verdict on what the queries know at the end, beside the visibility that
    the pointers give.

    A visibility compares a name with what one place looks like. The queries have read the whole sentence and the whole
    picture: that it is small talk, or names a colour and a kind that are on two things, is in their states. It learns
    when all else has, and moves no point (`vla.training.grounding.sight`).
    """

    def __init__(self, width: int) -> None:
        """`width` of the queries."""
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inner = nn.Linear(2 * width + 2, SIGHT_WIDTH)
        self.outer = nn.Linear(SIGHT_WIDTH, 1)

    def forward(self, query_BD: Tensor, mean_BD: Tensor, visible_BV: Tensor) -> Tensor:
        """Logits (B,). `query_BD`: the state of the query that names the object; `mean_BD`: of all queries together;
        `visible_BV`: the object's visibility in each view, 0 to 1."""
        logit_BV = torch.logit(visible_BV.float(), 1e-4)
        best = logit_BV.amax(-1)
        states = [norm(state.float()) for norm, state in zip(self.norms, (query_BD, mean_BD), strict=True)]
        seen = torch.stack([best, logit_BV.amin(-1)], -1) / 4
        hidden = F.gelu(self.inner(torch.cat([*states, seen], -1)))
        if self.training:
            hidden = F.dropout(hidden, SIGHT_DROPOUT)
        return best + self.outer(hidden)[..., 0]


def _pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution by single cells of maps (..., C) whose channels come last: nothing is copied into another order."""
    return F.linear(x, convolution.weight[:, :, 0, 0], convolution.bias)


def _of_pictures() -> nn.Sequential:
    """Pictures (M, 3, S, S) -> features on the grid of `STRIDE_PX`."""
    channels = POINTER_WIDTH
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(48, channels, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=4, dilation=4),
        nn.GELU(),
    )


def _of_features(channels: int) -> nn.Sequential:
    """Features on the fine grid already -> features as the pointer reads them."""
    return nn.Sequential(
        nn.Conv2d(channels, POINTER_WIDTH, 1),
        nn.GELU(),
        nn.Conv2d(POINTER_WIDTH, POINTER_WIDTH, 3, padding=1),
        nn.GELU(),
    )
