"""What a run is: functions returning a `RunnerConfig`. Look one up by name in `RECIPES`."""

from __future__ import annotations

from collections.abc import Callable

from rl.actor import ActorConfig
from rl.ppo import PPOConfig
from rl.runner import RunnerConfig


def tabletop_pick() -> RunnerConfig:
    """Language-conditioned picking from an imitation policy at 40-80%, in minutes on two CPU cores."""
    return RunnerConfig(
        suite="tabletop-pick",
        num_envs=48,
        decisions_per_update=10,
        max_updates=200,
        max_seconds=360.0,
        eval_every=10,
        target_success=0.985,
        actor=ActorConfig(motion_std=0.2, gripper_std=0.3),
        ppo=PPOConfig(
            # One Adam step of 2e-4 on the bridge moves the joint KL of a chunk (32 numbers) by 0.5, of 3e-5 by 0.01.
            lr=3e-5,
            critic_lr=1e-3,
            epochs=4,
            minibatch_size=128,
            clip=0.2,
            kl_stop=0.12,
            gamma=0.97,
            lam=0.95,
            critic_warmup=4,
            max_grad_norm=0.5,
        ),
    )


def smoke() -> RunnerConfig:
    """Every branch in seconds: two updates of the critic, two of the policy. Learns nothing worth keeping."""
    return RunnerConfig(
        suite="tabletop-pick",
        num_envs=4,
        decisions_per_update=3,
        max_updates=4,
        eval_every=2,
        target_success=None,
        calibrate_scales=(1.0,),
        calibrate_episodes=4,
        ppo=PPOConfig(epochs=1, critic_epochs=1, minibatch_size=8, critic_warmup=2),
    )


RECIPES: dict[str, Callable[[], RunnerConfig]] = {"tabletop-pick": tabletop_pick, "smoke": smoke}
