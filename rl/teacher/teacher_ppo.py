"""A teacher that practises: chunk-level PPO from the simulator's state, in worlds that nobody has to draw.

A teacher of few demonstrations fails where these did not go, and whoever imitates it fails there, too. What the reward
says is learnt soonest where nothing has to be seen: without pictures and a backbone a core plays some two thousand
control steps a second, and what is told outright needs no eyes (Pinto et al. 2018, "Asymmetric actor critic", arXiv
1710.06542, give the state to the critic; here it goes to the actor as well, and from there to the policy:
`rl.teacher.distill`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.algorithms.ppo import PPO
from rl.configs.teacher import PracticeConfig
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic
from rl.rollout.curriculum import Curriculum
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import RolloutBuffer
from rl.teacher.state_teacher import Teacher, told
from vla.core.types import Observation, VecEnv
from vla.model.residual_head import Latents
from vla.processing.processor import Processor
from vla.runtime.distributed import Team


@dataclass(frozen=True)
class Told:
    """What the simulator tells of B observations."""

    proprio_BP: Tensor
    """(B, S): its state, then the proprio."""


class StateProcessor:
    """Observations as the simulator's state; actions in the units of a policy's processor."""

    def __init__(self, processor: Processor) -> None:
        self.unnormalise_action: Callable[[NDArray[np.float32]], NDArray[np.float32]] = processor.unnormalise_action

    def prepare(self, obs: Observation) -> Told:
        return Told(told(obs))


class StateModel(nn.Module):
    """A teacher in the place of a VLA."""

    def __init__(self, teacher: Teacher, processor: Processor) -> None:
        super().__init__()
        self.backbone, self.processor = nn.Identity(), StateProcessor(processor)
        self.teacher, self.chunk_size = teacher, teacher.chunk_size

    def encode(self, inp: Told) -> Latents:
        """There is nothing to look at."""
        nothing = inp.proprio_BP[:, :0]
        return Latents(nothing[:, None], nothing, nothing)

    def act(self, latents: Latents, proprio_BP: Tensor) -> Tensor:
        return self.teacher(proprio_BP)


@contextmanager
def undrawn(env: VecEnv) -> Iterator[None]:
    """Inside, the worlds are played without their pictures."""
    env.set_rendering(False)
    try:
        yield
    finally:
        env.set_rendering(True)


def practise(
    teacher: Teacher,
    processor: Processor,
    env: VecEnv,
    config: PracticeConfig,
    *,
    train_seeds: tuple[int, int],
    n_action_steps: int | None = None,
    curriculum: Curriculum | None = None,
    seed: int = 0,
    team: Team | None = None,
    worth: Callable[[], float] | None = None,
    spent: Callable[[int], bool] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
) -> int:
    """Improve `teacher` in place by its reward in `env`, whose pictures it does not need (`undrawn`); returns this
    process's control steps. It ends frozen, as it came. ValueError for a configuration that cannot be.

    `worth()` plays the teacher in `env` and says how often it succeeds, `spent(control steps)` whether there is no more
    time: both must answer every process of a team alike.
    """
    if problem := config.problem():
        raise ValueError(problem)
    team = team or Team()
    device = teacher.shift.device
    model = StateModel(teacher.requires_grad_(True), processor)
    actor = GaussianChunkActor(model, env.action_spec.names, config.actor, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(env.privileged_dim, env.proprio_dim, config.critic).to(device)
    collector = Collector(
        actor,
        env,
        generator=torch.Generator().manual_seed(2 * seed + 5 + 1_000_003 * team.rank),
        train_seeds=train_seeds,
        first_seed=seed + 1000,  # not where the policy will begin
        n_action_steps=n_action_steps,
        curriculum=curriculum,
        share=(team.rank, team.size),
    )
    buffer = RolloutBuffer(config.decisions_per_update, env.num_envs)
    per_update = config.decisions_per_update * env.num_envs * team.size * min(n_action_steps or 99, model.chunk_size)
    updates = max(1, round(config.env_steps / per_update))
    ppo = replace(config.ppo, anneal_updates=updates)
    learner = PPO(actor, critic, ppo, generator=torch.Generator().manual_seed(2 * seed + 7), team=team)
    for update in range(1, updates + 1):
        began = time.monotonic()
        buffer.clear()
        metrics = collector.collect(buffer) | learner.update(buffer)
        if on_update is not None:
            on_update(metrics | {"update": update, "of": updates, "seconds": time.monotonic() - began})
        if spent is not None and spent(collector.env_steps):
            break
        if worth is not None and config.enough is not None and update % config.look_every == 0 and update < updates:
            with learner.averaged():
                good = all(worth() >= config.enough for _ in range(2))  # the second only if the first was
            collector.forget_worlds()
            if good:
                break
    with learner.averaged():
        kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.load_state_dict(kept)
    teacher.requires_grad_(False)
    return collector.env_steps
