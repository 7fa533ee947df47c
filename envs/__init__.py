"""MuJoCo worlds. No model code here: anything that acts comes in through `vla.types.Policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from envs.language import Phrasings
    from vla.types import VecEnv


def make_vec(
    suite: str,
    num_envs: int,
    *,
    num_workers: int = 2,
    backend: Literal["cpu"] = "cpu",
    image_size: int = 84,
    phrasings: Phrasings = "train",
) -> VecEnv:
    """`num_envs` worlds of a suite (see `vla list suites`), stepped together.

    ValueError with the nearest name for an unknown suite or backend.
    """
    if backend != "cpu":
        raise ValueError(f"unknown backend {backend!r}; known: cpu")
    from envs.mujoco_env import make_cpu_vec

    return make_cpu_vec(suite, num_envs, num_workers=num_workers, image_size=image_size, phrasings=phrasings)
