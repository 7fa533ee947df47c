"""Policies by name: a checkpoint, an export, a scripted expert, or a control that must fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla.core.types import Policy, VecEnv
    from vla.processing.cameras.camera_map import CameraMap


AGENTS = ("expert", "zero", "random", "blind")
"""Accepted by `vla eval` in place of a checkpoint."""


def resolve_policy(
    name: str, env: VecEnv | None, suite: str, embodiment: str | None = None, cameras: CameraMap | None = None
) -> Policy:
    """The policy called `expert`, `zero`, `random` or `blind` in `env`, or that in a checkpoint's folder, which needs
    no `env` and looks through these `cameras`. ValueError for neither."""
    if name not in AGENTS:
        from policies.load import checkpoint, load_policy
        from vla.processing.cameras.camera_map import CameraMap

        return load_policy(checkpoint(name, AGENTS), embodiment, cameras or CameraMap())
    assert env is not None, "an agent is made for an environment"
    from envs.evaluation.baselines import RandomPolicy, ZeroPolicy, blind_replay
    from envs.experts.registry import make_expert

    makers: dict[str, Callable[[], Policy]] = {
        "expert": lambda: make_expert(suite, env.num_envs),
        "zero": lambda: ZeroPolicy(env.action_spec),
        "random": lambda: RandomPolicy(env.action_spec),
        "blind": lambda: blind_replay(suite, env),
    }
    return makers[name]()
