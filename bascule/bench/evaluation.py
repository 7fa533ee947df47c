"""`vla bench policy`: what one decision costs in an evaluation, in the policy and in the environment. `vla bench
backbones`: what it costs on either embedded backbone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bascule.bench.measuring import EMBEDDED, Row, default_policy, row, untrained_policy
from vla.core.types import ActionChunk, Observation, Policy, Prefix, VecEnv

if TYPE_CHECKING:
    from vla.model.policy import VLAPolicy

SUITE, ENVIRONMENTS, EPISODES = "tabletop-pick", 16, 32
LEARNERS, UPDATES, TURNS = 48, 2, 3
"""Environments and PPO updates of a turn with one of the backbones, and turns."""


class Metered:
    """A policy, the decisions it has made and the CPU time they took in this process."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.spec = policy, policy.spec
        self.decisions, self.cpu_s = 0, 0.0

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Reset the wrapped policy for the given environments (None: all)."""
        self.policy.reset(env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The wrapped policy's chunks (B, C, A); adds B decisions and the CPU seconds they took."""
        began = time.process_time()
        chunk = self.policy.act(obs, prefix=prefix)
        self.cpu_s += time.process_time() - began
        self.decisions += obs.batch_size
        return chunk


def bench() -> list[Row]:
    """Decisions/s of `evaluate`, which other load lowers, and the CPU time per decision, which it hardly affects. About
    a minute."""
    import psutil

    from envs import make_vec
    from envs.evaluation.evaluate import evaluate
    from envs.sim.render_options import drawn_for

    policy = default_policy()
    env = make_vec(SUITE, ENVIRONMENTS, **drawn_for(policy))
    try:
        evaluate(policy, env, range(ENVIRONMENTS), suite=SUITE)  # warm-up
        metered, workers = Metered(policy), [psutil.Process(pid) for pid in env.worker_pids]

        def environments_s() -> float:
            return sum(sum(worker.cpu_times()[:2]) for worker in workers)

        before, began, main_s = environments_s(), time.perf_counter(), time.process_time()
        evaluate(metered, env, range(EPISODES), suite=SUITE)
        seconds, main_s = time.perf_counter() - began, time.process_time() - main_s
        environment_s = environments_s() - before + main_s - metered.cpu_s
    finally:
        env.close()
    config = f"{SUITE}, {ENVIRONMENTS} environments, {metered.decisions} decisions, {EMBEDDED}"
    per_decision = 1e3 / metered.decisions
    return [
        row("decisions in an evaluation", metered.decisions / seconds, "decisions/s", config=config),
        row("policy, one decision", per_decision * metered.cpu_s, "ms of CPU", config=config),
        row("environment, one decision", per_decision * environment_s, "ms of CPU", config=config),
    ]


BACKBONES = ("tiny-goals", "small")
"""Those whose policies are measured. The first, which `small` has replaced, is the baseline."""


def backbones() -> list[Row]:
    """`vla bench backbones`: what the backbone `small` costs beside `tiny-goals`. Decisions/s of `evaluate` and control
    steps/s of PPO's updates, in turns; medians. Ten minutes."""
    from envs import make_vec
    from vla.training.recipes import tabletop

    policies = {name: untrained_policy(replace(tabletop().model, backbone=name)) for name in BACKBONES}
    decisions: dict[str, list[float]] = {name: [] for name in policies}
    steps: dict[str, list[float]] = {name: [] for name in policies}
    for turn in range(TURNS + 1):
        for name, policy in policies.items():
            size = policy.vla.backbone.image_size
            env = make_vec(SUITE, LEARNERS, num_workers=2, image_size=size)
            try:
                measured = _decisions_per_s(policy, env), _steps_per_s(policy, env)
            finally:
                env.close()
            if turn > 0:  # the first turn warms up
                decisions[name].append(measured[0])
                steps[name].append(measured[1])
    baseline, config = BACKBONES[0], f"{SUITE}, {LEARNERS} environments, median of {TURNS} turns"
    rows = []
    for what, rates, unit in (
        ("decisions in an evaluation", decisions, "decisions/s"),
        ("RL, collecting and learning", steps, "control steps/s"),
    ):
        base = median(rates[baseline])
        for name, values in rates.items():
            beside = {} if name == baseline else {"baseline": baseline, "base": base}
            rows.append(row(f"{what}, {name}", median(values), unit, config, **beside))
    return rows


def _decisions_per_s(policy: VLAPolicy, env: VecEnv) -> float:
    from envs.evaluation.evaluate import evaluate

    metered, began = Metered(policy), time.perf_counter()
    evaluate(metered, env, range(2 * LEARNERS), suite=SUITE)
    return metered.decisions / (time.perf_counter() - began)


def _steps_per_s(policy: VLAPolicy, env: VecEnv) -> float:
    from rl.recipes import tabletop_pick
    from rl.runner import Runner

    found: list[float] = []
    config = replace(
        tabletop_pick(), suite=SUITE, num_envs=LEARNERS, max_updates=UPDATES, max_seconds=None,
        calibrate_scales=(1.0,), calibrate_episodes=LEARNERS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        Runner(policy.vla, env, config, Path(out), on_update=lambda r: found.append(r["env_steps_per_s"])).run()
    return median(found)
