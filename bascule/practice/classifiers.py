"""From folders of success classifiers to who rewards an agent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rl.offline.judges import ClassifierJudge, Judge, PictureJudge
from rl.offline.practice import PracticeEnv
from rl.rewards.success_classifier import SuccessClassifier
from vla.core.checkpoint import read_config
from vla.core.types import Observation

if TYPE_CHECKING:
    from policies.lerobot.reward_classifier import LeRobotClassifier


def judge_of(folders: Sequence[Path], backbone: str, cameras: Sequence[str]) -> Callable[[PracticeEnv], Judge]:
    """The judge by these classifiers, for environments: one of ours, from an earlier run, which reads the features of
    `backbone`, or two of LeRobot's, one for the task and one for its undo, which read some of `cameras`. ValueError for
    others."""
    from policies.lerobot.reward_classifier import is_reward_classifier, load_reward_classifier

    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ValueError(f"--classifier {folder} is not a folder of a classifier: it has no config.json")
    theirs = [is_reward_classifier(folder) for folder in folders]
    if not any(theirs):
        if len(folders) != 1:
            raise ValueError(
                "--classifier takes one classifier of ours, which reads the instruction, or two of LeRobot's"
            )
        return _ours(folders[0], backbone)
    if not all(theirs) or len(folders) != 2:
        raise ValueError(
            "a classifier of LeRobot's reads no instruction: give --classifier two of them, that of the task and that "
            "of its undo"
        )
    forward, undo = (load_reward_classifier(folder) for folder in folders)
    for one, folder in ((forward, folders[0]), (undo, folders[1])):
        if lacking := [camera for camera in one.cameras if camera not in cameras]:
            raise ValueError(f"{folder} reads camera '{lacking[0]}', there are {', '.join(cameras)}")
    return lambda env: PictureJudge(env.num_envs, _by_task(env, forward, undo))


def told_apart(folders: Sequence[Path]) -> str | None:
    """Tells these classifiers from others; None for none."""
    digests = [hashlib.blake2b((folder / "model.safetensors").read_bytes(), digest_size=8) for folder in folders]
    return " ".join(digest.hexdigest() for digest in digests) or None


def _ours(folder: Path, backbone: str) -> Callable[[PracticeEnv], Judge]:
    classifier = SuccessClassifier.load(folder)
    if (learnt := read_config(folder)["backbone"]) != backbone:
        raise ValueError(f"{folder} reads the features of the backbone {learnt!r}, this policy's is {backbone!r}")
    return lambda env: ClassifierJudge(env.num_envs, classifier)


def _by_task(
    env: PracticeEnv, forward: LeRobotClassifier, undo: LeRobotClassifier
) -> Callable[[Observation], np.ndarray]:
    return lambda obs: np.where(env.forward, forward(obs), undo(obs))
