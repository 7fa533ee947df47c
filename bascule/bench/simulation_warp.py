"""`vla bench sim --backend warp`: the MuJoCo Warp environments on one device.

Correctness comes first: the CPU backend's motion, success and images, a CUDA graph that does what its launches do, the
right order of streams. Without them no rates are reported. Then rates over the number of environments, and a time
breakdown. May import every package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bascule.bench.measuring import Row, row

WORLDS = (64, 256, 1024, 4096, 8192)
WANTED_STEPS, WANTED_IMAGES = 50_000.0, 100_000.0
"""Targets: control steps/s without rendering at 4096 environments, and 84 px images/s."""
CHUNK = 8
_SECONDS = 2.0
_ARM_RAD, _OBJECT_M, _GRAPH_RAD, _IMAGE = 5e-3, 5e-3, 1e-3, 1.0


def bench_warp(
    *,
    device: str | None = None,
    worlds: Sequence[int] = WORLDS,
    suite: str = "tabletop-pick",
    on_rows: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Checks, then rates for each number of environments in `worlds`. `on_rows` receives all rows after each.

    RuntimeError naming the check that failed.
    """
    import torch

    place = device if device not in (None, "auto") else ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {place!r} was requested, but torch sees no GPU; `--device cpu` runs without one")
    name = torch.cuda.get_device_name(place) if place.startswith("cuda") else "Warp's CPU device"
    rows = _checks(suite, place, name)
    for n in worlds:
        if on_rows is not None:
            on_rows(rows)
        rows += _rates(suite, place, name, n)
    if on_rows is not None:
        on_rows(rows)
    return rows


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"correctness check failed, so nothing was measured: {what}")


# ---------------------------------------------------------------------- correctness
def _checks(suite: str, device: str, name: str) -> list[Row]:
    from envs import make_vec

    n = 2 if device == "cpu" else 16
    env = make_vec(suite, n, backend="warp", device=device)
    rows = [*_check_motion(env, suite, name), *_check_success(suite, device, name)]
    if device != "cpu":
        rows += [_check_graph(env, name), _check_streams(env, name)]
    return rows + _check_images(env, suite, name)


def _check_motion(env: Any, suite: str, name: str) -> list[Row]:
    """The scripted expert's actions, chosen on the CPU backend, played in both until success."""
    from envs.backends.cpu_worlds import TabletopWorlds
    from envs.experts.registry import make_expert
    from envs.registry import load_suite

    n = env.num_envs
    cpu = TabletopWorlds(load_suite(suite), n)
    cpu.render_images = False
    env.set_rendering(False)
    expert, seeds = make_expert(suite, n), range(100, 100 + n)
    cpu.reset(seeds=seeds)
    env.reset(seeds=seeds)
    arm = thing = 0.0
    while not cpu.over.all():
        action = expert.act(cpu.observation())
        here, there = cpu.step_chunk(action), env.step_chunk(action)
        both = (here.n_steps > 0) & (there.n_steps > 0)
        joints = np.stack([data.qpos[cpu.index.arm_qpos] for data in cpu.data])
        away = np.abs(joints - env.sim.qpos[:, cpu.index.arm_qpos].cpu().numpy())
        objects = np.linalg.norm(cpu.state.objects - env.state.objects.cpu().numpy(), axis=-1)
        arm = max(arm, float(away[both].max(initial=0.0)))
        thing = max(thing, float(np.median(objects[both][cpu.state.active[both]])) if both.any() else 0.0)
    _require(arm < _ARM_RAD * (1 if n == 2 else 4), f"arm {arm:.2g} rad from the CPU backend's")
    _require(thing < _OBJECT_M, f"the median object is {1e3 * thing:.2g} mm from the CPU backend's")
    config = f"{suite}, {n} expert episodes, {name}"
    return [
        row("arm beside the CPU backend, largest difference", arm, "rad", config),
        row("objects beside the CPU backend, largest median difference", 1e3 * thing, "mm", config),
    ]


def _check_success(suite: str, device: str, name: str) -> list[Row]:
    """One policy (the scripted expert), the same evaluation seeds on both backends."""
    from envs import make_vec
    from envs.backends.cpu_worlds import TabletopWorlds
    from envs.evaluation.evaluate import evaluate, wilson95
    from envs.experts.registry import make_expert
    from envs.registry import load_suite

    episodes = 2 if device == "cpu" else 256
    spec = load_suite(suite)
    seeds, rates = range(spec.eval_seed0, spec.eval_seed0 + episodes), []
    cpu = TabletopWorlds(spec, episodes)  # in this process: a script read from standard input cannot start workers
    cpu.render_images = False
    env = make_vec(suite, episodes, backend="warp", device=device)
    env.set_rendering(False)
    for worlds in (cpu, env):
        rates.append(evaluate(make_expert(suite, episodes), worlds, seeds).successes)
    low, high = wilson95(rates[0], episodes)
    reached = rates[1] / episodes
    _require(low <= reached <= high, f"expert {rates[1]}/{episodes}, on the CPU backend {rates[0]}/{episodes}")
    config = f"{suite}, {episodes} evaluation scenes, {name}"
    return [row("expert's success", reached, "of 1", config, "CPU backend", rates[0] / episodes)]


def _check_graph(env: Any, name: str) -> Row:
    """One control step by CUDA graph and by the launches it was made of, from the same state."""
    import torch

    ends = []
    for step in (env.sim.step, env.sim.step.launch):
        env.reset(seeds=range(env.num_envs))
        env.sim.live.fill_(True)
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
        ends.append(env.sim.qpos[:, :9].clone())
    away = float((ends[0] - ends[1]).abs().max())
    _require(away < _GRAPH_RAD, f"the CUDA graph and its launches differ by {away:.2g}")
    return row("CUDA graph beside its launches, largest difference", away, "rad or m", f"one control step, {name}")


def _check_streams(env: Any, name: str) -> Row:
    """Actions that a busy side stream is still computing must be waited for, and the state read after the step."""
    import torch

    chunk = torch.tensor([0.6, -0.4, 0.3, 1.0], device=env.device).repeat(env.num_envs, 3, 1)
    ends = []
    for late in (False, True):
        env.reset(seeds=range(env.num_envs))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if late else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            action = torch.zeros_like(chunk)
            if late:  # tens of milliseconds of work before the action is there
                work = torch.randn(4096, 4096, device=env.device)
                for _ in range(40):
                    work = work @ work * 1e-3
                action += 0.0 * work.nan_to_num().mean()
            action += chunk
            env.step_tensors(action)
            ends.append(env.proprio().clone())
        torch.cuda.synchronize()
    away = float((ends[0] - ends[1]).abs().max())
    _require(away < _GRAPH_RAD, f"a step on a busy side stream ends {away:.2g} elsewhere")
    return row("step on a busy side stream, largest difference", away, "m", f"3 control steps, {name}")


def _check_images(env: Any, suite: str, name: str) -> list[Row]:
    """The same scenes drawn by OpenGL; no row where there is no OpenGL."""
    from envs.backends.cpu_worlds import TabletopWorlds
    from envs.registry import load_suite

    env.set_rendering(True)
    seeds, config = range(env.num_envs), f"{suite}, {env.num_envs} first frames, of 255, {name}"
    cpu = TabletopWorlds(load_suite(suite), env.num_envs)
    try:
        here = cpu.reset(seeds=seeds)
    except Exception as problem:  # a GL stack fails in its own ways
        return [row("images beside OpenGL's: not compared", 0.0, "", f"{type(problem).__name__}: {problem}")]
    there = env.reset(seeds=seeds)
    rows = []
    for camera in env.cameras:
        away = float(np.abs(here.images[camera].astype(int) - there.images[camera]).mean())
        _require(away < _IMAGE, f"camera {camera} differs from OpenGL's image by {away:.2g} of 255 on average")
        rows.append(row(f"camera {camera} beside OpenGL's, mean difference", away, "of 255", config))
    cpu.close()
    return rows


# ---------------------------------------------------------------------- speed
def _rates(suite: str, device: str, name: str, n: int) -> list[Row]:
    """Control steps/s, images/s and the time breakdown of `n` environments under random actions."""
    import torch

    from envs import make_vec
    from envs.tabletop import goals as rules

    begin = time.perf_counter()
    env = make_vec(suite, n, backend="warp", device=device)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    made = time.perf_counter() - begin
    generator = torch.Generator(device=env.device).manual_seed(0)
    chunk = 2.0 * torch.rand(n, CHUNK, env.action_spec.dim, generator=generator, device=env.device) - 1.0
    seeds = iter(range(10**9))

    def fresh() -> None:
        env.reset_tensors(seeds=[next(seeds) for _ in range(n)])

    def milliseconds(once: Callable[[], Any]) -> float:
        """Best of three means; the first call, outside, warms up."""
        once()
        wait()
        best, count = np.inf, 1
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(count):
                once()
            wait()
            took = (time.perf_counter() - start) / count
            best, count = min(best, took), max(1, min(100, int(_SECONDS / 3 / took)))
        return 1e3 * best

    def chunk_rate(step: Callable[[], Any]) -> float:
        """Control steps/s of whole chunks up to just before the horizon; the resets between are not timed."""
        rates = []
        for _ in range(1 if device == "cpu" else 3):
            fresh()
            wait()
            start, steps = time.perf_counter(), 0
            for _ in range(1 if device == "cpu" else max(1, env.horizon // CHUNK - 1)):
                steps += int(step().n_steps.sum())
            wait()
            rates.append(steps / (time.perf_counter() - start))
        return max(rates)

    config = f"{suite}, {n} worlds, chunk {CHUNK}, {env.image_size} px, {name}"
    views = len(env.cameras)
    host = chunk.cpu().numpy()
    env.set_rendering(False)
    start = time.perf_counter()
    fresh()
    wait()
    reset = n / (time.perf_counter() - start)
    bare = chunk_rate(lambda: env.step_tensors(chunk))
    env.set_rendering(True)
    seen = chunk_rate(lambda: env.step_tensors(chunk))
    numpy = chunk_rate(lambda: env.step_chunk(host))

    fresh()
    env.sim.live.fill_(True)

    def control() -> None:
        env.steer(~env.over, chunk[:, 0])
        env.read()
        rules.advance(env.state)
        rules.wrong_object(env.state)

    physics, steering = milliseconds(env.sim.step), milliseconds(control)
    drawing, copying = milliseconds(env.render), milliseconds(env.observation)
    _, contacts, constraint_rows = env.sim.overflow()
    rows = [
        row("physics and control", bare, "control steps/s", config, "50,000 wanted at 4096 worlds", WANTED_STEPS),
        row("and one frame per chunk", seen, "control steps/s", config),
        row("and to numpy", numpy, "control steps/s", config),
        row("images", 1e3 * n * views / drawing, "images/s", config, "100,000 wanted", WANTED_IMAGES),
        row("time: physics", physics, "ms per control step", config),
        row("time: IK and rules", steering, "ms per control step", config),
        row("time: render", drawing, "ms per frame of all worlds", config),
        row("time: observation to numpy", copying, "ms per decision", config),
        row("reset", reset, "worlds/s", config),
        row("needed: contacts", contacts, "per world, mean", f"{config}, room for {env.sim.buffers.nconmax}"),
        row("needed: constraint rows", constraint_rows, "of one world", f"{config}, room for {env.sim.buffers.njmax}"),
        row("making the worlds", made, "s", config),
    ]
    if device != "cpu":
        free, total = torch.cuda.mem_get_info()
        rows.append(row("memory in use", (total - free) / 2**30, "GiB", config))
    env.close()
    return rows
