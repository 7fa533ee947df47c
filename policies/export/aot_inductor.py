"""AOTInductor packages: a policy's graph as machine code for one kind of processor, run by torch.

The code is compiled where the policy is exported, so that needs a C++ compiler; running it needs none. A package is a
program: load it from where you would load one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PACKAGE = "model.pt2"  # torch insists on the ending


def compiler() -> str | None:
    """The C++ compiler that torch would call; None where there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def need_compiler() -> None:
    """Raise ValueError without a C++ compiler, saying how to get one."""
    if compiler() is None:
        raise ValueError(
            "AOTInductor needs a C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++), name one in the "
            "environment variable CXX, or use --format onnx"
        )


def processor() -> str:
    """The CPU capability that torch compiles for on this machine, e.g. "AVX512"."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def compile_package(program: ExportedProgram) -> bytes:
    """The program as a package. ValueError without a compiler, or where it or torch fails."""
    need_compiler()
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, _PACKAGE))
        try:
            aoti_compile_and_package(program, package_path=path)
        except Exception as problem:  # of many kinds, with the compiler's whole output
            reason = " ".join(str(problem).split())[:1000]
            raise ValueError(
                f"AOTInductor could not compile this policy ({type(problem).__name__}): {reason}"
            ) from problem
        return Path(path).read_bytes()


def load_package(data: bytes, *, made_for: str | None) -> Callable[..., Any]:
    """The package as a function of tensors. ValueError if it was `made_for` another kind of processor: running it here
    would end the process."""
    if made_for != (here := processor()):
        raise ValueError(f"this policy was compiled for {made_for}, and this processor has {here}: export it here")
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, _PACKAGE)
        path.write_bytes(data)
        return aoti_load_package(str(path))
