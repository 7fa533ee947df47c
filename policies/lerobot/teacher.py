"""Any policy that LeRobot trained as a teacher (`vla.training.distillation`): ACT, for one.

Its pictures, states and actions pass through its own processors, so that it sees what LeRobot showed it. The latent is
what the linear layer reads whose output is the policy's chunk (ACT's decoder before `action_head`). A policy without
such a layer, as one that denoises its actions in several steps, teaches its actions themselves: they are the latent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from torch import Tensor, nn

from vla.core.config import load_json, unknown
from vla.data.lerobot_dataset import DemoSet
from vla.training.distillation.teacher import Decoder

_STATE, _IMAGES, _ACTION = "observation.state", "observation.images.", "action"


class LeRobotTeacher:
    """A policy folder of LeRobot's, asked about frames. A `vla.training.distillation.teacher.Teacher`."""

    def __init__(self, folder: str | Path) -> None:
        """ValueError for a folder that LeRobot cannot load, and for a policy that cannot teach a chunk."""
        self.config = _configuration(Path(folder))
        try:
            self._policy = get_policy_class(self.config.type).from_pretrained(Path(folder), config=self.config)
            self._before, self._after = make_pre_post_processors(
                self.config,
                pretrained_path=str(folder),
                preprocessor_overrides={"device_processor": {"device": "cpu"}},
                postprocessor_overrides={"device_processor": {"device": "cpu"}},
            )
        except (ImportError, OSError, RuntimeError, KeyError, TypeError) as problem:
            raise ValueError(f"LeRobot cannot load the policy in {folder}: {problem}") from None
        self._policy.eval().requires_grad_(False)
        self._actions = _width(self.config)
        names = getattr(self.config, "action_feature_names", None)
        self.action_names: tuple[str, ...] | None = tuple(names) if names else None
        chunk, latent, layer = self._probe()
        self.chunk_size, self._layer = chunk.shape[1], layer
        if layer is None:
            tensors = {"weight": torch.eye(self._actions), "bias": torch.zeros(self._actions)}
        else:
            bias = torch.zeros(self._actions) if layer.bias is None else layer.bias
            tensors = {"weight": layer.weight.detach().clone(), "bias": bias.detach().clone()}
        centre, half = self._scale()
        self.decoder = Decoder("step", latent.shape[-1], tensors, centre, half)

    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """The teacher's latents (B, C, width) of these frames. ValueError for demonstrations without what it reads."""
        seen = demos.observation(frames)
        batch: dict[str, Any] = {"task": list(seen.instruction)}
        for key, feature in self.config.input_features.items():
            shape = tuple(feature.shape)
            if feature.type is FeatureType.VISUAL:
                camera = key.removeprefix(_IMAGES)
                if camera not in seen.images:
                    known = ", ".join(seen.images)
                    raise ValueError(f"the teacher reads camera '{camera}', the demonstrations have {known}")
                pictures = torch.from_numpy(np.ascontiguousarray(seen.images[camera])).permute(0, 3, 1, 2)
                if tuple(pictures.shape[1:]) != shape:
                    raise ValueError(
                        f"the teacher reads pictures of {shape[1]}x{shape[2]} from camera '{camera}', these are "
                        f"{pictures.shape[2]}x{pictures.shape[3]}: give the demonstrations as they were recorded"
                    )
                batch[key] = pictures.float() / 255
            elif key == _STATE:
                if seen.proprio.shape[1:] != shape:
                    raise ValueError(
                        f"the teacher reads a state of {shape[0]} components, the demonstrations' has "
                        f"{seen.proprio.shape[1]}: give a --teacher of this robot"
                    )
                batch[key] = torch.from_numpy(np.ascontiguousarray(seen.proprio))
            else:
                raise ValueError(f"the teacher reads '{key}', which demonstrations do not hold: give another --teacher")
        chunk, read = self._ask(batch, self._layer)
        return chunk.float() if self._layer is None else read.float()

    @torch.no_grad()
    def _ask(self, batch: dict[str, Any], layer: nn.Linear | None) -> tuple[Tensor, Tensor]:
        """(the policy's own chunk, before it is scaled back; what `layer` has read)."""
        self._policy.reset()
        read: list[Tensor] = []
        hook = None if layer is None else layer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # one that denoises starts from noise
                chunk = self._policy.predict_action_chunk(self._before(batch))
        finally:
            if hook is not None:
                hook.remove()
        return chunk, read[-1].reshape(*chunk.shape[:2], -1) if read else chunk

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, Tensor, nn.Linear | None]:
        """(a chunk, its latent, the linear layer between them or None), from two frames of noise."""
        generator = torch.Generator().manual_seed(0)
        batch: dict[str, Any] = {"task": ["pick up the cube"] * 2}
        for key, feature in self.config.input_features.items():
            batch[key] = torch.rand(2, *feature.shape, generator=generator)
        found: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

        def note(layer: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
            found[layer] = given[0], out

        layers = [m for m in self._policy.modules() if isinstance(m, nn.Linear) and m.out_features == self._actions]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            self._policy.reset()
            chunk = self._policy.predict_action_chunk(self._before(batch))
        except (NotImplementedError, RuntimeError, KeyError, IndexError, TypeError) as problem:
            raise ValueError(f"a policy of type '{self.config.type}' does not tell its chunk: {problem}") from None
        finally:
            for hook in hooks:
                hook.remove()
        if chunk.ndim != 3 or chunk.shape[2] != self._actions:
            raise ValueError(f"a policy of type '{self.config.type}' tells chunks {tuple(chunk.shape)}, not (B, C, A)")
        for layer, (read, out) in found.items():
            if out.shape == chunk.shape and torch.equal(out, chunk):
                return chunk, read, layer
        return chunk, chunk, None

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre, half) of the actions that its processor makes of the policy's. ValueError if it does more."""
        probes = (torch.full((1, self._actions), value) for value in (0.0, 1.0, -0.5))
        try:
            centre, upper, other = (self._after(probe)[0].double().numpy() for probe in probes)
        except (RuntimeError, KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"the teacher's actions depend on more than its chunk: {problem}") from None
        half = upper - centre
        if not np.allclose(other, centre - 0.5 * half, rtol=1e-4, atol=1e-6) or not (half != 0).all():
            raise ValueError("the teacher's actions are not its chunk, scaled: such a policy cannot teach by --teacher")
        return centre, half


def _configuration(folder: Path) -> PreTrainedConfig:
    kind = load_json(folder / "config.json").get("type")
    if kind not in (known := PreTrainedConfig.get_known_choices()):
        raise ValueError(f"the teacher in {folder} is of an " + unknown(str(kind), known, "policy type"))
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    if config.n_obs_steps != 1:
        raise ValueError(
            f"the teacher (type '{config.type}') reads {config.n_obs_steps} frames at once, a student sees one: give a "
            "policy with n_obs_steps 1, such as act"
        )
    return config


def _width(config: PreTrainedConfig) -> int:
    """Components of its actions."""
    return int(config.output_features[_ACTION].shape[0])
