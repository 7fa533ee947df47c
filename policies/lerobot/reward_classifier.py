"""A reward classifier that LeRobot trained (`lerobot.rewards`): has the task been done in these pictures?

Read is the folder `pretrained_model` of a `lerobot-train` run with `--reward_model.type=reward_classifier`.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.rewards import RewardModelConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.rewards.classifier.modeling_classifier import Classifier
from lerobot.rewards.factory import make_reward_pre_post_processors
from lerobot.utils.constants import OBS_IMAGE
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_model

from vla.core.config import load_json
from vla.core.types import Observation
from vla.processing.pictures import resize

TYPE = "reward_classifier"
PROCESSOR = "classifier_preprocessor.json"


class LeRobotClassifier:
    """Observations -> (B,) bool, by the classifier's own probability of a half. It reads pictures and no instruction:
    one classifier knows one task."""

    def __init__(self, model: Any, preprocess: Any) -> None:
        self._model, self._preprocess = model.eval().requires_grad_(False), preprocess
        features = model.config.input_features
        self._keys = {key.rsplit(".", 1)[-1]: key for key in features if key.startswith(OBS_IMAGE)}
        self._sizes = {key: tuple(features[key].shape[1:]) for key in self._keys.values()}

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that it reads."""
        return tuple(self._keys)

    @torch.inference_mode()
    def __call__(self, obs: Observation) -> NDArray[np.bool_]:
        """(B,) true where the task is done. ValueError naming a camera that is not shown."""
        raw: dict[str, Any] = {}
        for camera, key in self._keys.items():
            if camera not in obs.images:
                raise ValueError(f"the reward classifier reads camera '{camera}', shown are {', '.join(obs.images)}")
            image, (height, width) = obs.images[camera], self._sizes[key]
            if height == width and image.shape[1] == image.shape[2] != height:
                image = resize(image, height)
            if image.shape[1:3] != (height, width):
                raise ValueError(
                    f"the reward classifier was trained on pictures of {width}x{height} pixels from '{camera}', it is "
                    f"shown {image.shape[2]}x{image.shape[1]}"
                )
            raw[key] = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float() / 255
        return self._model.compute_reward(self._preprocess(raw)).bool().numpy()


def is_reward_classifier(folder: Path) -> bool:
    """True for a folder of LeRobot's with a reward classifier in it."""
    config = folder / "config.json"
    return config.is_file() and load_json(config).get("type") == TYPE


def load_reward_classifier(folder: Path) -> LeRobotClassifier:
    """The classifier in a folder. ValueError where something of it is missing."""
    config: Any = RewardModelConfig.from_pretrained(str(folder), local_files_only=True)
    config.device = "cpu"
    try:
        with redirect_stdout(sys.stderr):  # LeRobot prints what it loads
            model = Classifier(config)
    except OSError as problem:
        raise ValueError(
            f"{folder}: the classifier's encoder {config.model_name!r} cannot be loaded "
            f"({str(problem).strip().splitlines()[0]}): name a local folder of it as model_name in config.json"
        ) from None
    try:
        # LeRobot itself is not strict: what is shared by several cameras is saved once, and counters are left out.
        missing, _ = load_model(model, folder / "model.safetensors", strict=False)
    except (OSError, RuntimeError, SafetensorError) as problem:
        raise ValueError(f"{folder} does not hold the classifier's weights: {' '.join(str(problem).split())}") from None
    if lacking := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise ValueError(f"{folder} does not hold the classifier's weights: {lacking[0]} is missing")
    if (folder / PROCESSOR).is_file():
        steps = {"device_processor": {"device": "cpu"}}
        preprocess = PolicyProcessorPipeline.from_pretrained(folder, PROCESSOR, overrides=steps)
    else:  # none was saved beside it: the pictures are not normalised
        preprocess, _ = make_reward_pre_post_processors(config)
    return LeRobotClassifier(model, preprocess)
