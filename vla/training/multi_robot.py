"""One policy for several datasets: their cameras, states and actions laid into one model's places.

Components are matched by name ("gripper" of one robot is "gripper" of the other); what a robot lacks is 0 in its state,
black in its views, and masked in its loss. Each keeps its own normalisation, which the checkpoint holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import nn

from vla.core.compatibility import same_rate
from vla.core.types import IMAGE_SIZE, ActionSpec
from vla.data.dataset_meta import camera_name
from vla.data.fitting import aligned
from vla.data.lerobot_dataset import DemoSet
from vla.model.config import MemoryConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.action_space import MOST_CHUNKS, ActionSpace, action_space
from vla.processing.processor import Processor, ProcessorConfig, Stats
from vla.processing.text import MOST_TOKENS, room_for_text
from vla.training.train_config import TrainConfig

ONLY = "only"
_SAME = frozenset(("main", "joint", "joints", "motor", "motors", "pos", "position", "positions", "cmd", "command"))
"""Words in a component's name by which tools name one component differently: "elbow", "elbow.pos"."""


def build_vla(
    cfg: TrainConfig,
    demos: DemoSet | Mapping[str, DemoSet],
    *,
    action_spec: ActionSpec | None = None,
    backbone: nn.Module | None = None,
) -> VLA:
    """An untrained policy for these demonstrations. `action_spec`: the robot's true bounds, if known.

    `backbone` is used instead of loading `cfg.model.backbone`. Several named datasets make a policy with a member for
    each; the first is the one in use.
    """
    count = len(demos) if isinstance(demos, Mapping) else 1
    if cfg.weights is not None and len(cfg.weights) != count:
        need = "1 dataset needs 1 weight" if count == 1 else f"{count} datasets need {count} weights"
        raise ValueError(f"{need}, got {len(cfg.weights)}")
    if cfg.model.memory is not None:
        check_memory(cfg.model, demos.values() if isinstance(demos, Mapping) else [demos])
    if isinstance(demos, Mapping) and len(demos) == 1:
        demos = next(iter(demos.values()))
    if isinstance(demos, Mapping):
        return _build_for_several(cfg, demos, backbone)
    cameras = _cameras(cfg, demos)
    backbone = _for_views(cfg, backbone, len(cameras))
    space, stats = _space(cfg, demos)
    _check_change(cfg, [space], demos.action_names)
    vla = VLA.build(
        cfg.model,
        stats=stats,
        action_spec=action_spec or demos.action_spec,
        cameras=cameras,
        image_size=cfg.image_size,
        picture_size=_sharpest(demos),
        aspects=_aspects(demos, cameras),
        max_text_tokens=_room_for_text(cfg, backbone, [demos]),
        proprio_names=demos.proprio_names,
        backbone=backbone,
        seed=cfg.seed,
    )
    if space is not None:
        vla.processor = Processor(replace(vla.processor.config, action_space=space), stats, vla.processor.tokenizer)
    return vla


def _space(cfg: TrainConfig, demos: DemoSet) -> tuple[ActionSpace | None, Stats]:
    """The space of the actions that are predicted, and the statistics of these demonstrations in it."""
    switches = [len(np.unique(column)) <= 2 for column in demos.action.T]
    space = action_space(cfg.action_space, demos.action_names, demos.proprio_names, switches)
    if space is None:
        return None, demos.stats()
    frames = np.arange(0, demos.num_frames, -(-demos.num_frames // MOST_CHUNKS))
    return space, space.stats(demos.stats(), (*demos.chunks(cfg.model.chunk_size, frames), demos.proprio[frames]))


def _check_change(cfg: TrainConfig, spaces: Sequence[ActionSpace | None], names: Sequence[str]) -> None:
    """ValueError for an action space that would leave every component as it was recorded."""
    asked = [word for word in cfg.action_space if word.rpartition("=")[2] != "recorded"]
    if asked and not any(spaces):
        raise ValueError(
            f"--action-space {asked[0]} changes nothing of {', '.join(names)}: displacements are steps already, and "
            "grippers and switches stay as recorded; leave it out, or give relative"
        )


def check_memory(config: VLAConfig, demos: Iterable[DemoSet]) -> None:
    """ValueError for a memory of more decisions than any episode has: what would fill it never comes."""
    assert config.memory is not None
    longest = max(int(np.unique(part.episode_index, return_counts=True)[1].max(initial=0)) for part in demos)
    most = max(-(-longest // (config.n_action_steps or config.chunk_size)), MemoryConfig.frames)
    if config.memory.frames > most:
        raise ValueError(
            f"a memory of {config.memory.frames} frames is more than an episode's decisions, in the longest of "
            f"{longest} frames: give --memory-frames {most} or fewer"
        )


def members_of(vla: VLA, demos: DemoSet | Mapping[str, DemoSet]) -> dict[str, tuple[Processor, DemoSet]]:
    """Each dataset, its components in the policy's order (`vla.data.fitting`), with its processor: its own of a policy
    for several robots, that of the one robot otherwise. ValueError if it does not fit, or the policy was not built for
    it."""
    if isinstance(demos, Mapping) and len(demos) == 1 and not vla.members:
        demos = next(iter(demos.values()))
    if isinstance(demos, DemoSet):
        return {ONLY: (vla.processor, aligned(vla.processor, demos)[0])}
    if not vla.members:
        return {name: (vla.processor, aligned(vla.processor, part, name=name)[0]) for name, part in demos.items()}
    for name in demos:
        if name not in vla.members:
            raise ValueError(f"this policy was not built for the dataset '{name}' but for: {', '.join(vla.members)}")
    return {name: (vla.members[name], aligned(vla.members[name], part, name=name)[0]) for name, part in demos.items()}


def reorderings(vla: VLA, demos: Mapping[str, DemoSet]) -> list[str]:
    """A line for each dataset whose components `members_of` brings into the policy's order. ValueError as there."""
    return [
        notice
        for name, part in demos.items()
        for notice in aligned(vla.members.get(name, vla.processor), part, name=name)[1]
    ]


def align_cameras(cameras: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Each dataset's cameras in the model's views: a name keeps the view it had first, others fill up; "" is black."""
    views = max(map(len, cameras))
    place: dict[str, int] = {}
    aligned = []
    for names in cameras:
        slots = [""] * views
        for name in names:
            if name in place and not slots[place[name]]:
                slots[place[name]] = name
        for name in names:
            if name not in slots:
                slots[slots.index("")] = name
        for view, name in enumerate(slots):
            if name:
                place.setdefault(name, view)
        aligned.append(tuple(slots))
    return aligned


def align_names(names: Sequence[Sequence[str]]) -> tuple[list[tuple[int, ...]], int]:
    """Each dataset's places in the union of all component names, and its width."""
    union = list(dict.fromkeys(name for part in names for name in part))
    return [tuple(union.index(name) for name in part) for part in names], len(union)


def unshared_components(demos: Mapping[str, DemoSet]) -> list[str]:
    """A line for each two datasets that look like one robot, and whose components nevertheless have other names, so
    that they are learnt as those of two."""
    found = []
    for (one, first), (other, second) in combinations(demos.items(), 2):
        parts = (("action", first.action_names, second.action_names),
                 ("observation.state", first.proprio_names, second.proprio_names))  # fmt: skip
        for what, here, there in parts:
            if set(here) == set(there) or sorted(map(_plain_name, here)) != sorted(map(_plain_name, there)):
                continue
            apart = [name for name in here if name not in there]
            same = next(name for name in there if _plain_name(name) == _plain_name(apart[0]))
            found.append(
                f"{one} and {other} name components of '{what}' differently ('{apart[0]}', '{same}'): these are learnt "
                "as those of two robots; if it is one robot, write the same names into both meta/info.json"
            )
    return found


def unlike(config: VLAConfig, demos: Mapping[str, DemoSet]) -> list[str]:
    """Lines about datasets that may not belong together as they are."""
    return [*unshared_components(demos), *unlike_rates(config, demos), *unlike_units(demos), *alike(demos)]


def unlike_units(demos: Mapping[str, DemoSet]) -> list[str]:
    """A line for each two datasets whose states have the same names and look like degrees in one, radians in the other:
    at least two components reach some 57 times as far."""
    found = []
    for (one, first), (other, second) in combinations(demos.items(), 2):
        shared = [name for name in first.proprio_names if name in second.proprio_names]
        far = [
            [np.abs(part.proprio[:, part.proprio_names.index(name)]).max() for name in shared]
            for part in (first, second)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            turns = np.abs(np.log(np.divide(*far) if shared else np.zeros(0)))
        if (np.abs(turns - np.log(180 / np.pi)) < np.log(2)).sum() >= 2:
            found.append(
                f"the states of {one} and {other} have the same names and differ some 57 times: degrees in one and "
                "radians in the other? Each keeps its own, as that of a robot of its own; one robot wants one unit"
            )
    return found


def alike(demos: Mapping[str, DemoSet]) -> list[str]:
    """A line for each two datasets that hold the same numbers."""
    return [
        f"{one} and {other} are the same recording, learnt as those of two robots: give it once (--weights draws one "
        "more often)"
        for (one, first), (other, second) in combinations(demos.items(), 2)
        if np.array_equal(first.action, second.action) and np.array_equal(first.proprio, second.proprio)
    ]


def unlike_rates(config: VLAConfig, demos: Mapping[str, DemoSet]) -> list[str]:
    """A line where datasets of a policy for several robots were recorded at different rates, so that a chunk of its
    actions lasts longer for one than for another."""
    if all(same_rate(part.fps, other.fps) for part, other in combinations(demos.values(), 2)):
        return []
    seconds = ", ".join(
        f"{config.chunk_size / part.fps:.3g} s for {name} ({part.fps:g} Hz)" for name, part in demos.items()
    )
    return [
        f"a chunk of {config.chunk_size} actions lasts {seconds}: each keeps its own rate, as that of a robot of its "
        "own; resample recordings of one robot to one rate"
    ]


def _plain_name(name: str) -> str:
    """A component's name without what tools add to it."""
    words = re.findall("[a-z]+|[0-9]+", name.lower())
    return " ".join([word for word in words if word not in _SAME] or words)


def _cameras(cfg: TrainConfig, demos: DemoSet) -> tuple[str, ...]:
    return tuple(map(camera_name, cfg.cameras)) if cfg.cameras else tuple(demos.images)


def _build_for_several(cfg: TrainConfig, demos: Mapping[str, DemoSet], backbone: nn.Module | None) -> VLA:
    parts = list(demos.values())
    for name, part in demos.items():
        for what, components in (("action", part.action_names), ("observation.state", part.proprio_names)):
            if len(set(components)) != len(components):
                raise ValueError(f"feature '{what}' of {name} names a component twice: {', '.join(components)}")
    cameras = align_cameras([_cameras(cfg, part) for part in parts])
    action_slots, action_width = align_names([part.action_names for part in parts])
    state_slots, state_width = align_names([part.proprio_names for part in parts])
    backbone = _for_views(cfg, backbone, len(cameras[0]))
    size = cfg.image_size or getattr(backbone, "image_size", IMAGE_SIZE)
    spaces, stats = zip(*(_space(cfg, part) for part in parts), strict=True)
    _check_change(cfg, spaces, parts[0].action_names)
    configs = [
        ProcessorConfig(
            cameras=cameras[i],
            proprio_dim=part.proprio.shape[1],
            action_names=part.action_names,
            image_size=size,
            max_text_tokens=_room_for_text(cfg, backbone, parts),
            text_rule="signs",
            action_low=None if spaces[i] is None else part.action_spec.low,
            action_high=None if spaces[i] is None else part.action_spec.high,
            action_space=spaces[i],
            control_hz=part.fps,
            proprio_slots=state_slots[i],
            proprio_width=state_width,
            action_slots=action_slots[i],
            action_width=action_width,
            proprio_names=part.proprio_names,
            picture_size=min(size, _sharpest(part)),
            aspects=_aspects(part, cameras[i]),
            depth=cfg.model.xyz is not None,
        )
        for i, part in enumerate(parts)
    ]
    processors = [Processor(config, known, backbone.tokenizer) for config, known in zip(configs, stats, strict=True)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        vla = VLA(cfg.model, backbone, processors[0])
    vla.members = dict(zip(demos, processors, strict=True))
    return vla


def _sharpest(demos: DemoSet) -> int:
    """Side of the largest square that fits into the pictures of the best camera, pixels."""
    return max((min(frames.shape[1:3]) for frames in demos.images.values()), default=IMAGE_SIZE)


def _aspects(demos: DemoSet, cameras: Sequence[str]) -> tuple[float, ...]:
    """Width by height of each camera's recorded pictures; 0 where that is not known."""
    return tuple(round(demos.aspects.get(camera, 0.0), 3) for camera in cameras)


def _room_for_text(cfg: TrainConfig, backbone: nn.Module, parts: Sequence[DemoSet]) -> int:
    """Tokens of the longest instruction, if that is more than the recipe has room for, as far as the backbone reads."""
    texts = [text for part in parts for text in part.instruction]
    most = getattr(backbone, "text_limit", MOST_TOKENS)
    return room_for_text(texts, backbone.tokenizer, rule="signs", least=cfg.max_text_tokens, most=most)


def _for_views(cfg: TrainConfig, backbone: nn.Module | None, views: int) -> nn.Module:
    """The given backbone, or the recipe's, built for `views` camera views."""
    from vla.backbones.hub import load as load_backbone

    return load_backbone(cfg.model.backbone, num_views=views) if backbone is None else backbone
