"""Any trained policy from its folder: a checkpoint, or what `vla export` made of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.exported import ExportedPolicy, is_exported
from vla.checkpoint import read_config
from vla.compatibility import choose_embodiment
from vla.types import ActionChunk, Observation

if TYPE_CHECKING:
    from policies.rtc import RealTimePolicy
    from vla.model import VLAPolicy


def embodiment(folder: str | os.PathLike[str], wanted: str | None = None) -> str | None:
    """Which embodiment of the policy in a folder to control (`vla.compatibility.choose_embodiment`). ValueError where
    a policy for several robots needs a choice, or has no such embodiment."""
    config = read_config(folder)
    return choose_embodiment(tuple(config.get("members") or ()), wanted, os.fspath(folder))


def load_policy(folder: str | os.PathLike[str], member: str | None = None) -> VLAPolicy | ExportedPolicy:
    """A policy with `action_spec`, `cameras` and `processor`. ValueError naming what is wrong with the folder.

    `member`: of a policy for several robots, the embodiment to control; it must be chosen.
    """
    member = embodiment(folder, member)
    if is_exported(read_config(folder)):
        return ExportedPolicy.load(folder)
    from vla.model import VLA, VLAPolicy

    return VLAPolicy(VLA.load(folder, member=member))


def load_whole(folder: str | os.PathLike[str], member: str | None = None) -> RealTimePolicy | WholeChunks:
    """The same, giving all of each chunk: for who waits for the next one (a controller) or passes them on (a server).
    Its `n_action_steps` says how many of the `chunk_size` actions are meant to be played."""
    policy = load_policy(folder, member)
    if isinstance(policy, ExportedPolicy):
        return WholeChunks(policy)
    from policies.rtc import RealTimePolicy

    return RealTimePolicy(policy.vla)


class WholeChunks:
    """An exported policy whose `act` leaves nothing of a chunk away. Its graph cannot be told what is still to be
    played, as `policies.rtc.RealTimePolicy` can."""

    def __init__(self, policy: ExportedPolicy) -> None:
        self._policy = policy
        self.action_spec, self.cameras, self.processor = policy.action_spec, policy.cameras, policy.processor
        self.n_action_steps, self.chunk_size = policy.n_action_steps, policy.config.chunk_size

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation) -> ActionChunk:
        """(B, chunk_size, A) in environment units."""
        return self._policy.act_whole(obs)
