"""Calibration of the exploration noise before training."""

from __future__ import annotations

import math

from rl import streams
from rl.configs.run import RunnerConfig
from rl.models.actor import GreedyPolicy, SampledPolicy
from rl.rollout.step_collector import Collector, successes
from vla.runtime.distributed import Team


def calibrate_std(collector: Collector, config: RunnerConfig, team: Team) -> float:
    """Shrink the actor's initial standard deviation (or temperature) until noise costs little, and return the factor:
    where all samples fail there is nothing to learn from.

    The factor is the largest of `calibrate_scales` that keeps `calibrate_keep` of the greedy success on training
    scenes, else the smallest; 1 without `calibrate_scales`.
    """
    if not config.calibrate_scales:
        return 1.0
    actor, env, n_action_steps = collector.actor, collector.env, collector.n_action_steps
    rounds = -(-config.calibrate_episodes // config.num_envs)
    # one set of scenes for all: the scales are compared, not estimated
    seeds = [collector.next_seeds(env.num_envs) for _ in range(rounds)]
    greedy = successes(GreedyPolicy(actor, env.action_spec, n_action_steps), env, seeds, team)
    chosen = min(config.calibrate_scales)
    for scale in sorted(config.calibrate_scales, reverse=True):
        noise = streams.calibration(config.seed)
        policy = SampledPolicy(actor, env.action_spec, n_action_steps, generator=noise, std_scale=scale)
        if successes(policy, env, seeds, team) >= config.calibrate_keep * greedy:
            chosen = scale
            break
    actor.widen(math.log(chosen))
    collector.forget_worlds()
    return chosen
