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
from vla.model.heatmap.config import HeatmapConfig
from vla.model.heatmap.execution import Columns, Execution, Keyframes, require_sight
from vla.model.heatmap.model import Cloud, HeatmapModel
from vla.model.stored import tokenizer_files
from vla.processing.batch import trimmed_text
from vla.processing.cameras.camera_map import CameraMap
from vla.processing.processor import Processor, ProcessorConfig, Stats

KEY = "heatmap"
"""Entry of a checkpoint's config.json that tells such a policy from others."""


class HeatmapPolicy:
    """A `vla.core.types.Policy` that looks, decides where to go next, and goes. Stateless: each look decides alone."""

    def __init__(self, model: HeatmapModel, processor: Processor) -> None:
        self.model, self.processor = model.eval(), processor
        self.execution = Execution(model.config, processor)
        processor.text_limit = max(processor.text_limit, getattr(model.backbone, "text_limit", 0))

    @property
    def columns(self) -> Columns:
        """Where the robot's state and actions hold what is needed."""
        return self.execution.columns

    @property
    def spec(self) -> PolicySpec:
        """It reads depth, and its chunks are executed whole."""
        size = self.model.config.chunk_size
        return self.processor.policy_spec(size, size)

    def look_through(self, cameras: CameraMap) -> None:
        """See `vla.processing.preprocess.Preprocessor.look_through`."""
        self.processor.look_through(cameras)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The way (B, chunk_size, A) to the next keyframe, environment units. Environments that are not live stand
        still. ValueError where no camera sees anything of the workspace. FloatingPointError if a position is not
        finite."""
        return self.execution.chunk(obs, self._decide)

    @torch.inference_mode()
    def _decide(self, seen: Any, proprio: NDArray[np.float64]) -> Keyframes:
        inputs = self.inputs(seen, proprio)
        cloud, workspace = inputs[0], self.model.config.workspace
        centre, half = self.model.whole(cloud.batch_size)
        offset_3BN = cloud.points_BN3.movedim(-1, 0) - centre.T[..., None]
        near_BN = (offset_3BN.abs().amax(0) < half[:, None]) & cloud.seen_BN
        require_sight(near_BN.any(1).cpu().numpy(), workspace)
        position, verdicts = (part.cpu().numpy() for part in self.model.decide(*inputs))
        return Keyframes.of(position, verdicts, self.model.config)

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
