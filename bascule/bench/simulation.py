"""`vla bench NAME`: speed, as rows {"name", "value", "unit", "baseline", "ratio", "config"}. Ratios are of one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

Row = dict[str, Any]
_STEPS = "control steps/s"
_SECONDS = 4.0
"""Each measurement lasts at least this long; the best of three is kept, since others may use the machine."""


def _row(
    name: str, value: float, unit: str, *, config: str = "", baseline: str | None = None, base: float = 0.0
) -> Row:
    ratio = None if baseline is None else value / base
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "config": config}


def _best_rate(once: Callable[[], int]) -> float:
    """Best of three rates of a function that returns how many units it did."""
    rates = []
    for _ in range(3):
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < _SECONDS / 3:
            done += once()
        rates.append(done / (time.perf_counter() - begin))
    return max(rates)


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
        return _best_rate(once)
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
        rate = _best_rate(once)
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
        rows.append(_row(f"{what}, every step rendered", base, _STEPS, config=defaults))
        rows.append(
            _row(f"{what}, step_chunk", ours, _STEPS, config=_seen(suite), baseline=f"{what} as it comes", base=base)
        )
    return rows


def bench_sim() -> list[Row]:
    """The CPU environments of every tabletop suite, and the robosuite and Meta-World adapters against the originals."""
    from envs.tabletop.suites import suite_names

    rows, first = bench_adapters(), "tabletop-pick"
    for suite in (first, *(name for name in suite_names() if name != first)):
        bare = _chunk_rate(1, render=False, suite=suite)
        rows.append(_row(f"physics and control only, {suite}", bare, _STEPS, config="1 process, no rendering"))
        one = _chunk_rate(1, render=True, suite=suite)
        rows.append(_row(f"step_chunk, {suite}", one, _STEPS, config=_seen(suite)))
        if suite == first:
            two = _chunk_rate(2, render=True, suite=suite)
            config = _seen(suite, 2)
            rows.append(
                _row(f"step_chunk, {suite}, 2 processes", two, _STEPS, config=config, baseline="1 process", base=one)
            )
    return rows


def _seen(suite: str, processes: int = 1) -> str:
    return f"{suite}, 2 cameras of 84 px, chunk 8, {processes} process{'es' if processes > 1 else ''}"


def tiny_policy() -> Any:
    """A policy of the default size with random weights, for timing only."""
    from envs.tabletop.control import action_spec
    from vla.model.config import VLAConfig
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy
    from vla.processing.processor import Stats

    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(64, 8)), rng.uniform(-1, 1, (64, 4)))
    return VLAPolicy(
        VLA.build(VLAConfig(), stats=stats, action_spec=action_spec(20.0), cameras=("front", "wrist")).eval()
    )


def _observation(batch: int) -> Any:
    from vla.core.types import Observation

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, 84, 84, 3), dtype=np.uint8)
    return Observation(
        {"front": image, "wrist": image},
        rng.normal(size=(batch, 8)).astype(np.float32),
        ["pick up the red cube"] * batch,
    )


def bench_model() -> list[Row]:
    """The default policy on this machine's CPU: decisions/s at batch 1 and 24 (a decision is a chunk of 8 actions); one
    decision against a naive call; and the bridge against the released Pro block at the released size. About two
    minutes."""
    import torch

    torch.set_num_threads(1)
    policy = tiny_policy()
    rates = {}
    for batch in (1, 24):
        obs = _observation(batch)

        def once(obs: Any = obs, batch: int = batch) -> int:
            policy.act(obs)
            return batch

        once()
        rates[batch] = _best_rate(once)
    config = "embedded backbone, 2 cameras of 84 px, fp32, 1 thread"
    import tempfile

    from bascule.bench.model_cpu import call_rows, head_rows
    from policies.export.aot_inductor import compiler
    from policies.export.exported_policy import ExportedPolicy
    from policies.export.exporter import export

    with tempfile.TemporaryDirectory() as folder:
        policy.vla.save(f"{folder}/checkpoint")
        exported = {}
        for name, format in {"ONNX": "onnx", **({"AOTInductor": "aoti"} if compiler() else {})}.items():
            export(f"{folder}/checkpoint", f"{folder}/{format}", format=format)
            exported[f"exported policy ({name})"] = ExportedPolicy.load(f"{folder}/{format}", threads=1)
    return [
        *call_rows(_row, policy, _observation(1), exported),
        *head_rows(_row),
        _row("replans, batch 1", rates[1], "replans/s", config=config),
        _row("actions, batch 1", 8 * rates[1], "actions/s", config=config),
        _row("replans, batch 24", rates[24], "replans/s", config=config, baseline="batch 1", base=rates[1]),
    ]


def bench_policy() -> list[Row]:
    """One decision of the default policy in an evaluation: decisions/s, and CPU time of policy and environment. About a
    minute."""
    from bascule.bench.evaluation import decision_rows

    return decision_rows(_row, tiny_policy())


def bench_serve(*, clients: int | None = None, seconds: float = 20.0) -> list[Row]:
    """Round trips through server and client on loopback, against the forward pass alone in the same run; with
    `clients`, a load test with that many clients for `seconds` instead."""
    import torch

    from bascule.bench.serving import import_time, load, round_trips

    torch.set_num_threads(1)
    policy = tiny_policy()
    if clients is not None:
        return load(_row, policy, clients=clients, seconds=seconds)
    return [*round_trips(_row, policy), import_time(_row)]


def bench_gpu() -> list[Row]:
    """A policy of the published size on a CUDA device. ValueError without one."""
    from bascule.bench.model_gpu import bench

    return bench(_row)


def bench_startup() -> list[Row]:
    """CPU seconds of commands that do next to nothing, and of a server until it listens."""
    from bascule.bench.startup import bench

    return bench(_row, tiny_policy())


BENCHES: dict[str, Callable[..., list[Row]]] = {
    "sim": bench_sim,
    "model": bench_model,
    "policy": bench_policy,
    "serve": bench_serve,
    "gpu": bench_gpu,
    "startup": bench_startup,
}
