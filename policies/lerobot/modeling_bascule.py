"""`vla.model.model.VLA` as a LeRobot policy. Actions leave it in environment units, equal to `VLAPolicy.act`'s.

A saved policy is one folder that loads without a network: LeRobot's config.json (with `parts`: everything but weights
and tokenizer) and model.safetensors, and the tokenizer beside them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from policies.lerobot.config_tabletop import INTERFACE
from policies.lerobot.configuration_bascule import BasculeConfig
from vla.backbones.hub import load as load_backbone
from vla.core.compatibility import Fit, fit, require_same, side_of
from vla.core.config import decode, encode
from vla.core.types import ActionSpec, Observation, PolicySpec, Prefix
from vla.data.dataset_meta import component_names
from vla.model.config import BridgeConfig, VLAConfig, retirement
from vla.model.model import VLA, evaluating
from vla.model.policy import acting_dtype, continue_chunk
from vla.processing.pictures import to_uint8_picture
from vla.processing.processor import Processor, ProcessorConfig, Stats, VectorStats
from vla.processing.stats import widened
from vla.processing.text import room_for_text, warn_of_lookalikes

TOKENIZER = "tokenizer"
_COLUMNS = ("q01", "q99", "min", "max", "mean", "std")


class BasculePolicy(PreTrainedPolicy):
    """LeRobot's view of a VLA: batches of its dictionaries in, losses and actions out."""

    config_class = BasculeConfig
    name = "bascule"

    def __init__(
        self,
        config: BasculeConfig,
        *,
        vla: VLA | None = None,
        tokenizer: str | Path | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> None:
        """Around `vla`; or what `config.parts` describes, with the tokenizer in that folder; or a fresh policy for the
        dataset whose statistics and metadata are given. ValueError when there is none of these."""
        super().__init__(config)
        config.validate_features()
        if vla is None and config.parts is not None:
            if tokenizer is None:
                raise ValueError("a saved bascule policy is loaded with BasculePolicy.from_pretrained(FOLDER)")
            vla = assemble(config.parts, tokenizer)
        elif vla is None:
            if dataset_stats is None:
                raise ValueError(
                    "a fresh bascule policy needs a dataset: its statistics and action names are part of it"
                )
            vla = _fresh(config, dataset_stats, dataset_meta)
        if dataset_meta is not None:
            _require_same(vla, dataset_meta)
            _fit_text(vla, dataset_meta)
        if vla.config.memory is not None:
            raise ValueError("a policy that remembers is not for LeRobot's tools yet: use `vla eval`, serve or control")
        if vla.config.xyz is not None:
            raise ValueError("LeRobot's tools give no calibrated depth, which this policy reads: use `vla eval`, serve")
        self.vla = vla
        self._fits: dict[PolicySpec, Fit] = {}
        config.parts = describe(vla)
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> BasculePolicy:
        """Load a policy saved with `save_pretrained` from a folder or a repository on the Hub. ValueError for a folder
        without a tokenizer."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            hub = {name: kwargs.get(name) for name in ("revision", "cache_dir", "token")}
            folder = Path(snapshot_download(str(pretrained_name_or_path), **hub))
        if not (folder / TOKENIZER).is_dir():
            raise ValueError(f"{folder} holds no bascule policy saved by LeRobot: it has no folder '{TOKENIZER}'")
        return super().from_pretrained(folder, tokenizer=folder / TOKENIZER, **kwargs)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict)
        self.vla.backbone.tokenizer.save_pretrained(save_directory / TOKENIZER)

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """The parameters that training updates."""
        return self.vla.trainable()

    def reset(self) -> None:
        """Clear the queue of actions at the start of an episode."""
        self._queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The head's loss on the batch's actions (B, C, A), environment units; `reduction` "none" gives one each."""
        seen = self.observation(batch)
        inp = self.vla.processor.prepare(seen).to(self.vla.device)
        target = self.vla.processor.normalise_action(batch[ACTION], seen.proprio)
        padded = batch.get(f"{ACTION}_is_pad")
        mask = torch.ones(target.shape[:2], device=target.device) if padded is None else (~padded).float()
        features = self.vla.encode(inp)
        if reduction == "mean":
            loss, logs = self.vla.loss(features, inp.proprio_BP, target, mask)
            return loss, {name: value.item() for name, value in logs.items()}
        latent = self.vla.latent(features, inp.proprio_BP)
        rows = [slice(i, i + 1) for i in range(len(target))]
        return torch.stack([self.vla.head.loss(latent[i], target[i], mask[i]) for i in rows]), {}

    def supports_rtc(self) -> bool:
        """True: `predict_action_chunk` accepts the leftover of the previous chunk."""
        return True

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, C, A), environment units, within the action's bounds.

        A batch of `--env.type=bascule` tells its environment's names: the components then lie in that order, and
        ValueError is raised for an environment that this policy cannot act in.

        LeRobot's real-time chunking: `prev_chunk_left_over` (T, A) holds the actions not yet executed at the request,
        of which the robot will have executed `inference_delay` actions when this chunk arrives (`vla.model.policy`).
        """
        seen = self.observation(batch)
        inp = self.vla.processor.prepare(seen).to(self.vla.device).without_padding()
        order = self._fit(batch).action_order
        if prev_chunk_left_over is None:
            with evaluating(self.vla):
                features = self.vla.encode_as_is(inp, acting_dtype(self.vla))  # as `VLAPolicy` does
                action = self.vla.to_actions(self.vla.act(features, inp.proprio_BP), seen.proprio)
        else:
            left_over = prev_chunk_left_over
            left_over = left_over if order is None else left_over[..., np.argsort(order).tolist()]
            prefix = _prefix(left_over, inference_delay or 0, len(inp.proprio_BP))
            action = continue_chunk(self.vla, inp, prefix, seen.proprio)
        action = action if order is None else action[..., list(order)]
        return torch.from_numpy(np.ascontiguousarray(action)).to(self.vla.device)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """`lerobot-train --peft.method_type=LORA` adapts what imitation trains: bridge and head."""
        learns = ("vla.bridge.", "vla.head.")
        linear = [name for name, module in self.named_modules() if isinstance(module, torch.nn.Linear)]
        return {"target_modules": [name for name in linear if name.startswith(learns)], "modules_to_save": []}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action (B, A); a new chunk is computed after every `n_action_steps`."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)[:, : self.config.n_action_steps]
            self._queue.extend(chunk.unbind(1))
        return self._queue.popleft()

    def _fit(self, batch: Mapping[str, Any]) -> Fit:
        """How this policy can be executed in the environment that `batch` is from; as it is where that is not told."""
        side = (batch.get("info") or {}).get(INTERFACE)
        if side is None:
            return Fit()
        if side not in self._fits:
            found = fit(side_of(self.vla), side)
            for notice in found.notices:
                logging.getLogger(__name__).warning(notice)
            self._fits[side] = found
        return self._fits[side]

    def observation(self, batch: Mapping[str, Any]) -> Observation:
        """LeRobot's batch as ours: images (B, 3, H, W) float in 0..1 become (B, H, W, 3) uint8, exactly.

        ValueError naming the key that is missing, or whose pictures are neither uint8 nor floats in 0..1.
        """
        cameras = {camera: f"{OBS_IMAGES}.{camera}" for camera in self.vla.processor.config.cameras if camera}
        for key in (*cameras.values(), OBS_STATE, "task"):
            if batch.get(key) is None:
                raise ValueError(f"this policy reads '{key}', the batch has {', '.join(sorted(batch)) or 'nothing'}")
        state, task = batch[OBS_STATE], batch["task"]
        if (order := self._fit(batch).proprio_order) is not None:
            state = state[:, list(order)]
        return Observation(
            images={camera: _pixels(batch[key], key) for camera, key in cameras.items()},
            proprio=state.detach().float().cpu().numpy(),
            instruction=[task] * len(state) if isinstance(task, str) else list(task),
        )


def describe(vla: VLA) -> dict[str, Any]:
    """The configuration, processor, statistics and backbone of a policy as JSON values: no weights, no tokenizer."""
    return {
        "model": encode(vla.config),
        "processor": encode(vla.processor.config),
        "stats": vla.processor.stats.to_dict(),
        "backbone": encode(vla.backbone.to_spec()),
    }


def assemble(parts: Mapping[str, Any], tokenizer: str | Path) -> VLA:
    """Build the policy that `describe` describes; its weights are uninitialised until they are loaded."""
    backbone = load_backbone({**parts["backbone"], "tokenizer": str(tokenizer)})
    config = decode(VLAConfig, parts["model"])
    processor_config = decode(ProcessorConfig, parts["processor"])
    return VLA(config, backbone, Processor(processor_config, Stats.from_dict(parts["stats"]), backbone.tokenizer))


def _fresh(config: BasculeConfig, stats: Mapping[str, Mapping[str, Any]], meta: Any) -> VLA:
    action = _vector_stats(stats[ACTION])
    names = _action_names(config, meta, action.dim)
    frames = int(np.asarray(stats[ACTION].get("count", [0])).reshape(-1)[0])
    if note := retirement(config.backbone):
        logging.getLogger(__name__).warning(note)
    model = VLAConfig(
        backbone=config.backbone,
        bridge=BridgeConfig(width=config.bridge_width, gate_init=config.gate_init),
        head=config.head,
        chunk_size=config.chunk_size,
        freeze_backbone=config.freeze_backbone,
        backbone_dtype=config.backbone_dtype,
    )
    return VLA.build(
        model,
        stats=Stats(_vector_stats(stats[OBS_STATE]), action, frames),
        # A dataset knows no bounds but the extremes of what was done, as in `vla train`.
        action_spec=ActionSpec(tuple(names), action.min, action.max, float(getattr(meta, "fps", 0))),
        cameras=[key.removeprefix(f"{OBS_IMAGES}.") for key in config.image_features],
        image_size=config.image_size,
        picture_size=max(min(feature.shape[1:]) for feature in config.image_features.values()),
        aspects=[feature.shape[2] / feature.shape[1] for feature in config.image_features.values()],  # (C, H, W)
        max_text_tokens=config.max_text_tokens,
        proprio_names=_state_names(meta),
        seed=config.seed,
    )


def _action_names(config: BasculeConfig, meta: Any, dim: int) -> list[str]:
    """The dataset's names of the action. LeRobot's configuration keeps only the outer level of nested ones."""
    features = getattr(meta, "features", None) or {}
    if (features.get(ACTION) or {}).get("names"):
        return list(component_names(features, ACTION))
    names = list(config.action_feature_names or ())
    return names if len(names) == dim else [f"a{i}" for i in range(dim)]


def _require_same(vla: VLA, meta: Any) -> None:
    """ValueError for a dataset whose state or actions have another order, other names or another rate than the policy:
    LeRobot hands them over by their places."""
    features = getattr(meta, "features", None) or {}
    if not {ACTION, OBS_STATE} <= features.keys():
        return
    actions, state = (tuple(component_names(features, key)) for key in (ACTION, OBS_STATE))
    unbounded = ((bound,) * len(actions) for bound in (-math.inf, math.inf))
    told = PolicySpec(
        ActionSpec(actions, *unbounded, float(getattr(meta, "fps", 0))), proprio_dim=len(state), proprio_names=state
    )
    remedy = "`vla train --init` takes it by name"
    require_same(vla, told, where="dataset", ranges=False, remedy=remedy)


def _state_names(meta: Any) -> list[str] | None:
    """The dataset's names of the state; None where it has none."""
    features = getattr(meta, "features", None) or {}
    if not (features.get(OBS_STATE) or {}).get("names"):
        return None
    return list(component_names(features, OBS_STATE))


def _fit_text(vla: VLA, meta: Any) -> None:
    """Make room for the dataset's longest task, as `vla train` does, and warn of tasks that read alike."""
    table = getattr(meta, "tasks", None)
    tasks = [] if table is None else [str(task) for task in table.index]
    config = vla.processor.config
    tokenizer = vla.backbone.tokenizer
    least, most = config.max_text_tokens, vla.processor.text_limit
    room = room_for_text(tasks, tokenizer, rule=config.text_rule, least=least, most=most)
    if room > config.max_text_tokens:
        vla.processor = Processor(replace(config, max_text_tokens=room), vla.processor.stats, tokenizer)
    warn_of_lookalikes(tasks, vla.processor.tokens)


def _vector_stats(stats: Mapping[str, Any]) -> VectorStats:
    """LeRobot's statistics of a feature as ours. ValueError where the dataset has no quantiles."""
    if missing := [name for name in _COLUMNS if name not in stats]:
        raise ValueError(
            f"the dataset's statistics lack {', '.join(missing)}: "
            "run `python -m lerobot.scripts.augment_dataset_quantile_stats` on it"
        )
    column = {name: np.asarray(stats[name], dtype=np.float64).reshape(-1) for name in _COLUMNS}
    # As in VectorStats.from_array, a switch keeps its values: within [-1, 1], a mean square of 1 means only -1 and 1.
    within = (column["min"] >= -1) & (column["max"] <= 1)
    switch = within & np.isclose(column["mean"] ** 2 + column["std"] ** 2, 1.0, atol=1e-5)
    column["q01"] = np.where(switch, -1.0, column["q01"])
    column["q99"] = np.where(switch, 1.0, column["q99"])
    column["q01"], column["q99"] = widened(column["q01"], column["q99"], column["min"], column["max"])
    return VectorStats(**{name: tuple(values.tolist()) for name, values in column.items()})


def _pixels(image_B3HW: Tensor, key: str) -> np.ndarray:
    """(B, H, W, 3) uint8, exactly. ValueError naming the key for pictures of another range than 0..1 or uint8."""
    image = image_B3HW.detach()
    image = image.float() if image.is_floating_point() else image
    return np.ascontiguousarray(to_uint8_picture(image.permute(0, 2, 3, 1).cpu().numpy(), name=key))


def _prefix(left_over: Tensor, delay: int, batch: int) -> Prefix:
    """The actions still to be executed as a `Prefix`, from (T, A) or (B, T, A) in environment units."""
    old = left_over.detach().float().cpu().numpy()
    old = np.broadcast_to(old, (batch, *old.shape[-2:]))
    # LeRobot fills a short leftover up with zeros: they are no actions, and would pull the robot toward them.
    steps = np.arange(1, old.shape[1] + 1)
    left = (np.any(old != 0, axis=-1) * steps).max(axis=1, initial=0)
    return Prefix(old, left, np.full(batch, delay))


def wrap(vla: VLA, *, device: str = "cpu") -> BasculePolicy:
    """A LeRobot policy around `vla` itself (not a copy): the features LeRobot wants to know follow from its parts."""
    from lerobot.configs import FeatureType, PolicyFeature

    spec, processor = vla.action_spec, vla.processor.config
    picture = PolicyFeature(FeatureType.VISUAL, (3, processor.image_size, processor.image_size))
    cameras = {f"{OBS_IMAGES}.{camera}": picture for camera in processor.cameras if camera}
    config = BasculeConfig(
        device=device,
        push_to_hub=False,
        chunk_size=vla.chunk_size,
        n_action_steps=vla.config.n_action_steps or vla.chunk_size,
        input_features={**cameras, OBS_STATE: PolicyFeature(FeatureType.STATE, (processor.proprio_dim,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (spec.dim,))},
        action_feature_names=list(spec.names),
    )
    return BasculePolicy(config, vla=vla).eval()
