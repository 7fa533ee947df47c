"""The scripted expert of a suite."""

from __future__ import annotations

from envs.experts.pick_place import TabletopExpert
from envs.registry import load_suite
from envs.tabletop.scene import SCENES
from vla.core.types import Policy


def make_expert(suite: str, num_envs: int) -> Policy:
    """The scripted expert of a suite, tabletop or adapter. ValueError where there is none."""
    if suite.startswith("robosuite-"):
        from envs.experts.robosuite import RobosuiteExpert

        return RobosuiteExpert(suite, num_envs)
    if suite.startswith("metaworld-"):
        from envs.experts.metaworld import MetaworldExpert

        return MetaworldExpert()
    if suite.startswith("so101-"):
        from envs.experts.so101 import SO101Expert

        return SO101Expert(num_envs)
    if suite.startswith("libero-"):
        from envs.experts.libero import LiberoExpert

        return LiberoExpert(num_envs)
    if SCENES[load_suite(suite).scene].fixtures:
        from envs.experts.goals import GoalExpert

        return GoalExpert(num_envs)
    return TabletopExpert(num_envs)
