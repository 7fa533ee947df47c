"""Any policy that LeRobot trained as a teacher (`vla.training.distillation`): ACT, for one.

Its pictures, states and actions pass through its own processors, so that it sees what LeRobot showed it. The latent is
what the linear layer reads whose output is the policy's chunk (ACT's decoder before `action_head`). A policy without
such a layer, as one that denoises its actions in several steps, teaches its actions themselves: they are the latent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn

from policies.lerobot_policy import LeRobotPolicy, Step, cameras_of, policy_config
from vla.core.compatibility import Fit, fit, side_of, unnamed
from vla.core.types import PolicySpec
from vla.data.lerobot_dataset import DemoSet
from vla.runtime.console import say
from vla.training.distillation.teacher import Decoder


class LeRobotTeacher:
    """A policy folder of LeRobot's, asked about frames. A `vla.training.distillation.teacher.Teacher`."""

    def __init__(self, folder: str | Path) -> None:
        """ValueError for a folder that LeRobot cannot load, and for a policy that cannot teach a chunk."""
        self.config = _configuration(folder)
        self._player = LeRobotPolicy.of(self.config, folder, "cpu")
        self._policy = self._player.policy.requires_grad_(False)
        self._actions = self._player.spec.action_spec.dim
        own = self._player.spec.action_spec  # named where the dataset that it was trained on is still there
        names = getattr(self.config, "action_feature_names", None) or own.names
        self.action_names: tuple[str, ...] | None = None if unnamed(names) else tuple(names)
        self._asked_about: DemoSet | None = None
        self._fit = Fit()
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
        if demos is not self._asked_about:
            self._fit, self._asked_about = self._fitted(demos), demos
        seen = demos.observation(frames)
        for camera, key in cameras_of(self.config).items():
            if camera not in seen.images:
                known = ", ".join(seen.images)
                raise ValueError(f"the teacher reads camera '{camera}', the demonstrations have {known}")
            (_, height, width), own = self.config.input_features[key].shape, seen.images[camera].shape[1:3]
            if own != (height, width):
                raise ValueError(
                    f"the teacher reads pictures of {height}x{width} from camera '{camera}', these are "
                    f"{own[0]}x{own[1]}: give the demonstrations as they were recorded"
                )
        if self._fit.proprio_order is not None:
            seen = replace(seen, proprio=np.ascontiguousarray(seen.proprio[:, list(self._fit.proprio_order)]))
        chunk, read = self._ask(self._player.read(seen), self._layer)
        return chunk.float() if self._layer is None else read.float()

    def _fitted(self, demos: DemoSet) -> Fit:
        """How the demonstrations' state comes into the teacher's order, by name; a line where that cannot be known.
        ValueError for those of another robot or rate."""
        state, own = self.config.input_features.get(OBS_STATE), self._player.spec
        if state is not None and demos.proprio.shape[1:] != tuple(state.shape):
            raise ValueError(
                f"the teacher reads a state of {state.shape[0]} components, the demonstrations' has "
                f"{demos.proprio.shape[1]}: give a --teacher of this robot"
            )
        if state is not None and own.proprio_names is None:
            say(
                "the teacher does not say what its state is, as the dataset that it was trained on is gone: it is "
                f"taken for {', '.join(demos.proprio_names)}, in this order"
            )
        reads = PolicySpec(proprio_names=own.proprio_names, action_spec=own.action_spec)
        try:
            found = fit(reads, side_of(demos), where="recording", ranges=False)
        except ValueError as problem:
            raise ValueError(f"the teacher does not fit: {problem}") from None
        for notice in found.notices if found.proprio_order is not None else ():
            say(f"the teacher: {notice}")
        return found

    @torch.no_grad()
    def _ask(self, step: Step, layer: nn.Linear | None) -> tuple[Tensor, Tensor]:
        """(the policy's own chunk, before it is scaled back; what `layer` has read)."""
        self._policy.reset()
        read: list[Tensor] = []
        hook = None if layer is None else layer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # one that denoises starts from noise
                chunk = self._policy.predict_action_chunk(step)
        finally:
            if hook is not None:
                hook.remove()
        return chunk, read[-1].reshape(*chunk.shape[:2], -1) if read else chunk

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, Tensor, nn.Linear | None]:
        """(a chunk, its latent, the linear layer between them or None), from two frames of noise."""
        generator = torch.Generator().manual_seed(0)
        batch: dict[str, object] = {"task": ["pick up the cube"] * 2}
        for key, feature in self.config.input_features.items():
            batch[key] = torch.rand(2, *feature.shape, generator=generator)
        found: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

        def note(layer: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
            found[layer] = given[0], out

        layers = [m for m in self._policy.modules() if isinstance(m, nn.Linear) and m.out_features == self._actions]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            self._policy.reset()
            chunk = self._policy.predict_action_chunk(self._player.preprocess(batch))
        except (RuntimeError, TypeError) as problem:  # LeRobot's, of a policy without chunks or with other inputs
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
            centre, upper, other = (self._player.postprocess(probe)[0].double().numpy() for probe in probes)
        except RuntimeError as problem:  # LeRobot's, of a step that adds the state to the actions
            raise ValueError(f"the teacher's actions depend on more than its chunk: {problem}") from None
        half = upper - centre
        if not np.allclose(other, centre - 0.5 * half, rtol=1e-4, atol=1e-6) or not (half != 0).all():
            raise ValueError("the teacher's actions are not its chunk, scaled: such a policy cannot teach by --teacher")
        return centre, half


def _configuration(folder: str | Path) -> PreTrainedConfig:
    """The policy's configuration. ValueError for one that reads more than a frame."""
    config = policy_config(folder)
    if config.n_obs_steps != 1:
        raise ValueError(
            f"the teacher (type '{config.type}') reads {config.n_obs_steps} frames at once, a student sees one: give a "
            "policy with n_obs_steps 1, such as act"
        )
    return config
