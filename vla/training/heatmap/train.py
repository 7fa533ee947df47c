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
from vla.model.heatmap.config import BODIES, Body, HeatmapConfig, Workspace
from vla.model.heatmap.execution import Columns
from vla.model.heatmap.model import HeatmapModel
from vla.model.heatmap.policy import HeatmapPolicy
from vla.model.heatmap.pretrained import read_head
from vla.model.heatmap.rotation import angles_of, bins_of, matrices
from vla.processing.processor import Processor, ProcessorConfig
from vla.runtime.locks import locked, refuse_used
from vla.runtime.process import restored_threads
from vla.training.heatmap.keyframes import label, metres_per_action, radians_per_action
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
    """The body is replaced by a known one that fits the demonstrations, and the workspace put around their hand, where
    these do not."""
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
    fit: without depth, of an arm that is not known, of actions that are no displacements."""
    from vla.backbones.hub import load as load_backbone

    if problem := config.problem():
        raise ValueError(problem)
    if missing := set(demos.images) - set(demos.geometry):
        raise ValueError(
            f"camera '{min(missing)}' has no depth in these demonstrations, which heat-maps need: record them with "
            "`vla demos --depth`, or train a chunk policy (--head l1)"
        )
    body, workspace = _body(config.model.body, demos), config.model.workspace
    columns = Columns(body, demos.proprio_names, demos.action_names)
    if body != config.model.body:
        workspace = _workspace(workspace, demos.proprio[:, columns.hand])
    if not any(shares_within(demos.geometry, workspace.centre_m, workspace.half_m).values()):
        centre = ", ".join(f"{x:g}" for x in workspace.centre_m)
        raise ValueError(
            f"the cameras measure nothing of the workspace, {workspace.half_m:g} m to each side of ({centre}) m: are "
            "the extrinsics robot_from_camera, in metres? For another workspace change HeatmapConfig from Python"
        )
    frames = 1 if columns.lead else _DELAYED
    motion = replace(
        config.model.motion,
        metres_per_action=metres_per_action(
            columns.commanded(demos.proprio), demos.action[:, columns.move], demos.episode_index, frames=frames
        ),
    )
    if columns.orientation is not None:
        turns = matrices(demos.proprio[:, columns.orientation])
        scale = radians_per_action(
            turns, demos.action[:, columns.turn], demos.episode_index, frames=frames,
            otherwise=motion.radians_per_action,
        )  # fmt: skip
        motion = replace(motion, radians_per_action=scale)
    model_config = replace(config.model, body=body, motion=motion, workspace=workspace)
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


def _body(body: Body, demos: DemoSet) -> Body:
    """`body`, or the first of `BODIES` whose components these demonstrations have where it is none of theirs."""

    def fits(one: Body) -> bool:
        return {*one.hand, one.gripper} <= {*demos.proprio_names} and {*one.move, one.grip} <= {*demos.action_names}

    return body if fits(body) else next((one for one in BODIES.values() if fits(one)), body)


def _workspace(workspace: Workspace, hand_T3: NDArray[np.floating]) -> Workspace:
    """`workspace`, or one as large around where the hand was, if that was not within it. ValueError for a hand that
    goes further."""
    low, high = hand_T3.min(0), hand_T3.max(0)
    centre, half = np.array(workspace.centre_m), workspace.half_m
    if (np.maximum(high - centre, centre - low) < half).all():
        return workspace
    if (high - low).max() >= 2 * half:
        raise ValueError(
            f"the hand goes {(high - low).max():.2f} m along an axis in these demonstrations, and heat-maps show a "
            f"cube of {2 * half:.2f} m: give HeatmapConfig a workspace of another size from Python"
        )
    return replace(workspace, centre_m=tuple(round(float(x), 3) for x in (low + high) / 2))


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
    told = (demos.action[:, columns.grip] > middle) == (policy.model.config.body.grip_opens == "high")
    frames: list[NDArray[np.int64]] = []
    keys: list[NDArray[np.int64]] = []
    lifts: list[NDArray[np.bool_]] = []
    overs: list[NDArray[np.bool_]] = []
    for episode in demos.episodes:
        rows = np.flatnonzero(demos.episode_index == episode)
        found = label(hand[rows], told[rows])
        for target in np.unique(found.target_T[found.target_T >= 0]):
            way = np.flatnonzero(found.target_T == target)
            chosen = way[np.unique(np.linspace(0, len(way) - 1, config.frames_per_keyframe).round().astype(int))]
            frames.append(rows[chosen])
            keys.append(np.full(len(chosen), rows[target]))
            lifts.append(found.lift_T[chosen])
            overs.append(np.zeros(len(chosen), bool))
        if policy.model.config.done:
            # Where the episode ends is a frame or two, which are seen as often as half a keyframe's.
            ending = np.resize(rows[found.over_T], max(1, config.frames_per_keyframe // 2))
            frames.append(ending)
            keys.append(ending)
            lifts.append(np.zeros(len(ending), bool))
            overs.append(np.ones(len(ending), bool))
    if not any(len(part) and not over.any() for part, over in zip(frames, overs, strict=True)):
        raise ValueError("these demonstrations have no keyframe: the hand must go somewhere")
    every, key = np.concatenate(frames), np.concatenate(keys)
    _require_inside(policy.model.config.workspace, hand[np.unique(key[~np.concatenate(overs)])])
    flags = [told[key], np.concatenate(lifts), np.concatenate(overs)][: len(policy.model.config.flags)]
    return _tasks(config, policy, demos, every, key, np.stack(flags, 1).astype(np.float32)), len(every)


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
    flags: NDArray[np.float32],
) -> Iterator[Task]:
    rng = np.random.default_rng([config.seed, len(frames)])
    columns, processor = policy.columns, policy.processor
    middle = torch.tensor(policy.model.config.workspace.centre_m)
    for start in range(0, len(frames), _BATCH):
        part = slice(start, start + _BATCH)
        obs = demos.observation(frames[part])
        cloud, ids, mask, hand, state = policy.inputs(processor.arrays(obs), obs.proprio)
        at = torch.from_numpy(demos.proprio[keys[part]][:, columns.hand].astype(np.float32))
        angles = np.deg2rad(config.turn_deg) * rng.uniform(-1, 1, len(at))
        turn = _turns(angles)
        bins = np.full((len(at), 3), -1)
        if columns.orientation is not None:
            hand_angles = angles_of(matrices(demos.proprio[keys[part]][:, columns.orientation]))
            bins = bins_of(hand_angles + np.stack([0 * angles, 0 * angles, angles], 1))

        def turned(points: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            return (points - middle) @ turn.mT + middle

        cloud = replace(cloud, points_BN3=turned(cloud.points_BN3))
        yield Task(
            cloud, ids, mask, turned(at[:, None])[:, 0], turned(hand[:, None])[:, 0],
            torch.full((len(at),), -1), state, torch.from_numpy(flags[part]), torch.from_numpy(bins),
        )  # fmt: skip


def _turns(angles_B: NDArray[np.float64]) -> torch.Tensor:
    """(B, 3, 3) rotations about the vertical."""
    c, s = (torch.from_numpy(part(angles_B).astype(np.float32)) for part in (np.cos, np.sin))
    out = torch.eye(3).repeat(len(c), 1, 1)
    out[:, 0, 0], out[:, 0, 1], out[:, 1, 0], out[:, 1, 1] = c, -s, s, c
    return out
