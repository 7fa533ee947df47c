"""Folders beside the packages, found from here, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout; of a wheel the folder that it was installed into."""
SIM_CONFIGS = ROOT / "sim_configs"
"""Robots, scenes and suites: data only."""


def quoted(path: str | os.PathLike[str]) -> str:
    """The path as a shell takes it, for commands that a message tells the user to run."""
    return shlex.quote(os.fspath(path))
