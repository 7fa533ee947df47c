"""MuJoCo environments. No model code here: anything that acts comes in through `vla.core.types.Policy`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from envs.sim.render_options import RenderOptions
from vla.core.types import IMAGE_SIZE
from vla.core.waiting import limit_spinning
from vla.runtime.rendering_backend import choose

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from envs.tabletop.language import Phrasings
    from vla.core.types import VecEnv

limit_spinning()  # before the caller loads torch
choose()  # before anything imports mujoco


def make_vec(
    suite: str,
    num_envs: int,
    *,
    num_workers: int = 2,
    backend: Literal["cpu", "warp"] = "cpu",
    device: str | None = None,
    image_size: int = IMAGE_SIZE,
    phrasings: Phrasings = "train",
    depth: bool = False,
    calibration: bool = False,
    history: int = 0,
    horizon: int | None = None,
    perturb: Perturbation | None = None,
    nconmax: int | None = None,
    njmax: int | None = None,
) -> VecEnv:
    """`num_envs` environments of a suite (see `vla list suites`), stepped together.

    `image_size`: height and width of the images in pixels; `envs.sim.render_options.drawn_for(policy)` is what a
    policy reads. `depth` (metres), `calibration` (intrinsics and extrinsics) and `history` (frames of so many decisions
    before) fill the optional fields of `vla.core.types.Observation`. `perturb`: how episodes differ from plain ones.
    `horizon`: control steps of an episode, instead of the suite's own (to learn in; figures are told of the suite's).
    `backend="warp"` runs all worlds on one `device` (the first GPU, else Warp's CPU device) instead of in
    `num_workers` processes, with room for `nconmax` contacts and `njmax` constraint rows per world. ValueError with
    the nearest name for an unknown suite or backend, and for an extra that is not installed.
    """
    from envs.make import check_options
    from vla.core.config import lookup

    lookup(backend, dict.fromkeys(("cpu", "warp")), "backend")
    check_options(phrasings, perturb)
    render = RenderOptions(image_size, depth=depth, calibration=calibration, history=history)
    device = None if device == "auto" else device
    if backend == "warp":
        if find_spec("mujoco_warp") is None:
            raise ValueError("backend 'warp' needs MuJoCo Warp: `./run setup warp`")
        from envs.make import make_warp_vec

        return make_warp_vec(
            suite, num_envs, device=device, nconmax=nconmax, njmax=njmax, phrasings=phrasings, render=render,
            horizon=horizon, perturb=perturb,
        )  # fmt: skip
    for name, value in (("device", device), ("nconmax", nconmax), ("njmax", njmax)):
        if value is not None:
            raise ValueError(f"{name} {value!r} is for backend 'warp'; the CPU backend takes num_workers")
    from envs.make import make_cpu_vec

    return make_cpu_vec(
        suite, num_envs, num_workers=num_workers, phrasings=phrasings, render=render, horizon=horizon, perturb=perturb
    )
