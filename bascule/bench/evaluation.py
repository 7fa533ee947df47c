"""`vla bench policy`: what one decision costs in an evaluation, in the policy and in the environment."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bascule.bench.measuring import Row, row, tiny_policy
from vla.core.types import ActionChunk, Observation, Policy, Prefix

SUITE, ENVIRONMENTS, EPISODES = "tabletop-pick", 16, 32


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

    env, policy = make_vec(SUITE, ENVIRONMENTS), tiny_policy()
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
    config = f"{SUITE}, {ENVIRONMENTS} environments, {metered.decisions} decisions, 2 cameras of 84 px"
    per_decision = 1e3 / metered.decisions
    return [
        row("decisions in an evaluation", metered.decisions / seconds, "decisions/s", config=config),
        row("policy, one decision", per_decision * metered.cpu_s, "ms of CPU", config=config),
        row("environment, one decision", per_decision * environment_s, "ms of CPU", config=config),
    ]
