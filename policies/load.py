"""Any trained policy from its folder: a checkpoint, what `vla export` made of one, or a policy that LeRobot trained."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from policies.export.exported_policy import ExportedPolicy, is_exported
from policies.export.heatmap_policy import ExportedHeatmapPolicy
from vla.core.checkpoint import in_lerobot_format, read_config
from vla.core.compatibility import choose_embodiment
from vla.core.config import load_json, nearest, unknown
from vla.core.paths import quoted
from vla.core.types import Policy
from vla.processing.cameras.camera_map import CameraMap


class _Loaded(Policy, Protocol):
    """A policy from a folder, which can be told through which cameras to look."""

    def look_through(self, cameras: CameraMap) -> None:
        """Read these cameras from now on."""


def chosen_embodiment(folder: str | os.PathLike[str], wanted: str | None = None) -> str | None:
    """Which embodiment of the policy in a folder to control (`vla.core.compatibility.choose_embodiment`). ValueError
    where a policy for several robots needs a choice, or has no such embodiment."""
    config = {} if in_lerobot_format(folder) else read_config(folder)
    return choose_embodiment(tuple(config.get("members") or ()), wanted, os.fspath(folder))


def picture_size(folder: str | os.PathLike[str], embodiment: str | None = None) -> int | None:
    """Side in pixels of the pictures that the policy in a folder asks for; None where it does not say. Reads no
    weights."""
    config = read_config(folder)
    one = config if embodiment is None else config["members"][embodiment]
    return one.get("processor", {}).get("picture_size")


def reads_depth(folder: str | os.PathLike[str]) -> bool:
    """True if the policy in a folder reads depth and calibration. Reads no weights."""
    return bool(read_config(folder).get("processor", {}).get("depth"))


def backbone_named(folder: str | os.PathLike[str]) -> str:
    """Name, or folder, of the backbone that the policy in a folder was trained on; "" where it does not say. Reads no
    weights."""
    if in_lerobot_format(folder):
        return ""
    backbone = read_config(folder).get("model", {}).get("backbone", "")
    return str(backbone.get("name", "") if isinstance(backbone, dict) else backbone)


def load_policy(
    folder: str | os.PathLike[str], embodiment: str | None = None, cameras: CameraMap = CameraMap()
) -> Policy:
    """The policy in a folder. ValueError naming what is wrong with the folder, or with the `cameras` it is to look
    through.

    `embodiment`: of a policy for several robots, the one to control; it must be chosen.
    """
    policy = _read(folder, chosen_embodiment(folder, embodiment))
    if cameras:
        policy.look_through(cameras)
    return policy


def _read(folder: str | os.PathLike[str], embodiment: str | None) -> _Loaded:
    if in_lerobot_format(folder):
        from policies.lerobot_policy import LeRobotPolicy

        return LeRobotPolicy.load(folder)
    config = read_config(folder)
    if is_exported(config):
        return ExportedHeatmapPolicy.load(folder) if "heatmap" in config else ExportedPolicy.load(folder)
    if "heatmap" in config:
        from vla.model.heatmap.policy import HeatmapPolicy

        return HeatmapPolicy.load(folder)
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    return VLAPolicy(VLA.load(folder, member=embodiment))


def of_single_observations(policy: Policy, whence: str) -> Policy:
    """The policy, where whoever asks it shows single observations; `whence` they come, in the message. ValueError for
    one that reads several consecutive control steps."""
    if (count := policy.spec.observations) > 1:
        raise ValueError(
            f"this policy reads the observations of {count} consecutive control steps, and {whence} come one by one: "
            "train it with --policy.n_obs_steps=1; `vla eval` plays it as it is"
        )
    return policy


def local_policy(folder: Path, embodiment: str | None = None, cameras: CameraMap = CameraMap()) -> Policy:
    """The policy in a checkpoint, on half of the machine's cores."""
    from vla.runtime.machine import half_of_the_cores

    policy = of_single_observations(load_policy(folder, embodiment, cameras), "a robot's observations")
    if not isinstance(policy, ExportedPolicy):  # it sees to its threads itself, and may need no torch
        import torch

        torch.set_num_threads(half_of_the_cores())
    return policy


def checkpoint(path: str | Path, others: Iterable[str] = ()) -> Path:
    """`path`, if it is a checkpoint folder; else ValueError naming the nearest one. `others`: other right answers."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        _refuse_others(folder)
        return folder
    if (folder / "meta" / "info.json").is_file():
        raise ValueError(
            f"{path} is a data set, not a checkpoint: `vla train --dataset {quoted(path)}` makes a policy of it"
        )
    if (folder / "bascule.json").is_file():
        raise ValueError(f"{path} is a backbone, not a policy: `vla train --backbone {quoted(path)}` makes one on it")
    if folder.is_file():
        raise ValueError(f"{path} is a file; a checkpoint is the folder with config.json in it")
    if (trained := folder / "checkpoints" / "last" / "pretrained_model").is_dir():
        raise ValueError(f"{path} is the folder of a run of LeRobot: its policy is {trained}")
    roots = {Path("runs"), folder.parent, folder} - {Path(".")}
    depths = ("*", "*/*", "*/*/*")
    found = {str(file.parent) for root in roots for depth in depths for file in root.glob(f"{depth}/config.json")}
    if str(folder / "best") in found:  # of a run of RL; `last` is where it would go on
        raise ValueError(f"{path} is the folder of a run: its policy is {folder / 'best'}")
    if folder.is_dir():
        guess = nearest(str(path), found)
        hint = f"; did you mean '{guess}'?" if guess else ""
        raise ValueError(f"{path} is a folder without config.json, no checkpoint{hint}")
    gone = " (the link leads nowhere)" if folder.is_symlink() else ""
    if not found and not others:
        raise ValueError(f"there is no checkpoint at '{path}'{gone}; `vla train` makes one")
    known = unknown(str(path), {*found, *others}, "checkpoint").removeprefix(f"unknown checkpoint '{path}'")
    raise ValueError(f"there is no checkpoint '{path}'{gone}{known}")


def _refuse_others(folder: Path) -> None:
    """Raise ValueError for a folder that holds a policy in LeRobot's format."""
    config = load_json(folder / "config.json")
    if isinstance(config, dict) and "checkpoint" not in config and config.get("type") == "bascule":
        raise ValueError(
            f"{folder} is a policy in LeRobot's format: `vla lerobot {quoted(folder)} OUT` makes a checkpoint"
        )
