"""Fine-tuning the privileged teacher with PPO, without rendering.

A teacher of few demonstrations fails where these did not go, and so does a policy distilled from it. The reward is
learnt from fastest where nothing has to be rendered: without images and a backbone one core plays some two thousand
control steps a second, and privileged state needs no perception. (Pinto et al. 2018, "Asymmetric actor critic", arXiv
1710.06542, give the state to the critic; here it goes to the actor as well, and from there to the policy:
`rl.teacher.distill`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl import streams
from rl.algorithms.ppo import PPO
from rl.configs.teacher import TeacherPPOConfig
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic, privileged_state
from rl.models.policy_inputs import StateInput
from rl.rollout.curriculum import Curriculum
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import RolloutBuffer
from rl.teacher.state_teacher import Teacher
from vla.core.types import Observation, VecEnv
from vla.processing.processor import Processor
from vla.runtime.distributed import Team


class TeacherNetwork:
    """The privileged teacher as a `PolicyNetwork`: all of it is trained, and it reads the simulator's state."""

    def __init__(self, teacher: Teacher, processor: Processor) -> None:
        """`processor` is the policy's: it knows the units of actions."""
        self.module, self.chunk_size, self._processor = teacher, teacher.chunk_size, processor

    def encode(self, obs: Observation) -> tuple[StateInput, Tensor]:
        """Return the privileged state (B, S) and the proprio (B, P), as they are."""
        state_BS = privileged_state(obs).to(self.module.shift)
        return StateInput(state_BS), torch.from_numpy(obs.proprio).to(state_BS)

    def mean(self, inputs: StateInput, proprio_BP: Tensor) -> Tensor:
        """Return the teacher's chunk (B, C, A), normalised."""
        return self.module(inputs.state_BS)

    def unnormalise_action(
        self, action_BCA: NDArray[np.float32], proprio_BP: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Convert normalised actions to the units of the demonstrations."""
        return self._processor.unnormalise_action(action_BCA, proprio_BP)


@contextmanager
def rendering_disabled(env: VecEnv) -> Iterator[None]:
    """Step the environments without rendering while the context lasts."""
    env.set_rendering(False)
    try:
        yield
    finally:
        env.set_rendering(True)


def train_teacher_ppo(
    teacher: Teacher,
    processor: Processor,
    env: VecEnv,
    config: TeacherPPOConfig,
    *,
    train_seeds: tuple[int, int],
    n_action_steps: int | None = None,
    curriculum: Curriculum | None = None,
    seed: int = 0,
    team: Team | None = None,
    success_rate: Callable[[], float] | None = None,
    out_of_budget: Callable[[int], bool] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
) -> int:
    """Improve `teacher` in place by PPO in `env`, whose images it does not need (`rendering_disabled`); return this
    process's control steps. It ends frozen, as it came. ValueError for an impossible configuration.

    `success_rate()` plays the teacher in `env`, `out_of_budget(control steps)` says whether to stop: both must answer
    every process of a team alike. `on_update` receives every update's metrics with "update" and "of".
    """
    if problem := config.problem():
        raise ValueError(problem)
    team, device = team or Team(), teacher.shift.device
    actor = GaussianChunkActor(
        TeacherNetwork(teacher.requires_grad_(True), processor), env.action_spec.names, config.actor
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(env.privileged_dim, env.proprio_dim, config.critic).to(device)
    collector = Collector(
        actor,
        env,
        generator=streams.teacher_exploration(seed, team.rank),
        train_seeds=train_seeds,
        first_seed=streams.teacher_scenes(seed),
        n_action_steps=n_action_steps,
        curriculum=curriculum,
        share=(team.rank, team.size),
    )
    buffer = RolloutBuffer(config.decisions_per_update, env.num_envs)
    per_update = config.decisions_per_update * env.num_envs * team.size * min(n_action_steps or 99, teacher.chunk_size)
    updates = max(1, round(config.env_steps / per_update))
    ppo = replace(config.ppo, anneal_updates=updates)
    learner = PPO(actor, critic, ppo, generator=streams.teacher_minibatches(seed), team=team)
    for update in range(1, updates + 1):
        began = time.monotonic()
        buffer.clear()
        metrics = collector.collect(buffer) | learner.update(buffer)
        if on_update is not None:
            on_update(metrics | {"update": update, "of": updates, "seconds": time.monotonic() - began})
        if update < updates and out_of_budget is not None and out_of_budget(collector.env_steps):
            break
        due = config.enough is not None and update % config.look_every == 0 and update < updates
        if due and success_rate is not None:
            # must hold in two consecutive evaluations, to guard against noise; the second only if the first did
            with learner.averaged():
                good = all(success_rate() >= config.enough for _ in range(2))
            collector.forget_worlds()
            if good:
                break
    with learner.averaged():
        kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.load_state_dict(kept)
    teacher.requires_grad_(False)
    return collector.env_steps
