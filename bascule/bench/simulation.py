"""`vla bench sim`: control steps/s of the CPU environments, and of the adapters beside their originals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bascule.bench.measuring import Row, best_rate, row

_STEPS = "control steps/s"


def _chunk_rate(num_workers: int, render: bool, worlds_per_worker: int = 16, suite: str = "tabletop-pick") -> float:
    """Control steps/s of `step_chunk` on a suite under random actions, resets included."""
    from envs import make_vec

    env = make_vec(suite, worlds_per_worker * num_workers, num_workers=num_workers)
    env.set_rendering(render)
    rng = np.random.default_rng(0)
    env.reset(seeds=range(env.num_envs))
    fresh = iter(range(1000, 1_000_000))

    def once() -> int:
        chunk = rng.uniform(-1, 1, (env.num_envs, 8, env.action_spec.dim)).astype(np.float32)
        result = env.step_chunk(chunk)
        over = np.flatnonzero(result.terminated | result.truncated)
        if len(over):
            env.reset(seeds=[next(fresh) for _ in over], env_ids=over)
        return int(result.n_steps.sum())

    try:
        once()
        return best_rate(once)
    finally:
        env.close()


def _default_rates(default: Callable[[], tuple[Any, Callable[[], int]]]) -> tuple[float, float]:
    """(control steps/s of an environment as it comes, frames it drew per step): 2 cameras of 84 px, one process.

    The frames are counted: a figure without them would not be of a rendered step.
    """
    env, frames = default()
    rng = np.random.default_rng(0)
    steps = 0

    def once() -> int:
        nonlocal steps
        env.step(rng.uniform(-1, 1, env.action_dim))
        steps += 1
        return 1

    try:
        once()
        drawn, steps = frames(), 0
        rate = best_rate(once)
        per_step = (frames() - drawn) / steps
    finally:
        env.close()
    if per_step < 1.99:
        raise RuntimeError(f"{default.__name__} drew {per_step:.2f} frames per step, not 2: its figure means nothing")
    return rate, per_step


def bench_adapters() -> list[Row]:
    """robosuite and Meta-World through our adapters, each compared with the original in the same run.

    A simulator whose extra is not installed is skipped, with a message.
    """
    from envs.adapters.metaworld_env import default_push
    from envs.adapters.robosuite_env import default_lift
    from vla.runtime.console import say

    rows = []
    for what, suite, default in (
        ("robosuite Lift", "robosuite-lift", default_lift),
        ("Meta-World push", "metaworld-push", default_push),
    ):
        try:
            base, frames = _default_rates(default)
        except ValueError as problem:
            say(f"{what} is left out: {problem}")
            continue
        ours = _chunk_rate(1, render=True, worlds_per_worker=2, suite=suite)
        defaults = f"its defaults, 84 px, {frames:.1f} frames a step"
        rows.append(row(f"{what}, every step rendered", base, _STEPS, defaults))
        rows.append(row(f"{what}, step_chunk", ours, _STEPS, _seen(suite), f"{what} as it comes", base))
    return rows


def bench() -> list[Row]:
    """The CPU environments of every tabletop suite, and the robosuite and Meta-World adapters against the originals."""
    from envs.tabletop.suites import suite_names

    rows, first = bench_adapters(), "tabletop-pick"
    for suite in (first, *(name for name in suite_names() if name != first)):
        bare = _chunk_rate(1, render=False, suite=suite)
        rows.append(row(f"physics and control only, {suite}", bare, _STEPS, "1 process, no rendering"))
        one = _chunk_rate(1, render=True, suite=suite)
        rows.append(row(f"step_chunk, {suite}", one, _STEPS, _seen(suite)))
        if suite == first:
            two = _chunk_rate(2, render=True, suite=suite)
            rows.append(row(f"step_chunk, {suite}, 2 processes", two, _STEPS, _seen(suite, 2), "1 process", one))
    return rows


def _seen(suite: str, processes: int = 1) -> str:
    return f"{suite}, 2 cameras of 84 px, chunk 8, {processes} process{'es' if processes > 1 else ''}"
