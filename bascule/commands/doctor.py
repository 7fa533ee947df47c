"""`vla doctor`: checks of this machine, with the remedy for each that fails."""

from __future__ import annotations

import json as json_module
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bascule.commands.base import Command, check_numbers
from vla.core.paths import quoted

DISTRIBUTION, PLUGIN = "bascule", "lerobot_policy_bascule"
NEEDED_DISK_GB, NEEDED_MEMORY_GB = 2.0, 2.0
SLOW_LOOPBACK_MS = 20.0


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    """The remedy when the check failed."""
    needed: bool = True
    """True if the basic commands do not work without it; otherwise a failure is a warning."""


def python() -> Check:
    """Check that this is Python 3.12."""
    found = platform.python_version()
    good = sys.version_info[:2] == (3, 12)
    return Check("python", good, found, "" if good else "this project needs Python 3.12: ./run setup installs it")


def versions() -> Check:
    """Check installed packages against the distribution's requirements; extras only where they are installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return Check("versions", False, f"{DISTRIBUTION} is not installed", "run ./run setup")
    wrong, count = [], 0
    for requirement in wanted:
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if not extra and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                wrong.append(f"{requirement.name} is missing")
            continue
        count += 1
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        return Check("versions", False, "; ".join(wrong), "run ./run setup: it installs the set that fits together")
    return Check("versions", True, f"{count} packages as required")


def gpu() -> Check:
    """Check that torch can use a GPU if there is one; not needed."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        return Check("gpu", True, found, needed=False)
    if torch.backends.mps.is_available():
        return Check("gpu", True, "an Apple GPU, used with --device mps (auto means the CPU)", needed=False)
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", True, "none: everything runs on the CPU", needed=False)
    advice = "the driver is older than this torch's CUDA, or hidden by CUDA_VISIBLE_DEVICES: see `nvidia-smi`"
    return Check("gpu", False, f"there is a driver, but torch {torch.__version__} cannot use it", advice, needed=False)


def rendering() -> Check:
    """Check that MuJoCo can render with the selected backend."""
    from vla.runtime import rendering_backend

    try:
        rendering_backend.check(probe=True)
    except ValueError as error:
        found, _, advice = str(error).removesuffix("; `vla doctor` checks it").partition("; ")
        return Check("rendering", False, found, advice)
    return Check("rendering", True, f"MUJOCO_GL={rendering_backend.name()}")


def plugin() -> Check:
    """Check that the LeRobot plugin is installed: LeRobot only imports distributions named lerobot_policy_*."""
    from importlib.metadata import distributions
    from importlib.util import find_spec

    names = {distribution.metadata["Name"] for distribution in distributions()}
    if PLUGIN in names and find_spec(PLUGIN) is not None:
        return Check("lerobot plugin", True, PLUGIN)
    if PLUGIN.replace("_", "-") in names:
        found, advice = "installed under a name with hyphens, which LeRobot ignores", "install it from plugins/ again"
    else:
        found, advice = "not installed", "lerobot-train --policy.type=bascule needs it: ./run setup installs it"
    return Check("lerobot plugin", False, found, advice, needed=False)


def compiler() -> Check:
    """Check for a C++ compiler, which only AOTInductor exports need."""
    from policies.export.aot_inductor import compiler

    found = compiler()
    if found is not None:
        return Check("compiler", True, found, needed=False)
    advice = "only `vla export --format aoti` needs one: install g++, or name another in CXX"
    return Check("compiler", False, "no C++ compiler", advice, needed=False)


def disk() -> Check:
    """Check the free disk space of the working directory in GiB."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    advice = "" if free >= NEEDED_DISK_GB else f"a run needs about {NEEDED_DISK_GB:g} GiB: delete old folders in runs/"
    return Check("disk", free >= NEEDED_DISK_GB, f"{free:.1f} GiB free here", advice)


def memory() -> Check:
    """Check the available memory in GiB."""
    from vla.runtime.machine import free_memory

    free = free_memory() / 2**30
    good = free >= NEEDED_MEMORY_GB
    advice = "" if good else "close programs; fewer environments (--num-envs) and `vla train --stream True` need less"
    return Check("memory", good, f"{free:.1f} GiB available", advice)


def loopback() -> Check:
    """Time a round trip through the policy server and client: two 224 x 224 images, without a policy."""
    import time

    import numpy as np

    from policies.serving.client import PolicyClient
    from policies.serving.server import PolicyServer, serve_in_thread
    from vla.core.types import ActionSpec, Observation, PolicySpec

    class Still:
        spec = PolicySpec(ActionSpec(("x",), (-1.0,), (1.0,), 20.0), cameras=("front", "wrist"), proprio_dim=1)

        def reset(self, env_ids: object = None) -> None: ...

        def act(self, obs: Observation) -> np.ndarray:
            return np.zeros((obs.batch_size, 8, 1), np.float32)

    picture = np.zeros((1, 224, 224, 3), np.uint8)
    obs = Observation({"front": picture, "wrist": picture}, np.zeros((1, 1), np.float32), ["wait"])
    advice = "a proxy or firewall that watches 127.0.0.1 slows `vla serve` down; so does a machine that is busy"
    times = []
    try:
        server = PolicyServer(Still(), port=0)
        with serve_in_thread(server):
            client = PolicyClient(server.uri)
            try:
                for _ in range(30):
                    start = time.perf_counter()
                    client.act(obs)
                    times.append(1e3 * (time.perf_counter() - start))
            finally:
                client.close()
    except OSError as error:
        return Check("loopback", False, f"{type(error).__name__}: {error}", advice, needed=False)
    p50, p99 = np.percentile(times[5:], [50, 99])  # the first ones are always slow
    good = bool(p50 <= SLOW_LOOPBACK_MS)
    return Check("loopback", good, f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", "" if good else advice, needed=False)


def recordings(folders: Sequence[Path]) -> list[Check]:
    """Read each dataset lazily as `vla train` would. Returns one check per dataset and one per warning."""
    from vla.checking.check import training_warnings
    from vla.data.lerobot_dataset import load_dataset

    found = []
    for folder in folders:
        try:
            demos = load_dataset(folder, lazy=True)
        except (ValueError, OSError) as problem:
            found.append(Check("dataset", False, str(problem), "`vla train` cannot read this folder as it is"))
            continue
        found.append(Check("dataset", True, demos.summary(str(folder))[0]))
        advice = f"`vla check {quoted(folder)}` shows more; `vla train` warns too, and continues"
        found += [
            Check("dataset", False, f"{folder}: {line}", advice, needed=False)
            for line in training_warnings(folder, demos)
        ]
    return found


def resets(count: int) -> list[Check]:
    """Reset every tabletop suite `count` times with random seeds and check the scenes."""
    from envs.evaluation.reset_checks import check_resets
    from envs.tabletop.suites import suite_names

    advice = "scenes of this suite are broken: `pytest tests/envs/tabletop/test_tabletop_suites.py` says more"
    found = []
    for suite, seen in check_resets(suite_names(), count).items() if count else ():
        words = f"{suite}: {seen.resets} resets, {seen.exceptions} exceptions {seen.first_error}".rstrip()
        words += f", {seen.not_finite} not finite, {seen.below_table} below the table, {seen.shifted} shifted"
        found.append(Check("resets", seen.sound, words, "" if seen.sound else advice))
    return found


CHECKS: tuple[Callable[[], Check], ...] = (python, versions, gpu, rendering, plugin, compiler, disk, memory, loopback)


@dataclass(frozen=True)
class Doctor(Command):
    """Check that this machine can run everything, and name the remedy where it cannot."""

    json: bool = False
    """Print the findings as JSON. Either way the exit code is 1 when something needed is broken."""
    dataset: tuple[Path, ...] = ()
    """Also check these folders of demonstrations: that they can be read, and for values that look like mistakes."""

    resets: int = 0
    """Also reset every tabletop suite this many times and check the scenes."""

    def run(self) -> int:
        """Run all checks and print them. Exit code 1 when something needed is broken."""
        check_numbers(self, resets=(0, 10**9))
        found = [_examine(check) for check in CHECKS] + recordings(self.dataset) + resets(self.resets)
        if self.json:
            print(json_module.dumps({"checks": [asdict(check) for check in found]}, indent=2))
        else:
            width = max(len(check.name) for check in found)
            for check in found:
                mark = "ok" if check.ok else ("BROKEN" if check.needed else "warning")
                print(f"{mark:<8}{check.name:<{width}}  {check.found}")
                if not check.ok:
                    print(f"{'':<8}{'':<{width}}  -> {check.advice}")
        return 1 if any(check.needed and not check.ok for check in found) else 0


def _examine(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a check that raises is a finding too
        return Check(check.__name__, False, f"{type(error).__name__}: {error}", "run ./run setup again")
