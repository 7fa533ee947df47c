"""A policy that LeRobot trained (ACT, Diffusion, SmolVLA and the others) as a `vla.core.types.Policy`.

Read is the folder `pretrained_model` of a `lerobot-train` run. Features are found by their names, and numbers are
normalised by LeRobot's own processors, as `lerobot-eval` does it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from vla.core.config import load_json
from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix
from vla.data.dataset_meta import component_names
from vla.processing.cameras.camera_map import LACKING, CameraMap
from vla.processing.pictures import resize
from vla.runtime.devices import choose_device

Step = dict[str, Tensor]
"""One control step's observation of B environments as the policy reads it: feature -> (B, ...)."""
PREPROCESSOR = "policy_preprocessor.json"
_BOUNDS = ("min", "max")


class LeRobotPolicy:
    """A trained policy of LeRobot in its environments.

    One that reads a single observation is stateless and answers with whole chunks. One that reads several consecutive
    control steps (Diffusion reads two) keeps them for each environment and answers with the next action only: it must
    be asked at every control step, as LeRobot's own evaluation does, while a new chunk is computed after every
    `n_action_steps`.
    """

    def __init__(self, policy: Any, preprocess: Any, postprocess: Any, spec: PolicySpec) -> None:
        """`spec` describes the policy as it is configured; `self.spec` as it is to be asked."""
        self.policy, self.config = policy.eval(), policy.config
        self.preprocess, self.postprocess = preprocess, postprocess
        self.n_action_steps = spec.n_action_steps or 1
        """Actions of a chunk that are executed before the next one is computed."""
        self.cameras = cameras_of(self.config)
        self._memory = _Memory(spec.observations)
        self._decisions = 0
        self.spec = spec if spec.observations == 1 else replace(spec, chunk_size=1, n_action_steps=1)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> LeRobotPolicy:
        """The policy in a folder. ValueError naming what of it this program does not play."""
        config = policy_config(folder)
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            raise ValueError(
                f"{folder} averages overlapping chunks (temporal_ensemble_coeff), which is not done here: set it to "
                "null in config.json, and n_action_steps to the actions of a chunk that are executed"
            )
        return LeRobotPolicy.of(config, folder, choose_device("auto"))

    @staticmethod
    def of(config: PreTrainedConfig, folder: str | os.PathLike[str], device: str) -> LeRobotPolicy:
        """The policy in a folder, whose configuration has been read. ValueError where something of it is missing."""
        folder, config.device = Path(folder), device
        if hasattr(config, "pretrained_backbone_weights"):
            config.pretrained_backbone_weights = None  # or it would fetch those that training began with
        steps = {"device_processor": {"device": device}}
        try:
            with redirect_stdout(sys.stderr):  # LeRobot prints what it loads, among what a command prints
                policy = get_policy_class(config.type).from_pretrained(folder, config=config)
                pre, post = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=steps)
        except OSError as problem:  # of Hugging Face: a tokenizer or a model that the folder only names
            told = str(problem).strip().splitlines()[0]
            raise ValueError(f"{folder} is not all that its policy needs: {told}") from None
        return LeRobotPolicy(policy, pre, post, _spec(config, _stats(post), _dataset(folder)))

    def look_through(self, cameras: CameraMap) -> None:
        """Read these cameras from now on. ValueError where they do not fit the policy's, and where one is lacking:
        LeRobot's policies read all of theirs."""
        laid = cameras.laid(tuple(self.cameras))
        if "" in laid:
            raise ValueError(
                f"--cameras: a policy of LeRobot's ({self.config.type}) needs all of its cameras, "
                f"{', '.join(self.cameras)}: none of them can be '{LACKING}'"
            )
        self.cameras = dict(zip(laid, self.cameras.values(), strict=True))
        self.spec = replace(self.spec, cameras=laid)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget what these environments have shown, and the actions that they still had to execute. When all begin
        anew, a policy that samples draws the same numbers again."""
        self._memory.forget(env_ids)
        if env_ids is None:
            self._decisions = 0

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, C, A) in environment units; of a policy with a memory the next action (B, 1, A).
        FloatingPointError if it is not finite. Actions of environments that are not live mean nothing."""
        with torch.inference_mode():
            step = self.read(obs)
            if self.spec.observations == 1:
                return self._chunk([step])
            memory = self._memory
            memory.observe(step, obs.batch_size)
            live = np.ones(obs.batch_size, bool) if obs.live is None else obs.live
            asking = np.flatnonzero((memory.left == 0) & live)
            if len(asking):
                memory.plan(asking, self._chunk(memory.steps(asking))[:, : self.n_action_steps])
            return memory.next_actions(obs.batch_size, self.spec.action_spec.dim)

    def read(self, obs: Observation) -> Step:
        """The observation as LeRobot's processors leave it: tensors (B, ...) by feature."""
        raw: dict[str, Any] = {"task": list(obs.instruction)}
        for camera, key in self.cameras.items():
            image = obs.images[camera]
            wanted = tuple(self.config.input_features[key].shape[1:])
            if wanted[0] == wanted[1] and image.shape[1] == image.shape[2] != wanted[0]:
                image = resize(image, wanted[0])
            if image.shape[1:3] != wanted:
                raise ValueError(
                    f"this policy was trained on pictures of {wanted[1]}x{wanted[0]} pixels from '{camera}', it is "
                    f"shown {image.shape[2]}x{image.shape[1]}"
                )
            raw[key] = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float() / 255
        if OBS_STATE in self.config.input_features:
            raw[OBS_STATE] = torch.from_numpy(np.array(obs.proprio, np.float32))
        done = self.preprocess(raw)
        return {name: value for name, value in done.items() if isinstance(value, Tensor) and value.ndim}

    def _chunk(self, steps: Sequence[Step]) -> ActionChunk:
        """The whole chunk after these consecutive control steps, (B, C, A)."""
        policy = self.policy
        policy.reset()  # its own queues know one batch, whose environments all began together
        queues = getattr(policy, "_queues", None) or {}
        for step in steps:
            if OBS_IMAGES in queues:
                step[OBS_IMAGES] = torch.stack([step[key] for key in self.cameras.values()], dim=-4)
            if OBS_STATE in queues:
                queues = policy._queues = populate_queues(queues, step)
        with torch.random.fork_rng():
            torch.manual_seed(self._decisions)
            action = policy.predict_action_chunk(steps[-1])
        self._decisions += 1
        batch_size, length, width = action.shape
        chunk = self.postprocess(action.reshape(-1, width)).reshape(batch_size, length, width).float().cpu().numpy()
        if not np.isfinite(chunk).all():
            raise FloatingPointError("the policy's action is not finite: its weights or inputs are damaged")
        return chunk


class _Memory:
    """The last observations of each environment, and the actions that it has still to execute."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.left = np.zeros(0, np.int64)
        """(B,) planned actions that are not executed yet."""
        self._fresh = np.zeros(0, bool)
        self._seen: list[Step] = []
        self._plan: np.ndarray | None = None

    def forget(self, env_ids: Sequence[int] | None) -> None:
        """Episodes begin in these environments (all when None)."""
        if env_ids is None:
            self._seen = []
        elif len(self.left):
            self._fresh[list(env_ids)] = True
            self.left[list(env_ids)] = 0

    def observe(self, step: Step, count: int) -> None:
        """Take in one control step's observation of all `count` environments. An episode's first stands in for those
        before it."""
        if not self._seen or len(self.left) != count:
            self._seen, self._plan = [step] * self._length, None
            self.left = np.zeros(count, np.int64)
        else:
            rows = torch.from_numpy(np.flatnonzero(self._fresh))
            earlier = [dict(one) for one in self._seen[1:]]
            for one in earlier if len(rows) else ():
                for name, value in step.items():
                    one[name] = one[name].clone()
                    one[name][rows] = value[rows]
            self._seen = [*earlier, step]
        self._fresh = np.zeros(count, bool)

    def steps(self, rows: np.ndarray) -> list[Step]:
        """The observations of these environments, the newest last."""
        return [{name: value[torch.from_numpy(rows)] for name, value in step.items()} for step in self._seen]

    def plan(self, rows: np.ndarray, actions: np.ndarray) -> None:
        """The actions (len(rows), steps, A) that these environments execute from now on."""
        if self._plan is None:
            self._plan = np.zeros((len(self.left), *actions.shape[1:]), np.float32)
        self._plan[rows] = actions
        self.left[rows] = actions.shape[1]

    def next_actions(self, count: int, width: int) -> np.ndarray:
        """(B, 1, A): one action of each plan, which is then executed; zeros where nothing is planned."""
        if self._plan is None:
            return np.zeros((count, 1, width), np.float32)
        steps = self._plan.shape[1]
        actions = self._plan[np.arange(count), np.minimum(steps - self.left, steps - 1)]
        self.left = np.maximum(self.left - 1, 0)
        return actions[:, None]


def policy_config(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """The configuration in a folder. ValueError, one line, for a policy that cannot be played here."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds adapters (--peft): merge them into their policy and save that")
    kind = load_json(folder / "config.json")["type"]
    if kind not in PreTrainedConfig.get_known_choices():
        raise ValueError(f"{folder} is a policy of type '{kind}', which the installed LeRobot does not know")
    if not (folder / PREPROCESSOR).is_file():
        raise ValueError(
            f"{folder} has no {PREPROCESSOR}: LeRobot before 0.4 wrote it; `python -m "
            f"lerobot.processor.migrate_policy_normalization --pretrained-path {folder}` makes it"
        )
    config = PreTrainedConfig.from_pretrained(folder)
    others = [key for key in config.input_features if key != OBS_STATE and key not in cameras_of(config).values()]
    if others:
        raise ValueError(f"{folder} reads '{others[0]}': only pictures, '{OBS_STATE}' and the instruction are given")
    return config


def cameras_of(config: PreTrainedConfig) -> dict[str, str]:
    """Camera -> the feature with its pictures, in the policy's order."""
    features = [key for key, feature in config.input_features.items() if feature.type is FeatureType.VISUAL]
    return {key.removeprefix(f"{OBS_IMAGES}.").removeprefix("observation."): key for key in features}


def _stats(postprocess: Any) -> dict[str, Any]:
    """The action's statistics in the step that takes normalised actions back; {} where there is none."""
    for step in postprocess.steps:
        if ACTION in (stats := getattr(step, "stats", None) or {}):
            return dict(stats[ACTION])
    return {}


def _dataset(folder: Path) -> dict[str, Any]:
    """meta/info.json of the dataset that the policy was trained on; {} where it is not on this machine any more."""
    run = folder / "train_config.json"
    root = (load_json(run).get("dataset") or {}).get("root") if run.is_file() else None
    info = Path(root or "") / "meta" / "info.json"
    return load_json(info) if root and info.is_file() else {}


def _spec(config: PreTrainedConfig, stats: dict[str, Any], dataset: dict[str, Any]) -> PolicySpec:
    """The policy's interface. LeRobot's folders hold no names of components, and no rate: they are told where
    the dataset is still to be found."""
    width = config.output_features[ACTION].shape[0]
    state = config.input_features.get(OBS_STATE)
    features, names, proprio, rate = dataset.get("features", {}), None, None, 0.0
    if _width(features, ACTION) == width and _width(features, OBS_STATE) == (state.shape[0] if state else None):
        names, rate = component_names(features, ACTION), float(dataset["fps"])
        proprio = component_names(features, OBS_STATE) if state else None
    low, high = (
        tuple(np.asarray(stats[name], float).reshape(-1).tolist()) if name in stats else (bound,) * width
        for name, bound in zip(_BOUNDS, (-math.inf, math.inf), strict=True)
    )
    sizes = {shape for key in cameras_of(config).values() for shape in [tuple(config.input_features[key].shape[1:])]}
    side = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    steps = getattr(config, "n_action_steps", 1)
    return PolicySpec(
        action_spec=ActionSpec(names or tuple(f"a{i}" for i in range(width)), low, high, rate),
        chunk_size=getattr(config, "chunk_size", None) or steps,
        n_action_steps=steps,
        cameras=tuple(cameras_of(config)),
        proprio_dim=state.shape[0] if state else None,
        proprio_names=proprio,
        picture_size=side[0] if side[0] == side[1] else None,
        observations=getattr(config, "n_obs_steps", 1),
    )


def _width(features: dict[str, Any], key: str) -> int | None:
    return features[key]["shape"][0] if key in features else None
