"""Proximal policy optimisation over action chunks. Schulman et al. 2017, with one ratio per decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rl.algorithms.advantages import explained_variance, gae, normalise
from rl.algorithms.policy_gradient import PolicyLearner
from rl.configs.learning import PPOConfig
from rl.models.actor import ChunkActor
from rl.models.critic import Critic
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from vla.runtime.distributed import Team


class PPO(PolicyLearner):
    """Actor, critic and their optimisers; `update` improves both on one full rollout."""

    config: PPOConfig

    def __init__(
        self,
        actor: ChunkActor,
        critic: Critic,
        config: PPOConfig,
        *,
        generator: torch.Generator,
        team: Team | None = None,
    ) -> None:
        super().__init__(actor, config, generator=generator, team=team)
        self.critic = critic
        self._value = self.team.wrap(critic)
        self.critic_optimiser = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, fused=True)
        self._memory: list[tuple[Tensor, Tensor]] = []
        """States (T*N, S) and value targets (T*N,) of earlier rollouts, oldest first."""

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Estimate advantages, improve the policy (after critic warm-up), then fit the critic; return metrics.

        NonFiniteError names a broken loss or gradient before it reaches a parameter.
        """
        returns, metrics = self.estimate(buffer)
        if self.num_updates >= self.config.critic_warmup:
            metrics |= self.improve(buffer)
            self.anneal()
        metrics |= self._fit_critic(buffer, returns)
        self.num_updates += 1
        return metrics | self.actor.noise_metrics()

    @torch.no_grad()
    def estimate(self, buffer: RolloutBuffer) -> tuple[Tensor, dict[str, float]]:
        """Set the buffer's normalised advantages; return the critic's targets (T*N,) and metrics."""
        config = self.config
        # statistics first: values, targets and the fit of this update all see one and the same normalisation
        self.critic.norm.update(buffer.flat("state"), self.team)
        values = self.critic(buffer.flat("state")).view(buffer.num_decisions, buffer.num_envs)
        next_values = self.critic(buffer.flat("next_state")).view_as(values)
        require_finite("value", values, "in the critic's output")
        rewards = buffer.time_major("reward")
        terminated, truncated = buffer.time_major("terminated"), buffer.time_major("truncated")
        if config.time_limit == "terminal":
            terminated = terminated | truncated
        parts = (rewards, values, next_values, terminated, truncated, torch.full_like(values, config.gamma))
        advantages = gae(*parts, config.lam)
        returns = values + (advantages if config.critic_lam is None else gae(*parts, config.critic_lam))
        buffer.advantages_TN = normalise(advantages, self.team)
        metrics = {
            "return_mean": float(returns.mean()),
            "value_mean": float(values.mean()),
            "advantage_std": float(advantages.std(unbiased=False)),
            "explained_variance": explained_variance(values, returns),
        }
        return returns.reshape(-1), metrics

    def _fit_critic(self, buffer: RolloutBuffer, returns: Tensor) -> dict[str, float]:
        """Regress the values on `returns` (T*N,) and the remembered targets; return metrics."""
        # its own loop: it gathers no features, and a KL stop of the policy is no reason to stop learning values
        config, where = self.config, f"in critic update {self.num_updates}"
        losses: list[float] = []
        self._memory = [*self._memory, (buffer.flat("state").clone(), returns)][-config.critic_memory :]
        states, targets = (torch.cat(kept) for kept in zip(*self._memory, strict=True))
        parts = -(-len(states) // max(1, config.minibatch_size // self.team.size))
        for _ in range(config.critic_epochs):
            for index in torch.randperm(len(states), generator=self.generator).to(states.device).tensor_split(parts):
                loss = (self._value(states[index]) - targets[index]).square().mean()
                require_finite("loss (critic)", loss.detach(), where)
                self.critic_optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.critic.parameters(), config.max_grad_norm)
                require_finite("grad (norm of the critic's)", norm, where)
                self.critic_optimiser.step()
                losses.append(float(loss.detach()))
        return {"value_loss": sum(losses) / len(losses)}

    def tensors(self) -> dict[str, Tensor]:
        """The policy's tensors and the critic's, `critic.*`."""
        return super().tensors() | {f"critic.{name}": t for name, t in self.critic.state_dict().items()}

    def trainer_state(self) -> dict[str, Any]:
        """Add the critic's optimiser and memory to the policy's state."""
        # the memory here and not among the tensors: every process has its own
        memory = [list(kept) for kept in self._memory] if self.config.critic_memory > 1 else []
        return super().trainer_state() | {
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "critic_memory": memory,
        }

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """Restore what `trainer_state` returned."""
        super().load_trainer_state(state)
        self.critic_optimiser.load_state_dict(state["critic_optimiser"])
        self._memory = [(states, targets) for states, targets in state.get("critic_memory", [])]
