"""Checks before a run begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rl.configs.run import RunnerConfig
from vla.core.compatibility import require_same
from vla.core.types import VecEnv
from vla.runtime.distributed import Team

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet

ORDER = "`vla eval` reorders, training does not; name the demonstrations' components in the environment's order first"


def require_fit(model: torch.nn.Module, env: VecEnv, config: RunnerConfig, demos: DemoSet | None, team: Team) -> None:
    """ValueError when environment, configuration, model and demonstrations do not fit together."""
    guide = config.guide
    if env.num_envs * team.size != config.num_envs:
        raise ValueError(
            f"the environment has {env.num_envs} worlds, the configuration asks for {config.num_envs}"
            + (f" over {team.size} processes" if team.size > 1 else "")
        )
    if config.horizon is not None and env.horizon != config.horizon:
        raise ValueError(
            f"the environment's episodes last {env.horizon} steps, the configuration asks for {config.horizon}: "
            f"make_vec(..., horizon={config.horizon})"
        )
    if not 0 <= config.word_noise < math.inf:
        raise ValueError(f"word_noise must be 0 or more, got {config.word_noise}")
    if config.shaping is not None and (config.method is not None or team.size > 1):
        raise ValueError("shaping goes with PPO in one process: episodes compared or filtered need the true reward")
    if guide is not None and config.method is not None:
        raise ValueError("a teacher goes with PPO, whose critic reads the simulator's state as its teacher does")
    if config.critic.reads == "latents" and config.method is None:
        if guide is not None:
            raise ValueError(
                "beside a teacher the critic reads the simulator's state: leave CriticConfig.reads as it is"
            )
        if config.ppo.time_limit != "terminal":
            raise ValueError(
                "a critic of latents cannot bootstrap at the time limit: set PPOConfig.time_limit 'terminal'"
            )
    if (config.method or config.ppo).ratio == "token" and config.actor.noise != "tokens":
        raise ValueError("only tokens have a ratio each: set ActorConfig.noise to 'tokens', or leave ratio at 'chunk'")
    if guide is not None and config.actor.noise == "tokens":
        raise ValueError(
            "a teacher corrects actions, not tokens: take a recipe without one, or refine the actions of this policy "
            "(...-guided takes any head)"
        )
    if guide is not None and demos is None:
        raise ValueError(
            "this recipe's teacher learns from demonstrations: name a data set (--demos), or take a recipe without one"
        )
    if guide is not None and (problem := guide.problem()):
        raise ValueError(problem)
    require_same(model, env, remedy=ORDER)
    if demos is not None:  # they are normalised and compared component by component
        require_same(model, demos, where="demonstrations", ranges=False)
