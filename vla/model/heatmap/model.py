"""A keyframe policy's model: depth cameras -> three views -> backbone -> heat-maps -> the next keyframe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vla.backbones.backbone import Backbone
from vla.backbones.families import Prompt
from vla.backbones.features import TensorBatch
from vla.model.heatmap.config import HeatmapConfig
from vla.model.heatmap.head import HeatmapHead, Seen
from vla.model.heatmap.orthographic import VIEWS, back_project, render
from vla.model.heatmap.rotation import BINS
from vla.model.heatmap.volume import highest, log_volume, peak, soft_targets

SIGMA_PX = 1.5
"""Deviation of a keyframe's heat-map, pixels (BridgeVLA)."""


@dataclass(frozen=True, eq=False)
class Cloud(TensorBatch):
    """Coloured points of B scenes, in the robot's frame, m."""

    points_BN3: Tensor
    colours_BN3: Tensor
    """uint8"""
    seen_BN: Tensor
    """bool; False: no point."""

    @staticmethod
    def of(images_BVHWC: Tensor, depth_BVHW: Tensor, intrinsics_BV33: Tensor, extrinsics_BV44: Tensor) -> Cloud:
        """All pixels of B scenes' cameras; a depth that is 0 or not finite was not measured."""
        seen_BVHW = (depth_BVHW > 0) & (depth_BVHW < torch.inf)
        depth_BVHW = torch.where(seen_BVHW, depth_BVHW, 0.0)
        points = back_project(depth_BVHW, intrinsics_BV33, extrinsics_BV44).flatten(1, 3)
        return Cloud(points, images_BVHWC.flatten(1, 3), seen_BVHW.flatten(1))


class HeatmapModel(nn.Module):
    """Views and instruction -> heat-maps. The backbone is frozen; the head learns."""

    def __init__(self, config: HeatmapConfig, backbone: Any, *, state_dim: int) -> None:
        """`backbone`: of three views; its picture size is the views' resolution. `state_dim`: numbers of the robot's
        state that are no positions. ValueError for a backbone that does not fit."""
        super().__init__()
        if problem := config.problem():
            raise ValueError(problem)
        if not isinstance(backbone, Backbone):
            raise ValueError("heat-maps need a vision-language backbone (`vla list backbones`), not your own module")
        if backbone.num_views != len(VIEWS):
            raise ValueError(f"heat-maps need a backbone of {len(VIEWS)} views, not {backbone.num_views}")
        sharp = backbone.sharp
        # The views are drawn as the backbone reads them.
        config = replace(config, workspace=replace(config.workspace, resolution=backbone.image_size))
        self.config, self.backbone = config, backbone
        channels = backbone.family.fine_channels if sharp is not None and backbone.family.fine_channels != 3 else 0
        self.head = HeatmapHead(
            width=config.width,
            token_width=backbone.width,
            num_queries=backbone.num_queries,
            side=backbone.side,
            fine_channels=channels,
            fine_side=sharp.side if channels else 0,
            looks=len(backbone.naming) if channels else 0,
            resolution=config.workspace.resolution,
            state_dim=state_dim,
            flags=len(config.flags),
            turns=0 if config.body.turn is None else 3 * BINS,
        )
        self.state_dim = state_dim
        self.taught: tuple[str, ...] = ()
        """Names of the head's parameters that were pre-trained."""
        backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> HeatmapModel:
        """Training mode of the head; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device that holds the head."""
        return self.head.view.device

    def trainable(self) -> list[nn.Parameter]:
        """The head's parameters."""
        return list(self.head.parameters())

    # ------------------------------------------------------------------ seeing
    def views(self, cloud: Cloud, centre_B3: Tensor, half_B: Tensor) -> Tensor:
        """Views (B, 3, R, R, 3) uint8 of cubes."""
        return render(cloud.points_BN3, cloud.colours_BN3, cloud.seen_BN, centre_B3, half_B, self.config.workspace)

    def whole(self, batch: int) -> tuple[Tensor, Tensor]:
        """Centre (B, 3) and half side (B,) of the whole workspace."""
        workspace = self.config.workspace
        centre = torch.tensor(workspace.centre_m, device=self.device)
        return centre.expand(batch, 3), torch.full((batch,), workspace.half_m, device=self.device)

    @torch.no_grad()
    def look(self, views_BVHW3: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Seen:
        """The frozen backbone's account of views and an instruction, float32."""
        return self._seen(self._asked(views_BVHW3, ids_BT, mask_BT))

    def _asked(self, views_BVHW3: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Prompt:
        mask_BT = mask_BT if self.config.language else torch.zeros_like(mask_BT)
        return self.backbone.prompt(views_BVHW3, ids_BT, mask_BT)

    def _asked_again(self, prompt: Prompt, views_BVHW3: Tensor) -> Prompt:
        """The same words about other views: what was heard need not be heard again."""
        backbone = self.backbone
        patches_BND, deep, fine = backbone.look(backbone.normalise(views_BVHW3))
        embeds_BSD = prompt.embeds_BSD.clone()
        backbone.patches_of(embeds_BSD).copy_(patches_BND.unflatten(1, (len(VIEWS), -1)))
        return prompt._replace(embeds_BSD=embeds_BSD, deep=deep, fine=fine)

    def _seen(self, prompt: Prompt) -> Seen:
        backbone = self.backbone
        hidden_BSD = backbone.decode(prompt.embeds_BSD, prompt.mask, prompt.positions, prompt.deep)[-1]
        tokens_BVPD, queries_BQD = backbone.patches_of(hidden_BSD), hidden_BSD[:, -backbone.num_queries :]
        fine = looks = None
        if self.head.from_fine is not None:
            fine = prompt.fine.unflatten(0, (-1, len(VIEWS)))
            named = queries_BQD[:, list(backbone.naming)]
            coarse = backbone.pointer.scores(named, tokens_BVPD)
            found = backbone.pointer.found(tokens_BVPD, coarse, backbone.grid_P2) if backbone.agree else None
            looks = backbone.sharp.scores(fine, named, coarse, found).unflatten(-1, (self.head.grid, self.head.grid))
            fine = fine.float()
        return Seen(tokens_BVPD.float(), queries_BQD.float(), fine, looks)

    # ------------------------------------------------------------------ answering
    @torch.no_grad()
    def decide(
        self, cloud: Cloud, ids_BT: Tensor, mask_BT: Tensor, hand_B3: Tensor, state_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next keyframe of B scenes, its position (B, 3), m, and logits of the verdicts about it: a look at the
        whole workspace, then one at the surroundings of its peak."""
        centre, half = self.whole(len(hand_B3))
        prompt = self._asked(self.views(cloud, centre, half), ids_BT, mask_BT)
        logits, _, _ = self._answered(prompt, hand_B3, state_BS, centre, half)
        centre, half = peak(_heat(logits), centre, half), half / self.config.workspace.zoom
        prompt = self._asked_again(prompt, self.views(cloud, centre, half))
        logits, maps, asked = self._answered(prompt, hand_B3, state_BS, centre, half)
        found = peak(_heat(logits), centre, half)
        return found, self.head.verdicts_at(maps, asked, state_BS, found, centre, half)

    def answer(
        self, views_BVHW3: Tensor, ids_BT: Tensor, mask_BT: Tensor, hand_B3: Tensor, state_BS: Tensor,
        centre_B3: Tensor, half_B: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One look by operations of fixed shapes, as `policies.export` traces it: logits of the heat-maps
        (B, 3, R, R), the place where they are highest together (B, 3), and logits of the verdicts there."""
        prompt = self._asked(views_BVHW3, ids_BT, mask_BT)
        logits, maps, asked = self._answered(prompt, hand_B3, state_BS, centre_B3, half_B)
        found = highest(log_volume(_heat(logits)), centre_B3, half_B)
        return logits, found, self.head.verdicts_at(maps, asked, state_BS, found, centre_B3, half_B)

    def _answered(
        self, prompt: Prompt, hand_B3: Tensor, state_BS: Tensor, centre_B3: Tensor, half_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen = self._seen(prompt)
        return self.head(seen, self.head.chosen_slot(seen, state_BS), hand_B3, centre_B3, half_B)


def _heat(logits_BVHW: Tensor) -> Tensor:
    return logits_BVHW.flatten(2).softmax(-1).view_as(logits_BVHW)


def heat_loss(logits_BVHW: Tensor, at_B3: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """Cross entropy (B,) of the heat-maps with soft targets at positions `at_B3`, mean of the views."""
    target = soft_targets(at_B3, centre_B3, half_B, logits_BVHW.shape[-1], sigma_px=SIGMA_PX)
    return -(target.flatten(2) * logits_BVHW.flatten(2).log_softmax(-1)).sum(-1).mean(-1)
