"""Facts about this machine and its processes: processor, cores, memory. No other file asks psutil for them."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import psutil

from vla.core.waiting import usable_cores


def machine() -> str:
    """Processor, usable cores, memory and system in one line; a caller that used GPUs adds their names."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # the only place where Linux names the processor
    if cpuinfo.is_file():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in fields if key.strip() == "model name"), cpu)
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {usable_cores():g} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()}"


def idle_cores(window_s: float = 0.3) -> float:
    """Cores' worth of idle time during `window_s` from now, of those that this process may use. More threads than that
    only take turns."""
    idle = 1 - psutil.cpu_percent(window_s) / 100
    return min(usable_cores(), (psutil.cpu_count() or 1) * idle)


def half_of_the_cores() -> int:
    """Threads for a policy beside a robot, which gets the other half of the cores."""
    return max(1, int(usable_cores()) // 2)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    return psutil.virtual_memory().available


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, by default of this one."""
    return psutil.Process(pid).memory_info().rss


def peak_memory_gib() -> float:
    """Largest resident size of this process plus twice that of its largest child (the kernel keeps no sum)."""
    import resource  # not on every system

    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 2**10
    return unit * (own + 2 * child) / 2**30
