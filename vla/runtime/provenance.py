"""Where a figure comes from: commit, machine, versions."""

from __future__ import annotations

import subprocess

from vla.core.paths import ROOT
from vla.runtime.machine import machine


def provenance() -> dict[str, str]:
    """{"commit", "machine"}: what ran, on what. "+changes" marks a work tree that differs from its commit."""
    root = ROOT

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # Installed from a wheel, the folder above may lie in somebody else's repository: only our own counts.
        commit = git("rev-parse", "--short=12", "HEAD") if (root / "run").is_file() else ""
        if commit and git("status", "--porcelain", "--untracked-files=no"):
            commit += "+changes"
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"commit": commit or "unknown", "machine": machine()}
