"""A keyframe model as a policy: every chunk is the way to the next keyframe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.core.checkpoint import load_checkpoint, reading_config, save_checkpoint
from vla.core.config import decode, encode
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix
from vla.model.heatmap.config import Body, HeatmapConfig
from vla.model.heatmap.model import Cloud, HeatmapModel
from vla.model.heatmap.motion import plan
from vla.model.stored import tokenizer_files
from vla.processing.batch import trimmed_text
from vla.processing.processor import Processor, ProcessorConfig, Stats

KEY = "heatmap"
"""Entry of a checkpoint's config.json that tells such a policy from others."""


class Columns:
    """Where a robot's state and actions hold what a keyframe policy needs."""

    def __init__(self, body: Body, proprio_names: Sequence[str], action_names: Sequence[str]) -> None:
        """ValueError naming what is missing, or what the policy cannot give."""

        def places(names: Sequence[str], known: Sequence[str], what: str) -> list[int]:
            missing = [name for name in names if name not in known]
            if missing:
                raise ValueError(
                    f"heat-maps need {what} called {', '.join(names)}; these demonstrations have {', '.join(known)}"
                )
            return [list(known).index(name) for name in names]

        self.hand = places(body.hand, proprio_names, "state components")
        self.lead = places(body.lead, proprio_names, "state components") if body.lead else None
        self.gripper = places([body.gripper], proprio_names, "a state component")[0]
        taken = {*self.hand, *(self.lead or ())}
        self.state = [column for column in range(len(proprio_names)) if column not in taken]
        self.move = places(body.move, action_names, "action components")
        self.grip = places([body.grip], action_names, "an action component")[0]
        if foreign := set(action_names) - {*body.move, body.grip}:
            raise ValueError(
                f"heat-maps give a position and the gripper, not {', '.join(sorted(foreign))}: these demonstrations "
                "turn the hand, or have another arm; train a chunk policy (--head l1)"
            )

    def commanded(self, proprio: NDArray[np.floating]) -> NDArray[np.floating]:
        """(..., 3) commanded positions of states (..., P): the hand's own where the state tells no lead."""
        hand = proprio[..., self.hand]
        return hand if self.lead is None else hand + proprio[..., self.lead]


class HeatmapPolicy:
    """A `vla.core.types.Policy` that looks, decides where to go next, and goes. Stateless: each look decides alone."""

    def __init__(self, model: HeatmapModel, processor: Processor) -> None:
        self.model, self.processor = model.eval(), processor
        names = processor.config.proprio_names or ()
        self.columns = Columns(model.config.body, names, processor.config.action_names)
        processor.text_limit = max(processor.text_limit, getattr(model.backbone, "text_limit", 0))

    @property
    def spec(self) -> PolicySpec:
        """It reads depth, and its chunks are executed whole."""
        size = self.model.config.chunk_size
        return self.processor.policy_spec(size, size)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The way (B, chunk_size, A) to the next keyframe, environment units. Environments that are not live stand
        still. ValueError where no camera sees anything of the workspace: heat-maps of nothing have a peak, too.
        FloatingPointError if a position is not finite."""
        live = np.ones(obs.batch_size, bool) if obs.live is None else obs.live
        columns, motion = self.columns, self.model.config.motion
        proprio = np.asarray(obs.proprio, np.float64)
        opened = proprio[:, columns.gripper] > self.model.config.body.open_above
        chunk = np.zeros((obs.batch_size, self.model.config.chunk_size, len(self.processor.config.action_names)))
        chunk[..., columns.grip] = np.where(opened, 1.0, -1.0)[:, None]
        if live.any():
            rows = np.flatnonzero(live)
            seen = self.processor.arrays(obs if live.all() else obs.select(rows))
            with torch.inference_mode():
                inputs = self.inputs(seen, proprio[rows])
                self._require_sight(inputs[0])
                key = self.model.decide(*inputs)
            goal = key.position_B3.cpu().numpy()
            if not np.isfinite(goal).all():
                raise FloatingPointError("the model's position is not finite: its weights or inputs are damaged")
            for at, row in enumerate(rows):
                way = plan(
                    proprio[row, columns.hand], columns.commanded(proprio[row]), goal[at], open_now=bool(opened[row]),
                    open_then=bool(key.open_B[at]), lift=bool(key.lift_B[at]), motion=motion,
                    chunk_size=chunk.shape[1],
                )  # fmt: skip
                chunk[row][:, columns.move], chunk[row][:, columns.grip] = way[:, :3], way[:, 3]
        low, high = (np.array(bound) for bound in (self.processor.action_spec.low, self.processor.action_spec.high))
        # Only the gripper may have other ends than +1 and -1: displacements are scaled by what was measured.
        chunk[..., columns.grip] = np.where(chunk[..., columns.grip] > 0, high[columns.grip], low[columns.grip])
        return np.clip(chunk, low, high).astype(np.float32)

    def _require_sight(self, cloud: Cloud) -> None:
        centre, half = self.model.whole(cloud.batch_size)
        offset_3BN = cloud.points_BN3.movedim(-1, 0) - centre.T[..., None]
        if not ((offset_3BN.abs().amax(0) < half[:, None]) & cloud.seen_BN).any(1).all():
            workspace = self.model.config.workspace
            raise ValueError(
                f"no camera measures a point of the workspace, {workspace.half_m:g} m to each side of "
                f"({', '.join(f'{x:g}' for x in workspace.centre_m)}): the policy does not move; is depth in metres, "
                "and are the extrinsics in the robot's frame?"
            )

    def inputs(self, seen: Any, proprio: NDArray[np.floating]) -> tuple[Cloud, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `HeatmapModel.decide`, from the processor's arrays and the raw state."""
        device = self.model.device

        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        cloud = Cloud.of(*map(put, (seen.images_BVHWC, seen.depth_BVHW, seen.intrinsics_BV33, seen.extrinsics_BV44)))
        ids, mask = trimmed_text(put(seen.token_ids_BT), put(seen.token_mask_BT))
        hand = put(proprio[:, self.columns.hand].astype(np.float32))
        return cloud, ids, mask, hand, put(np.asarray(seen.proprio_BP)[:, self.columns.state])

    def save(self, folder: str | os.PathLike[str], *, trainer_state: Mapping[str, Any] | None = None) -> None:
        """A self-contained checkpoint, as `vla.model.model.VLA.save`."""
        model = self.model
        save_checkpoint(
            folder,
            config={
                KEY: encode(model.config),
                "model": {"backbone": encode(model.config.backbone)},
                "processor": encode(self.processor.config),
                "backbone": model.backbone.to_spec(),
            },
            tensors=model.state_dict(),
            stats=self.processor.stats.to_dict(),
            trainer_state=trainer_state,
            files=tokenizer_files(model.backbone.tokenizer),
        )

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> HeatmapPolicy:
        """Read what `save` wrote. ValueError naming what is missing or damaged."""
        from vla.backbones.hub import load as load_backbone

        checkpoint = load_checkpoint(folder, trainer=False, extra="tokenizer/")
        if KEY not in checkpoint.config:
            raise ValueError(f"{os.fspath(folder)} is no policy with heat-maps")
        files = {name.removeprefix("tokenizer/"): data for name, data in checkpoint.files.items()}
        backbone = load_backbone({**checkpoint.config["backbone"], "tokenizer": files})
        with reading_config(folder):
            config = decode(HeatmapConfig, checkpoint.config[KEY])
            processor_config = decode(ProcessorConfig, checkpoint.config["processor"])
            processor = Processor(processor_config, Stats.from_dict(checkpoint.stats), backbone.tokenizer)
        columns = Columns(config.body, processor_config.proprio_names or (), processor_config.action_names)
        model = HeatmapModel(config, backbone, state_dim=len(columns.state))
        model.load_state_dict(checkpoint.tensors)
        return HeatmapPolicy(model, processor)
