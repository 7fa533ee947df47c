"""Vectorised environments by suite and backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from envs.adapters.adapter_worlds import require
from envs.adapters.libero_suites import LiberoSuite, interpreter
from envs.adapters.metaworld_suites import MetaworldSuite
from envs.adapters.so101_suites import SO101Suite
from envs.registry import load_suite, timed
from envs.sim.render_options import RenderOptions
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.language import Phrasings
from envs.tabletop.suites import AnySuite, Suite
from vla.core.config import unknown

if TYPE_CHECKING:
    from envs.backends.cpu_vec_env import MujocoVecEnv
    from envs.backends.warp_vec_env import WarpVecEnv
    from envs.perturb.perturbation import Perturbation


def check_options(phrasings: object, perturb: object) -> None:
    """ValueError for words and perturbations that no environment has, so that none is taken for another."""
    from envs.perturb.perturbation import Perturbation

    if phrasings not in get_args(Phrasings):
        raise ValueError(unknown(str(phrasings), get_args(Phrasings), "phrasings"))
    if perturb is not None and not isinstance(perturb, Perturbation):
        raise ValueError(
            f"perturb must be a Perturbation, got {perturb!r}: envs.perturb.perturbation.parse(['camera=0.5']) is one"
        )


def worlds_class(suite: Suite, perturb: Perturbation | None = None) -> Callable[..., Any]:
    """The class (or factory) of a suite's environments in one process: ours for a suite file, an adapter's for its own.

    LIBERO's live in a process of their own, the others in the caller's. ValueError naming the extra that an adapter
    needs and does not find, or saying that it knows no perturbations.
    """
    if perturb is not None and (problem := perturb.problem()):
        raise ValueError(problem)
    if problem := unperturbable(suite, perturb):
        raise ValueError(problem)
    if isinstance(suite, Suite):
        from envs.backends.cpu_worlds import TabletopWorlds

        perturbed = perturb is not None and perturb.any()
        return partial(TabletopWorlds, source=episode_source(perturb)) if perturbed else TabletopWorlds
    return _adapter_worlds(suite)


def unperturbable(suite: AnySuite, perturb: Perturbation | None, backend: str = "cpu") -> str | None:
    """Why the suite's environments on `backend` cannot differ as `perturb` says, in a sentence; None where they can."""
    if perturb is None or not perturb.any():
        return None
    if not isinstance(suite, Suite):
        return f"suite {suite.name!r} has no perturbations: they are for the tabletop suites"
    if backend == "warp" and perturb.on("shadows"):
        return "MuJoCo Warp draws no shadows: leave the axis shadows out, or take --backend cpu"
    return None


def episode_source(perturb: Perturbation | None) -> Callable[..., EpisodeSource]:
    """The factory of a tabletop suite's episodes, plain or perturbed. It can be pickled."""
    if perturb is None or not perturb.any():
        return EpisodeSource
    from envs.perturb.episode_source import PerturbedEpisodeSource

    return partial(PerturbedEpisodeSource, perturb=perturb)


def _adapter_worlds(suite: Any) -> Callable[..., Any]:
    """The class that plays an adapter's suite. ValueError naming the extra when its package is not installed."""
    if isinstance(suite, MetaworldSuite):
        require("metaworld")
        from envs.adapters.metaworld_env import MetaworldWorlds

        return MetaworldWorlds
    if isinstance(suite, LiberoSuite):
        interpreter()
        from envs.backends.remote_worlds import RemoteLibero

        return RemoteLibero
    if isinstance(suite, SO101Suite):
        from envs.adapters.so101_env import PACKAGE, SO101Worlds

        require(PACKAGE, "so101")
        return SO101Worlds
    require("robosuite")
    from envs.adapters.robosuite_env import RobosuiteWorlds

    return RobosuiteWorlds


def make_cpu_vec(
    suite: str,
    num_envs: int,
    *,
    num_workers: int,
    phrasings: Phrasings,
    render: RenderOptions,
    horizon: int | None = None,
    perturb: Perturbation | None = None,
) -> MujocoVecEnv:
    """Build the CPU backend of a suite by name."""
    from envs.backends.cpu_vec_env import MujocoVecEnv

    spec = timed(load_suite(suite), horizon)
    worlds, python = worlds_class(spec, perturb), None
    if isinstance(spec, LiberoSuite):
        from envs.adapters.libero_env import LiberoWorlds

        worlds, python = LiberoWorlds, interpreter()
    env = MujocoVecEnv(
        spec,
        worlds,
        num_envs,
        num_workers=num_workers,
        phrasings=phrasings,
        render=render,
        python=python,
    )
    return _heard(env, perturb)


def make_warp_vec(
    suite: str,
    num_envs: int,
    *,
    phrasings: Phrasings,
    render: RenderOptions,
    device: str | None = None,
    nconmax: int | None = None,
    njmax: int | None = None,
    horizon: int | None = None,
    perturb: Perturbation | None = None,
) -> WarpVecEnv:
    """Build the Warp backend of a tabletop suite by name, on the first GPU unless a device is given.

    ValueError for a suite that another package simulates.
    """
    import torch

    from envs.backends.warp_sim import Buffers
    from envs.backends.warp_vec_env import WarpVecEnv

    spec = load_suite(suite)
    if not isinstance(spec, Suite):
        raise ValueError(f"suite {suite!r} runs on the CPU backend only: its physics is another package's")
    if problem := unperturbable(spec, perturb, "warp"):
        raise ValueError(problem)
    room = {name: value for name, value in (("nconmax", nconmax), ("njmax", njmax)) if value is not None}
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    env = WarpVecEnv(
        timed(spec, horizon),
        num_envs,
        device=place,
        phrasings=phrasings,
        render=render,
        source=episode_source(perturb),
        buffers=Buffers(**room),
    )
    return _heard(env, perturb)


def _heard[Env](env: Env, perturb: Perturbation | None) -> Env:
    """The same environment. Nobody is told of words that no policy knows if it is the perturbation that draws them."""
    if perturb is not None and perturb.on("instruction"):
        from vla.core.invented import invents_words

        invents_words(env)
    return env
