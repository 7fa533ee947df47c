"""Any trained policy from its folder: a checkpoint, or what `vla export` made of one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from policies.exported import ExportedPolicy, is_exported
from vla.checkpoint import read_config

if TYPE_CHECKING:
    from vla.model import VLAPolicy


def load_policy(folder: str | os.PathLike[str]) -> VLAPolicy | ExportedPolicy:
    """A policy with `action_spec`, `cameras` and `processor`. ValueError naming what is wrong with the folder."""
    if is_exported(read_config(folder)):
        return ExportedPolicy.load(folder)
    from vla.model import VLAPolicy

    return VLAPolicy.load(folder)
