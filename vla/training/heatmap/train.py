"""Imitation by keyframes: a few demonstrations with depth -> a policy that says where the hand goes next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.core.checkpoint import CONFIG
from vla.core.config import encode, save_json
from vla.data.camera_geometry import shares_within
from vla.model.heatmap.config import HeatmapConfig, Workspace
from vla.model.heatmap.execution import Columns
from vla.model.heatmap.model import HeatmapModel
from vla.model.heatmap.policy import HeatmapPolicy
from vla.model.heatmap.pretrained import read_head
from vla.processing.processor import Processor, ProcessorConfig
from vla.runtime.locks import locked, refuse_used
from vla.runtime.process import restored_threads
from vla.training.heatmap.keyframes import label, metres_per_action
from vla.training.heatmap.learning import learn
from vla.training.heatmap.looks import Task
from vla.training.heatmap.looks import encode as encode_looks

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet

_BATCH = 16
_DELAYED = 6
"""Frames over which a hand's motion is compared with its actions where the state tells no commanded position."""


@dataclass(frozen=True)
class HeatmapTrainConfig:
    """Configuration of a run. `replace` it to change a recipe."""

    model: HeatmapConfig = field(default_factory=HeatmapConfig)
    pretrained: str | None = "shipped"
    """The head's first weights: "shipped", a file of `vla pretrain heatmap`, or None for random ones."""
    steps: int = 200
    batch_size: int = 32
    lr: float = 3e-4
    """Largest learning rate of what was pre-trained; what is new learns five times as fast."""
    frames_per_keyframe: int = 6
    """Frames of the way to each keyframe that are learnt from, evenly spread."""
    shift_m: float = 0.05
    """The scenes are moved at random by up to this along each axis,"""
    turn_deg: float = 20.0
    """and turned about the vertical by up to this."""
    seed: int = 0
    num_threads: int = 0
    """Threads of torch. 0: as it is."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if min(self.steps, self.batch_size, self.frames_per_keyframe) < 1 or self.lr <= 0:
            return "steps, batch_size, frames_per_keyframe and lr must be positive"
        return self.model.problem()


def build(config: HeatmapTrainConfig, demos: DemoSet, backbone: Any = None) -> HeatmapPolicy:
    """An untrained policy for the robot of these demonstrations. ValueError, one line, for demonstrations that do not
    fit: without depth, of an arm that turns, of actions that are no displacements."""
    from vla.backbones.hub import load as load_backbone

    if problem := config.problem():
        raise ValueError(problem)
    if missing := set(demos.images) - set(demos.geometry):
        raise ValueError(
            f"camera '{min(missing)}' has no depth in these demonstrations, which heat-maps need: record them with "
            "`vla demos --depth`, or train a chunk policy (--head l1)"
        )
    workspace = config.model.workspace
    if not any(shares_within(demos.geometry, workspace.centre_m, workspace.half_m).values()):
        centre = ", ".join(f"{x:g}" for x in workspace.centre_m)
        raise ValueError(
            f"the cameras measure nothing of the workspace, {workspace.half_m:g} m to each side of ({centre}) m: are "
            "the extrinsics robot_from_camera, in metres? For another workspace change HeatmapConfig from Python"
        )
    columns = Columns(config.model.body, demos.proprio_names, demos.action_names)
    scale = metres_per_action(
        columns.commanded(demos.proprio), demos.action[:, columns.move], demos.episode_index,
        frames=1 if columns.lead else _DELAYED,
    )  # fmt: skip
    model_config = replace(config.model, motion=replace(config.model.motion, metres_per_action=scale))
    backbone = backbone or load_backbone(model_config.backbone, num_views=3)
    size = model_config.picture_size
    spec = demos.action_spec
    processor = Processor(
        ProcessorConfig(
            cameras=tuple(demos.images), proprio_dim=demos.proprio.shape[1], action_names=demos.action_names,
            image_size=size, text_rule="signs", action_low=spec.low, action_high=spec.high, control_hz=demos.fps,
            proprio_names=demos.proprio_names, picture_size=size, depth=True,
        ),
        demos.stats(), backbone.tokenizer,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HeatmapModel(model_config, backbone, state_dim=len(columns.state))
    if config.pretrained is not None:
        model.taught = read_head(model, config.pretrained)
    return HeatmapPolicy(model, processor)


def train(
    config: HeatmapTrainConfig,
    policy: HeatmapPolicy,
    demos: DemoSet,
    out: str | os.PathLike[str],
    *,
    on_step: Callable[[str, int, int, float | None], None] | None = None,
) -> dict[str, float]:
    """Train `policy` in place and leave its checkpoint in `out`; returns seconds of encoding and of learning, and the
    number of looks. ValueError where `out` is taken."""
    out = Path(out)
    tell = on_step or (lambda stage, done, total, loss: None)
    with locked(out), restored_threads(), torch.random.fork_rng(devices=[]):
        refuse_used(out / CONFIG, out, "a checkpoint", resume=False)
        out.mkdir(parents=True, exist_ok=True)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        save_json(out / "train.json", encode(config))
        began = time.monotonic()
        tasks, total = tasks_of(config, policy, demos)
        generator = torch.Generator().manual_seed(config.seed)
        lesson = encode_looks(
            policy.model, tasks, generator, shift_m=config.shift_m,
            on_scenes=lambda done: tell("encoding", done, total, None),
        )  # fmt: skip
        encoded = time.monotonic()
        learn(
            policy.model, lesson, steps=config.steps, batch_size=config.batch_size, lr=config.lr, seed=config.seed,
            taught=policy.model.taught,
            on_step=lambda step, heat, flags: tell("learning", step, config.steps, heat + flags),
        )  # fmt: skip
        policy.save(out)
    done = time.monotonic()
    return {"encode_seconds": encoded - began, "learn_seconds": done - encoded, "looks": lesson.batch_size}


def tasks_of(config: HeatmapTrainConfig, policy: HeatmapPolicy, demos: DemoSet) -> tuple[Iterator[Task], int]:
    """The frames to learn from, each with its keyframe, in batches; and how many there are. ValueError for
    demonstrations without a keyframe."""
    columns = policy.columns
    hand = demos.proprio[:, columns.hand]
    bounds = policy.processor.action_spec
    middle = 0.5 * (bounds.low[columns.grip] + bounds.high[columns.grip])
    told = demos.action[:, columns.grip] > middle
    frames: list[NDArray[np.int64]] = []
    keys: list[NDArray[np.int64]] = []
    lifts: list[NDArray[np.bool_]] = []
    for episode in demos.episodes:
        rows = np.flatnonzero(demos.episode_index == episode)
        found = label(hand[rows], told[rows])
        for target in np.unique(found.target_T[found.target_T >= 0]):
            way = np.flatnonzero(found.target_T == target)
            chosen = way[np.unique(np.linspace(0, len(way) - 1, config.frames_per_keyframe).round().astype(int))]
            frames.append(rows[chosen])
            keys.append(np.full(len(chosen), rows[target]))
            lifts.append(found.lift_T[chosen])
    if not frames:
        raise ValueError("these demonstrations have no keyframe: the hand must go somewhere")
    every, key, lift = np.concatenate(frames), np.concatenate(keys), np.concatenate(lifts)
    _require_inside(config.model.workspace, hand[np.unique(key)])
    return _tasks(config, policy, demos, every, key, told[key], lift), len(every)


def _require_inside(workspace: Workspace, keyframes_N3: NDArray[np.floating]) -> None:
    """ValueError where most keyframes lie outside of the cube that the heat-maps show: what is learnt from those is a
    place at its edge."""
    away = np.abs(keyframes_N3 - np.array(workspace.centre_m)).max(1) > workspace.half_m
    if away.mean() <= 0.5:
        return
    where, centre = (", ".join(f"{x:.3g}" for x in p) for p in (np.median(keyframes_N3, axis=0), workspace.centre_m))
    raise ValueError(
        f"{away.sum()} of {len(away)} keyframes (usually at {where} m) lie outside of the workspace, "
        f"{workspace.half_m:g} m to each side of ({centre}): is the hand's position in metres, in the robot's frame? "
        "For another workspace change HeatmapConfig from Python"
    )


def _tasks(
    config: HeatmapTrainConfig,
    policy: HeatmapPolicy,
    demos: DemoSet,
    frames: NDArray[np.int64],
    keys: NDArray[np.int64],
    opened: NDArray[np.bool_],
    lifts: NDArray[np.bool_],
) -> Iterator[Task]:
    rng = np.random.default_rng([config.seed, len(frames)])
    columns, processor = policy.columns, policy.processor
    middle = torch.tensor(config.model.workspace.centre_m)
    for start in range(0, len(frames), _BATCH):
        part = slice(start, start + _BATCH)
        obs = demos.observation(frames[part])
        cloud, ids, mask, hand, state = policy.inputs(processor.arrays(obs), obs.proprio)
        at = torch.from_numpy(demos.proprio[keys[part]][:, columns.hand].astype(np.float32))
        turn = _turns(np.deg2rad(config.turn_deg) * rng.uniform(-1, 1, len(at)))

        def turned(points: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            return (points - middle) @ turn.mT + middle

        cloud = replace(cloud, points_BN3=turned(cloud.points_BN3))
        flags = torch.from_numpy(np.stack([opened[part], lifts[part]], 1).astype(np.float32))
        yield Task(
            cloud, ids, mask, turned(at[:, None])[:, 0], turned(hand[:, None])[:, 0],
            torch.full((len(at),), -1), state, flags,
        )  # fmt: skip


def _turns(angles_B: NDArray[np.float64]) -> torch.Tensor:
    """(B, 3, 3) rotations about the vertical."""
    c, s = (torch.from_numpy(part(angles_B).astype(np.float32)) for part in (np.cos, np.sin))
    out = torch.eye(3).repeat(len(c), 1, 1)
    out[:, 0, 0], out[:, 0, 1], out[:, 1, 0], out[:, 1, 1] = c, -s, s, c
    return out
