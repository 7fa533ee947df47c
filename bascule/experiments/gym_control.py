"""Gymnasium control tasks with the same PPO: a task as a vector environment, an MLP as the policy network.

With action chunks of one control step, `rl.algorithms.ppo` is textbook PPO; `bascule.experiments.sb3_parity` holds it
against another implementation's returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.seeds import FIRST_EVALUATION_SEED, TRAIN_SEED_LIMIT
from rl.algorithms.ppo import PPO
from rl.configs.learning import ActorConfig, CriticConfig, PPOConfig
from rl.models.actor import GaussianChunkActor, GreedyPolicy
from rl.models.critic import Critic
from rl.models.policy_inputs import StateInput
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import RolloutBuffer
from vla.core.types import ActionChunk, ActionSpec, Observation, Policy, StepResult, VecEnv, executed


class GymWorlds(VecEnv):
    """`vla.core.types.VecEnv` over `num_envs` copies of a gymnasium task with a continuous action. No camera, no
    success.

    The task's observation is the proprio; it has no privileged state beyond it.
    """

    cameras: tuple[str, ...] = ()
    privileged_dim = 0

    def __init__(self, task: str, num_envs: int) -> None:
        self.num_envs = num_envs
        self._envs = [gymnasium.make(task) for _ in range(num_envs)]
        spec, one = self._envs[0].spec, self._envs[0]
        if spec is None or not spec.max_episode_steps:
            raise ValueError(f"task {task!r} has no time limit: register it with max_episode_steps")
        if not isinstance(one.action_space, gymnasium.spaces.Box) or len(one.observation_space.shape or ()) != 1:
            raise ValueError(f"task {task!r} needs a continuous action and a vector to observe")
        self.horizon = spec.max_episode_steps
        self.proprio_dim = one.observation_space.shape[0]
        low, high = (tuple(map(float, bound)) for bound in (one.action_space.low, one.action_space.high))
        names = tuple(f"a{i}" for i in range(len(low)))
        self.action_spec = ActionSpec(names, low, high, control_hz=one.metadata.get("render_fps", 30))
        self._seen = np.zeros((num_envs, self.proprio_dim), np.float32)
        self._over = np.ones(num_envs, bool)

    def reset(
        self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, env_ids: Sequence[int] | None = None
    ) -> Observation:
        """See `vla.core.types.VecEnv.reset`; there is one task."""
        for seed, i in zip(seeds, range(self.num_envs) if env_ids is None else env_ids, strict=True):
            self._seen[i], _ = self._envs[i].reset(seed=int(seed))
            self._over[i] = False
        return self.observation()

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.core.types.VecEnv.step_chunk`."""
        reward, n_steps = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for i in np.flatnonzero(~self._over):
            for action in chunk[i]:
                self._seen[i], gained, terminated[i], truncated[i], _ = self._envs[i].step(action)
                reward[i] += float(gained)
                n_steps[i] += 1
                self._over[i] = terminated[i] or truncated[i]
                if self._over[i]:
                    break
        truncated &= ~terminated
        never = np.zeros(self.num_envs, bool)
        info = {"success": never, "wrong_object": never}
        return StepResult(self.observation(), reward.astype(np.float32), terminated, truncated, n_steps, info)

    def observation(self) -> Observation:
        """The current observation of every environment; B = num_envs, without images."""
        nothing = np.zeros((self.num_envs, 0), np.float32)
        return Observation({}, self._seen.copy(), [""] * self.num_envs, privileged=nothing)

    def set_rendering(self, on: bool) -> None:
        """Does nothing: these environments have no cameras."""

    def alternative_instructions(self) -> list[str]:
        """Empty strings: these environments have no instructions."""
        return [""] * self.num_envs

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()


class MlpNetwork:
    """An MLP as a `PolicyNetwork`: the task's observation -> chunk of actions (B, C, A), in the task's own units.

    Orthogonal initial weights of gain sqrt(2), the last of gain 0.01, as PPO is usually run with.
    """

    def __init__(
        self, proprio_dim: int, action_dim: int, *, chunk_size: int = 1, hidden: Sequence[int] = (64, 64), seed: int = 0
    ) -> None:
        self.chunk_size, self.action_dim = chunk_size, action_dim
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for inputs, outputs in zip((proprio_dim, *hidden[:-1]), hidden, strict=True):
                layers += [_linear(inputs, outputs, 2.0**0.5), nn.Tanh()]
            self.module = nn.Sequential(*layers, _linear(hidden[-1], chunk_size * action_dim, 0.01))

    def encode(self, obs: Observation) -> tuple[StateInput, Tensor]:
        """Return the task's observation (B, P) as both the network's input and the proprio."""
        proprio_BP = torch.from_numpy(obs.proprio)
        return StateInput(proprio_BP), proprio_BP

    def mean(self, inputs: StateInput, proprio_BP: Tensor) -> Tensor:
        """Return the mean chunk (B, C, A)."""
        return self.module(inputs.state_BS).view(-1, self.chunk_size, self.action_dim)

    def unnormalise_action(
        self, action_BCA: NDArray[np.float32], proprio_BP: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the actions as they are: nothing was demonstrated that could normalise them."""
        return action_BCA


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class ClassicConfig:
    """PPO from random weights on a classic task. Defaults: the usual ones for continuous control."""

    num_envs: int = 8
    steps_per_update: int = 128
    """Control steps per environment between updates."""
    hidden: tuple[int, ...] = (64, 64)
    actor: ActorConfig = field(default_factory=lambda: ActorConfig(motion_std=1.0, std_min=1e-3, std_max=10.0))
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            lr=3e-4,
            log_std_lr=3e-4,
            critic_lr=3e-4,
            epochs=10,
            critic_epochs=10,
            minibatch_size=64,
            clip=0.2,
            gamma=0.99,
            lam=0.95,
            kl_stop=float("inf"),
            critic_warmup=0,
        )  # fmt: skip
    )


def learn(task: str, config: ClassicConfig, *, seed: int, steps: int) -> tuple[GreedyPolicy, int]:
    """Train with PPO. Returns the greedy policy and its control steps, at least `steps`, over all environments."""
    worlds = GymWorlds(task, config.num_envs)
    network = MlpNetwork(worlds.proprio_dim, worlds.action_spec.dim, hidden=config.hidden, seed=seed)
    actor = GaussianChunkActor(network, worlds.action_spec.names, config.actor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(0, worlds.proprio_dim, CriticConfig(hidden=config.hidden))
    learner = PPO(actor, critic, config.ppo, generator=torch.Generator().manual_seed(2 * seed))
    noise = torch.Generator().manual_seed(2 * seed + 1)
    collector = Collector(actor, worlds, generator=noise, train_seeds=(0, TRAIN_SEED_LIMIT), first_seed=seed)
    buffer = RolloutBuffer(config.steps_per_update, config.num_envs)
    while collector.env_steps < steps:
        buffer.clear()
        collector.collect(buffer)
        learner.update(buffer)
    worlds.close()
    return GreedyPolicy(actor, worlds.action_spec, 1), collector.env_steps


def returns_of(policy: Policy, task: str, episodes: int) -> NDArray[np.float64]:
    """(episodes,) undiscounted returns, on seeds never trained on."""
    worlds = GymWorlds(task, episodes)
    obs = worlds.reset(seeds=range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes))
    policy.reset()
    returns, over = np.zeros(episodes), np.zeros(episodes, bool)
    while not over.all():
        result = worlds.step_chunk(executed(policy.spec, policy.act(obs)))
        returns += result.reward
        over |= result.terminated | result.truncated
        obs = result.obs
    worlds.close()
    return returns
