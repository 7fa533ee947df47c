"""Raw observation -> the arrays a model reads, and its actions back. Numpy alone: exported policies need no torch.

Actions are normalised here and nowhere else (`vla.processing.processor` is the same on tensors, for training).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.core.types import IMAGE_SIZE, ActionSpec, Observation, PolicySpec
from vla.processing.action_space import ActionSpace
from vla.processing.batch import ModelInput
from vla.processing.cameras.camera_map import CameraMap
from vla.processing.cameras.depth import depth_remarks, depth_views
from vla.processing.pictures import black_picture, is_black, resize
from vla.processing.stats import LEAST_RANGE, Stats
from vla.processing.text import TextRule, read, remarks, tokens_of

_log = logging.getLogger(__name__)

_PROPRIO_LIMIT = 5.0
_FAR = 20.0
"""A state this many times the recorded range away from its middle is told: degrees for radians are 57 times."""
_FEW_PIXELS = 8
"""A picture with fewer than one pixel for so many that the policy reads, along a side, is unlikely to be meant."""
_LONG = 4
"""A picture whose long side is more than this many times its short side is told as well."""
_SQUEEZED = 1.2
"""And one that is so many times wider or higher than those of training: 640 x 480 and 640 x 360 differ 1.33 times."""
_TOKEN_CACHE = 4096  # distinct instructions; a server may be sent any number of them
_KEPT_CHARACTERS = 2000  # longer ones are read anew each time


@dataclass(frozen=True)
class ProcessorConfig:
    """Inputs and outputs of a policy."""

    cameras: tuple[str, ...]
    """In the order in which the model sees their views. "" is a view that this robot lacks: black."""
    proprio_dim: int
    action_names: tuple[str, ...]
    image_size: int = IMAGE_SIZE
    """Pixels, square; other sizes are resized."""
    max_text_tokens: int = 24
    """Token ids are padded to this length. Longer instructions are read too, as far as the backbone reads them
    (`Preprocessor.text_limit`)."""
    text_rule: TextRule = "words"
    """How an instruction is read; policies made before this option read words."""
    action_low: tuple[float, ...] | None = None
    """Bounds of what leaves the policy, environment units; None: the extremes of the training data."""
    action_high: tuple[float, ...] | None = None
    control_hz: float | None = None
    proprio_slots: tuple[int, ...] | None = None
    """Where this robot's state lies in a wider one that the model reads (policies for several robots); None: as is."""
    proprio_width: int | None = None
    action_slots: tuple[int, ...] | None = None
    """Where this robot's action lies in the wider one that the model gives."""
    action_width: int | None = None
    released_scaling: bool = False
    """State and action are scaled as the released VLA-Adapter code does (`VectorStats.released_affine`)."""
    proprio_names: tuple[str, ...] | None = None
    """One name per component of the state; None in checkpoints made before they were kept."""
    picture_size: int | None = None
    """Side of the pictures it was trained on, but no more than `image_size`: a simulator draws pictures of this size
    for it, so that they are as sharp as in training. None in checkpoints made before it was kept."""
    aspects: tuple[float, ...] | None = None
    """Width by height of each camera's pictures in training, 0 where that is not known: other ones come out squeezed
    otherwise. None in checkpoints made before they were kept."""
    action_space: ActionSpace | None = None
    """The space in which the model predicts chunks; None: as they were recorded."""
    depth: bool = False
    """The model reads each camera's depth and calibration besides its picture."""


class Preprocessor:
    """Observation -> ModelInput of numpy arrays, and actions between environment units and the model's [-1, 1]."""

    def __init__(self, config: ProcessorConfig, stats: Stats, tokenizer: Any) -> None:
        """`tokenizer` as Hugging Face's: callable with add_special_tokens, with pad_token_id.

        ValueError when the statistics have other widths than the configuration.
        """
        named = [camera for camera in config.cameras if camera]
        if not named or len(set(named)) != len(named):
            raise ValueError(f"cameras must be distinct names, at least one; got {config.cameras}")
        if stats.proprio.dim != config.proprio_dim:
            raise ValueError(f"proprio_dim is {config.proprio_dim} but the statistics have {stats.proprio.dim} values")
        if config.proprio_names is not None and len(config.proprio_names) != config.proprio_dim:
            raise ValueError(f"proprio_dim is {config.proprio_dim} but there are {len(config.proprio_names)} names")
        dim = len(config.action_names)
        if stats.action.dim != dim:
            raise ValueError(
                f"the action has {dim} components ({', '.join(config.action_names)}) but the statistics have "
                f"{stats.action.dim} values"
            )
        if config.action_space is not None and (config.action_low is None or config.action_high is None):
            raise ValueError("an action space needs action_low and action_high: the statistics are of another one")
        low = stats.action.min if config.action_low is None else config.action_low
        high = stats.action.max if config.action_high is None else config.action_high
        if len(low) != dim or len(high) != dim:
            raise ValueError(f"action_low and action_high need {dim} values each, got {len(low)} and {len(high)}")
        for name, least, most in zip(config.action_names, low, high, strict=True):
            if not least <= most:
                raise ValueError(f"action_low of {name} must be at most its action_high, got {least:g} and {most:g}")
        if config.control_hz is not None and not 0 <= config.control_hz < float("inf"):
            raise ValueError(f"control_hz must be a rate in Hz, or 0 where it is unknown; got {config.control_hz:g}")
        self.config, self.stats, self.tokenizer = config, stats, tokenizer
        _check_slots("proprio", config.proprio_slots, config.proprio_width, config.proprio_dim)
        _check_slots("action", config.action_slots, config.action_width, dim)
        self._low, self._high = np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)
        released = config.released_scaling
        self._proprio = stats.proprio.released_affine() if released else stats.proprio.state_affine()
        self._action = stats.action.released_affine() if released else stats.action.affine()
        low, high = np.array(stats.proprio.min), np.array(stats.proprio.max)
        middle = (low + high) / 2
        self._recorded = middle, np.maximum((high - low) / 2, LEAST_RANGE * np.maximum(np.abs(middle), 1.0))
        self._told: set[int] = set()  # state components that were far away
        self._shown: set[str] = set()  # cameras whose pictures had an unlikely shape
        self._black: set[str] = set()  # cameras that showed nothing
        self._blind: set[str] = set()  # cameras whose depth told nothing, or was read by wrong intrinsics
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._remarks: dict[str, tuple[str, ...]] = {}
        self.text_limit = config.max_text_tokens
        """Tokens of an instruction that are read; what follows is cut, with a warning. A policy sets it to what its
        backbone reads."""

    @property
    def proprio_width(self) -> int:
        """Components of the state as the model reads it."""
        return self.config.proprio_width or self.config.proprio_dim

    @property
    def action_width(self) -> int:
        """Components of the action as the model gives it."""
        return self.config.action_width or len(self.config.action_names)

    @property
    def action_mask(self) -> NDArray[np.float32]:
        """(action_width,) 1 for the model's components that this robot has, 0 for the others."""
        slots = self.config.action_slots
        return _spread(np.ones(len(self.config.action_names), np.float32), slots, self.action_width)

    @property
    def action_affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(centre, half width) of this robot's action components: normalised = (action - centre) / half."""
        return self._action

    @property
    def action_spec(self) -> ActionSpec:
        """Names, bounds and rate of this policy's actions. control_hz is 0 when unknown."""
        return ActionSpec(
            names=self.config.action_names,
            low=tuple(self._low.tolist()),
            high=tuple(self._high.tolist()),
            control_hz=self.config.control_hz or 0.0,
        )

    def policy_spec(self, chunk_size: int, n_action_steps: int, *, takes_prefix: bool = False) -> PolicySpec:
        """The spec of a policy that reads and writes through this processor."""
        config = self.config
        cameras = tuple(camera for camera in config.cameras if camera)
        return PolicySpec(
            self.action_spec, chunk_size, n_action_steps, cameras, config.proprio_dim, config.proprio_names or None,
            takes_prefix, picture_size=config.picture_size, depth=config.depth or None,
        )  # fmt: skip

    def look_through(self, cameras: CameraMap) -> None:
        """Read these cameras from now on, and warn of those that are lacking. ValueError where they do not fit the
        policy's (`CameraMap.laid`)."""
        laid = cameras.laid(self.config.cameras)
        for camera in (ours for ours, name in zip(self.config.cameras, laid, strict=True) if ours and not name):
            _log.warning("the policy sees '%s' black: expect it to fail if its training always had it", camera)
        self.config = replace(self.config, cameras=laid)

    def arrays(self, obs: Observation) -> ModelInput[NDArray]:
        """ValueError saying what the observation lacks or has wrong, and what was given."""
        return ModelInput(
            self.images(obs),
            *self.token_arrays(obs.instruction),
            self.scale_proprio(obs.proprio, batch_size=obs.batch_size),
            *self.depth_arrays(obs),
        )

    def depth_arrays(self, obs: Observation) -> tuple[NDArray[np.float32], ...]:
        """Depth (B, V, size, size) and the matrices of every camera for a model that reads depth; nothing for another.
        ValueError as `arrays`."""
        if not self.config.depth:
            return ()
        views = depth_views(self.config.cameras, self.config.image_size, obs)
        for camera, line in depth_remarks(obs).items():
            if camera in self.config.cameras and camera not in self._blind:
                self._blind.add(camera)
                _log.warning("%s", line)
        return views

    def token_arrays(self, instructions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids (B, T) and mask (B, T), T being `max_text_tokens`, or the longest instruction's length if that is more.
        A string seen before is not tokenised again."""
        rows = [self.tokens(instruction) for instruction in instructions]
        length = max([self.config.max_text_tokens, *map(len, rows)])
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = np.full((len(instructions), length), pad, dtype=np.int64)
        mask = np.zeros((len(instructions), length), dtype=np.bool_)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def tokens(self, instruction: str) -> tuple[int, ...]:
        """An instruction's token ids, at most `text_limit`. ValueError as `vla.processing.text.tokens_of` says."""
        tokens = self._tokens.get(instruction) if isinstance(instruction, str) else None
        if tokens is None:
            config = self.config
            tokens = tokens_of(instruction, self.tokenizer, rule=config.text_rule, limit=self.text_limit)
            if len(self._tokens) >= _TOKEN_CACHE:
                self._tokens.clear()
            if len(instruction) <= _KEPT_CHARACTERS:
                self._tokens[instruction] = tokens
        return tokens

    def remarks(self, instruction: str) -> tuple[str, ...]:
        """Lines that a person should be told about an instruction: it is cut, or has words without a meaning."""
        found = self._remarks.get(instruction)
        if found is None:
            reading = read(instruction, self.tokenizer, rule=self.config.text_rule, limit=self.text_limit)
            found = remarks(instruction, reading)
            if len(self._remarks) >= _TOKEN_CACHE:
                self._remarks.clear()
            if len(instruction) <= _KEPT_CHARACTERS:
                self._remarks[instruction] = found
        return found

    def scale_proprio(self, proprio_BP: NDArray[np.floating], *, batch_size: int | None = None) -> NDArray[np.float32]:
        """Robot state (B, P) in raw units -> [-1, 1] between the quantiles, limited to +-5.

        Limited because a joint that stood still in training has a tiny range: any motion would drown everything else.
        """
        proprio = np.asarray(proprio_BP)
        width = self.config.proprio_dim
        if proprio.ndim != 2 or proprio.shape[1] != width or batch_size not in (None, proprio.shape[0]):
            expected = f"({'B' if batch_size is None else batch_size}, {width})"
            raise ValueError(f"this policy reads proprio of shape {expected}, the observation has {proprio.shape}")
        _require_finite(proprio, "proprio")
        self._tell_far(proprio)
        centre, half = self._proprio
        scaled = np.clip((proprio.astype(np.float64) - centre) / half, -_PROPRIO_LIMIT, _PROPRIO_LIMIT)
        return _spread(scaled.astype(np.float32), self.config.proprio_slots, self.proprio_width)

    def far_states(self, proprio_BP: NDArray[np.floating]) -> dict[int, str]:
        """A line for each state component so far from the recorded ones that another unit or order is likely."""
        middle, half = self._recorded
        far = np.abs(proprio_BP - middle) > _FAR * half
        found = {}
        for index in np.flatnonzero(far.any(0)).tolist():
            value = proprio_BP[np.flatnonzero(far[:, index])[0], index]
            low, high = self.stats.proprio.min[index], self.stats.proprio.max[index]
            name = names[index] if (names := self.config.proprio_names) else index
            found[index] = (
                f"state component {name} is {value:.4g}, in training it was {low:.4g} to {high:.4g}: another unit "
                "(degrees, radians) or order? The policy reads it as the end of its range"
            )
        return found

    def _tell_far(self, proprio_BP: NDArray[np.floating]) -> None:
        """Log, once for each component, what `far_states` finds."""
        for index, line in self.far_states(proprio_BP).items():
            if index not in self._told:
                self._told.add(index)
                _log.warning("%s", line)

    def normalise_action(
        self, action: NDArray[np.floating], proprio_BP: NDArray[np.floating] | None = None
    ) -> NDArray[np.float32]:
        """(..., A) environment units -> [-1, 1] between the quantiles of the training data. Not clipped.

        (..., action_width) where the model's action is wider than this robot's: 0 in the components it lacks. With an
        action space, chunks (B, C, A), and `proprio_BP` are the raw states in which they begin; else it is not read.
        """
        self._check_action(action, len(self.config.action_names))
        if (space := self.config.action_space) is not None:
            action = space.to_predicted(np.asarray(action, np.float64), self._started(proprio_BP))
        centre, half = self._action
        normal = ((np.asarray(action, dtype=np.float64) - centre) / half).astype(np.float32)
        return _spread(normal, self.config.action_slots, self.action_width)

    def unnormalise_action(
        self, action: NDArray[np.floating], proprio_BP: NDArray[np.floating] | None = None
    ) -> NDArray[np.float32]:
        """(..., action_width) normalised -> (..., A) environment units, clipped to the action's bounds. `proprio_BP` as
        in `normalise_action`."""
        self._check_action(action, self.action_width)
        centre, half = self._action
        if self.config.action_slots is not None:
            action = action[..., list(self.config.action_slots)]
        raw = np.asarray(action, dtype=np.float64) * half + centre
        if (space := self.config.action_space) is not None:
            raw = space.to_recorded(raw, self._started(proprio_BP))
        return np.clip(raw.astype(np.float32), self._low, self._high)

    def _started(self, proprio_BP: NDArray[np.floating] | None) -> NDArray[np.float64]:
        """The raw states from which chunks begin. ValueError where they are not told and must be."""
        if proprio_BP is None:
            raise ValueError(
                "this policy predicts actions relative to the state (--action-space), and here they are wanted without "
                "one: use a policy that was trained on them as recorded"
            )
        return np.asarray(proprio_BP, dtype=np.float64)

    def images(self, obs: Observation) -> NDArray[np.uint8]:
        """(B, V, size, size, 3): the cameras that the policy reads, in its order. ValueError as `arrays`."""
        wanted, given = self.config.cameras, obs.images
        for camera in filter(None, wanted):
            if camera not in given:
                has = ", ".join(f"'{name}'" for name in given) or "none"
                reads = ", ".join(f"'{name}'" for name in wanted if name)
                raise ValueError(
                    f"the observation lacks camera '{camera}': this policy reads {reads}, the observation has {has}"
                )
        size = self.config.image_size
        views = []
        for camera in wanted:
            if not camera:
                views.append(np.zeros((obs.batch_size, size, size, 3), np.uint8))
                continue
            image = np.asarray(given[camera])
            if image.dtype != np.uint8:
                raise ValueError(f"camera '{camera}' must be uint8 RGB in 0..255, got {image.dtype}")
            if image.ndim != 4 or image.shape[-1] != 3 or image.shape[0] != obs.batch_size or 0 in image.shape:
                raise ValueError(f"camera '{camera}' must have shape ({obs.batch_size}, H, W, 3), got {image.shape}")
            self._tell_shape(camera, *image.shape[1:3])
            self._tell_black(camera, image)
            views.append(image if image.shape[1:3] == (size, size) else resize(image, size))
        return np.stack(views, axis=1)

    def _tell_black(self, camera: str, picture_BHWC: NDArray[np.uint8]) -> None:
        """Log, once for each camera, a picture in which nothing can be seen."""
        if camera not in self._black and is_black(picture_BHWC):
            self._black.add(camera)
            _log.warning("%s", black_picture(camera))

    def _tell_shape(self, camera: str, height: int, width: int) -> None:
        """Log, once for each camera, a picture that says next to nothing once it is the square the policy reads, or
        is squeezed into it otherwise than the pictures of training."""
        if camera in self._shown or height == width == self.config.image_size:  # clients may send what is read
            return
        few = min(height, width) * _FEW_PIXELS < self.config.image_size
        trained = dict(zip(self.config.cameras, self.config.aspects or (), strict=False)).get(camera)
        squeezed = max(height, width) / min(height, width)
        if trained:
            squeezed = max(width / height / trained, trained * height / width)
        if not (few or squeezed > (_SQUEEZED if trained else _LONG)):
            return
        self._shown.add(camera)
        size = self.config.image_size
        _log.warning(
            "camera '%s' shows %dx%d pixels, the policy reads them as %dx%d: %s; send them as in its demonstrations",
            camera, width, height, size, size, 
            "next to nothing can be seen" if few else
            "they are squeezed, otherwise than those of training" if trained else "they are squeezed",
        )  # fmt: skip

    def _check_action(self, action: Any, width: int) -> None:
        if not action.shape or action.shape[-1] != width:
            raise ValueError(
                f"an action of this policy has {width} components ({', '.join(self.config.action_names)}), got shape "
                f"{tuple(action.shape)}"
            )


def _require_finite(values_BX: NDArray[np.floating], name: str) -> None:
    if not np.isfinite(values_BX).all():
        row, column = np.argwhere(~np.isfinite(values_BX))[0]
        raise ValueError(f"{name} holds NaN or infinity: world {row}, component {column} is {values_BX[row, column]}")


def _check_slots(what: str, slots: tuple[int, ...] | None, width: int | None, dim: int) -> None:
    if (slots is None) != (width is None):
        raise ValueError(f"{what}_slots and {what}_width go together")
    if slots is None or width is None:
        return
    if len(slots) != dim or len(set(slots)) != dim or not all(0 <= slot < width for slot in slots):
        raise ValueError(f"{what}_slots must be {dim} different places below {width}, got {slots}")


def _spread(values_X: NDArray[np.float32], slots: tuple[int, ...] | None, width: int) -> NDArray[np.float32]:
    """(..., dim) -> (..., width): each component to its slot, 0 elsewhere. As it is without slots."""
    if slots is None:
        return values_X
    out = np.zeros((*values_X.shape[:-1], width), np.float32)
    out[..., list(slots)] = values_X
    return out
