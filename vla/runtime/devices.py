"""The device that a command line names: checked before anything heavy is loaded, in one place for all commands."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vla.core.config import likely, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
_WITHOUT_FLOAT64 = ("mps",)
_ALIASES = {"gpu": "cuda", "nvidia": "cuda", "none": "cpu"}


def check_device(name: str | None, *, flag: str = "--device") -> None:
    """ValueError, in one line, for a device that torch does not know or that this machine has not. None: any.

    torch is loaded only where the machine could have the device.
    """
    if name is None or name in ("auto", "cpu"):
        return
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and not re.fullmatch(r"\d+", number)) or (":" in name and kind != "cuda"):
        guess = _ALIASES.get(name.lower()) or nearest(kind, DEVICES)
        known = "known: auto, cpu, cuda, cuda:1 and so on, mps"
        raise ValueError(f"unknown device '{name}'; {likely(guess, known)}")
    remedy = f"{flag} cpu runs without one"
    if kind == "cuda" and sys.platform == "linux" and not _has_driver():
        raise ValueError(f"{flag} {name}: this machine has no GPU driver; {remedy}")
    if kind == "mps" and sys.platform != "darwin":
        raise ValueError(f"{flag} {name}: Apple GPUs are in Apple's machines; {remedy}")
    import torch

    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"{flag} {name}: torch sees no Apple GPU; {remedy}")
        return
    if not torch.cuda.is_available():
        raise ValueError(f"{flag} {name}: torch sees no GPU (a build without CUDA, or no driver); {remedy}")
    count = torch.cuda.device_count()
    if number and int(number) >= count:
        raise ValueError(f"{flag} {name}: this machine has {count} GPU(s), numbered from 0")


def choose_device(name: str) -> str:
    """Torch's name of the device: "auto" is the first GPU, else the CPU. ValueError as in `check_device`."""
    check_device(name)
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_float64(device: torch.device) -> bool:
    """True if the device computes in float64; Apple's GPUs do not."""
    return device.type not in _WITHOUT_FLOAT64


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on its own device; in main memory where the device has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def bfloat16_is_fast(device: torch.device) -> bool:
    """True if the device is expected to multiply matrices in bfloat16 faster than in float32.

    An x86 processor does with AMX alone: without it bfloat16 reached 90 to 110 GFLOP/s on a Xeon where float32 reached
    150 to 200 (docs/research-log.md).
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return _has_amx()


@cache
def _has_amx() -> bool:
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _has_driver() -> bool:
    """True if the driver library of CUDA (or the device file of ROCm) exists on this machine."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
