"""Where a figure comes from: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from vla.core.paths import ROOT


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


def machine() -> str:
    """Processor, usable cores, memory and system in one line; a caller that used GPUs adds their names."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in fields if key.strip() == "model name"), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cpu}, {cores} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()}"
