"""Suites by name, ours and the adapters'."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from envs.tabletop.suites import AnySuite, read_suite, suite_names
from vla.core.config import lookup
from vla.core.paths import SIM_CONFIGS


def adapter_suites() -> Mapping[str, AnySuite]:
    """Every adapter's suites by name, whether its extra is installed or not."""
    from envs.adapters.libero_suites import libero_suites
    from envs.adapters.metaworld_suites import metaworld_suites
    from envs.adapters.robosuite_suites import SUITES
    from envs.adapters.so101_suites import SUITES as SO101

    return {**SUITES, **metaworld_suites(), **libero_suites(), **SO101}


def all_suite_names() -> tuple[str, ...]:
    """The suite files' names, then those of the adapters (robosuite, Meta-World, LIBERO), installed or not."""
    return (*suite_names(), *adapter_suites())


def load_suite(name: str) -> AnySuite:
    """The suite called `name` (an adapter's has the same name, description, tasks, horizon and eval_seed0), or in the
    TOML file at the path `name`.

    ValueError with the nearest name if there is none.
    """
    if name.endswith(".toml"):
        return read_suite(Path(name))
    if name in adapter_suites():
        return adapter_suites()[name]
    lookup(name, dict.fromkeys(all_suite_names()), "suite")
    return read_suite(SIM_CONFIGS / "suites" / f"{name}.toml")


def timed[S: AnySuite](suite: S, horizon: int | None) -> S:
    """The suite with episodes of `horizon` control steps (None: its own). ValueError if that is none, or more."""
    if horizon is not None and not (1 <= horizon <= suite.horizon and horizon == int(horizon)):
        raise ValueError(f"horizon must be from 1 to the {suite.horizon} steps of suite {suite.name!r}, got {horizon}")
    return suite if horizon is None else replace(suite, horizon=horizon)  # type: ignore[type-var]  # every suite is a dataclass


def scenes_digest(suite: str) -> str | None:
    """Tells the scenes of a suite file from those that it described before it was edited; None for the package's own
    suites. Its first evaluation seed and horizon are left out: results tell both."""
    if not suite.endswith(".toml"):
        return None
    described = replace(load_suite(suite), name="", description="", horizon=0, eval_seed0=0)  # type: ignore[type-var]
    return hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()
