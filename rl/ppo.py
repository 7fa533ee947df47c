"""Proximal policy optimisation over action chunks. Schulman et al. 2017, with one ratio per decision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rl.actor import Critic, GaussianChunkActor
from rl.advantages import explained_variance, gae, normalise
from rl.buffer import PolicyBatch, RolloutBuffer, require_finite

MAX_FIRST_LOG_RATIO = 0.05
"""Before its first step the policy scored is the one that acted: fp32 leaves about 1e-5 of log-ratio, a bug more."""


@dataclass(frozen=True)
class PPOConfig:
    """Chunk-level PPO. Defaults: what closed the loop in minutes on two CPU cores."""

    lr: float = 2e-4
    """Of the bridge and head."""
    log_std_lr: float = 2e-4
    critic_lr: float = 1e-3
    epochs: int = 4
    critic_epochs: int = 4
    minibatch_size: int = 128
    clip: float = 0.2
    """Of the joint ratio of a chunk's executed control steps."""
    kl_stop: float = 0.03
    """No further policy step in this update once a minibatch's KL estimate is above it."""
    gamma: float = 0.97
    discount_per: Literal["chunk", "step"] = "chunk"
    """Whether gamma discounts a decision, or every executed control step (gamma ** n_steps)."""
    lam: float = 0.95
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    """What a truncated episode's last state is worth: its value, as if the clock had not run out, or (when finishing in
    time is itself the task) nothing. Pardo et al. 2018, "Time limits in reinforcement learning"."""
    critic_warmup: int = 4
    """First updates that train the critic alone: advantages of a random critic would destroy the imitation policy."""
    max_grad_norm: float = 0.5
    anneal_updates: int = 0
    """Over so many updates learning rate and noise shrink to the fractions below (0: they stay). Near success most of
    what is left of a gradient is noise, and most failures are the exploration's own."""
    lr_final: float = 0.1
    std_final: float = 0.5
    bc_coef: float = 0.0
    """Weight of the KL divergence towards the imitation mean (0: no reference is computed)."""


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, float]:
    """PPO's policy loss (scalar, to minimise) and the fraction of samples outside the clip band. All inputs (M,)."""
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    return loss, float(((ratio.detach() - 1).abs() > clip).float().mean())


def kl_estimate(log_ratio: Tensor) -> float:
    """KL(old || new) from samples of old: mean of r - 1 - log r, never negative (Schulman's k3)."""
    log_ratio = log_ratio.detach()
    return float((log_ratio.expm1() - log_ratio).mean())


class PPO:
    """Actor, critic and their optimisers; `update` turns one full rollout into a better policy."""

    def __init__(
        self, actor: GaussianChunkActor, critic: Critic, config: PPOConfig, *, generator: torch.Generator
    ) -> None:
        self.actor, self.critic, self.config, self.generator = actor, critic, config, generator
        named = dict(actor.named_policy_parameters())
        self.policy_parameters = list(named.values())
        groups = [
            {"params": [p for name, p in named.items() if name != "log_std"], "lr": config.lr},
            {"params": [actor.log_std], "lr": config.log_std_lr},
        ]
        self.policy_optimiser = torch.optim.Adam(groups, fused=True)
        self.critic_optimiser = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, fused=True)
        self.num_updates = 0
        self._imitation = {}
        if config.bc_coef > 0:
            self._imitation = {name: p.detach().clone() for name, p in named.items() if name != "log_std"}

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Advantages, then (after critic warm-up) the policy, then the critic. NonFiniteError names what broke, if so.

        A broken loss or gradient is found before it reaches a parameter.
        """
        returns, metrics = self.estimate(buffer)
        if self.num_updates >= self.config.critic_warmup:
            metrics |= self._improve_policy(buffer)
            self._anneal()
        metrics |= self._fit_critic(buffer, returns)
        metrics["std_mean"] = float(self.actor.log_std.detach().exp().mean())
        self.num_updates += 1
        return metrics

    @torch.no_grad()
    def estimate(self, buffer: RolloutBuffer) -> tuple[Tensor, dict[str, float]]:
        """Set the buffer's normalised advantages; returns the critic's targets (T*N,) and what to log about them."""
        config = self.config
        # statistics first: values, targets and the fit of this update all see one and the same normalisation
        self.critic.norm.update(buffer.flat("state"))
        values = self.critic(buffer.flat("state")).view(buffer.num_decisions, buffer.num_envs)
        next_values = self.critic(buffer.flat("next_state")).view_as(values)
        require_finite("value", values, "in the critic's output")
        rewards = buffer.time_major("reward")
        steps = buffer.time_major("n_steps").to(values.dtype)
        discounts = torch.full_like(values, config.gamma) if config.discount_per == "chunk" else config.gamma**steps
        terminated, truncated = buffer.time_major("terminated"), buffer.time_major("truncated")
        if config.time_limit == "terminal":
            terminated = terminated | truncated
        advantages = gae(rewards, values, next_values, terminated, truncated, discounts, config.lam)
        returns = advantages + values
        buffer.advantages_TN = normalise(advantages)
        if self._imitation:
            with self._imitation_parameters():
                buffer.reference_means = self._means(buffer)
        metrics = {
            "return_mean": float(returns.mean()),
            "value_mean": float(values.mean()),
            "advantage_std": float(advantages.std(unbiased=False)),
            "explained_variance": explained_variance(values, returns),
        }
        return returns.reshape(-1), metrics

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(loss, log-ratio (M,), metrics) of a minibatch."""
        mean_BCA = self.actor.mean(batch.conditions, batch.proprio_BP)
        log_ratio = self.actor.log_prob(mean_BCA, batch.action_BCA, batch.executed_BC) - batch.log_prob_B
        loss, clip_fraction = clipped_surrogate(log_ratio, batch.advantage_B, self.config.clip)
        metrics = {"policy_loss": float(loss.detach()), "clip_fraction": clip_fraction, "kl": kl_estimate(log_ratio)}
        if batch.reference_BCA is not None:
            # KL of two Gaussians with one std; std detached, else the term would pay for more noise
            drift = (mean_BCA - batch.reference_BCA) * (-self.actor.log_std.detach()).exp()
            drift = torch.where(batch.executed_BC[..., None], drift, 0.0)
            bc_loss = 0.5 * drift.square().sum((1, 2)).mean()
            metrics["bc_loss"] = float(bc_loss.detach())
            loss = loss + self.config.bc_coef * bc_loss
        return loss, log_ratio, metrics

    def _improve_policy(self, buffer: RolloutBuffer) -> dict[str, float]:
        config, where = self.config, f"in policy update {self.num_updates}"
        history: list[dict[str, float]] = []
        first_log_ratio, stopped = 0.0, False
        for _ in range(config.epochs):
            for index in buffer.minibatches(config.minibatch_size, self.generator):
                loss, log_ratio, metrics = self.policy_loss(buffer.policy_batch(index))
                require_finite("loss", loss.detach(), where)
                if not history:
                    first_log_ratio = float(log_ratio.detach().abs().max())
                    if first_log_ratio > MAX_FIRST_LOG_RATIO:
                        raise RuntimeError(
                            f"log-ratio {first_log_ratio:.3f} before the first policy step: the model scored is not "
                            "the one that acted (dropout, bf16 in the head, or parameters changed since the rollout?)"
                        )
                if metrics["kl"] > config.kl_stop:
                    stopped = True
                    break
                self.policy_optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.policy_parameters, config.max_grad_norm)
                require_finite("grad (norm of the policy's)", norm, where)
                self.policy_optimiser.step()
                self.actor.clamp_std()
                history.append(metrics | {"grad_norm": float(norm)})
            if stopped:
                break
        averages = {key: sum(row[key] for row in history) / len(history) for key in history[0]} if history else {}
        return averages | {
            "kl_last": metrics["kl"],
            "kl_stopped": float(stopped),
            "policy_steps": float(len(history)),
            "first_log_ratio": first_log_ratio,
        }

    @torch.no_grad()
    def _anneal(self) -> None:
        """One update further: the rate follows from the count of updates, the spread moves with what it has learnt."""
        config = self.config
        if not self.num_updates < config.anneal_updates:
            return
        left = 1.0 - (self.num_updates + 1) / config.anneal_updates
        for group, lr in zip(self.policy_optimiser.param_groups, (config.lr, config.log_std_lr), strict=True):
            group["lr"] = lr * (config.lr_final + (1.0 - config.lr_final) * left)
        self.actor.log_std.add_(math.log(config.std_final) / config.anneal_updates)
        self.actor.clamp_std()

    def _fit_critic(self, buffer: RolloutBuffer, returns: Tensor) -> dict[str, float]:
        # its own loop: it gathers no features, and a KL stop of the policy is no reason to stop learning values
        config, where = self.config, f"in critic update {self.num_updates}"
        losses: list[float] = []
        states = buffer.flat("state")
        for _ in range(config.critic_epochs):
            for index in buffer.minibatches(config.minibatch_size, self.generator):
                loss = (self.critic(states[index]) - returns[index]).square().mean()
                require_finite("loss (critic)", loss.detach(), where)
                self.critic_optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.critic.parameters(), config.max_grad_norm)
                require_finite("grad (norm of the critic's)", norm, where)
                self.critic_optimiser.step()
                losses.append(float(loss.detach()))
        return {"value_loss": sum(losses) / len(losses)}

    def _means(self, buffer: RolloutBuffer) -> Tensor:
        proprio, size, step = buffer.flat("proprio"), buffer.size, self.config.minibatch_size
        parts = []
        for start in range(0, size, step):
            stop = min(start + step, size)
            parts.append(self.actor.mean(buffer.conditions(slice(start, stop)), proprio[start:stop]))
        return torch.cat(parts)

    @contextmanager
    def _imitation_parameters(self) -> Iterator[None]:
        """Inside, the actor's mean is the imitation policy's; outside, everything is as before."""
        current = {name: p for name, p in self.actor.named_policy_parameters() if name in self._imitation}
        kept = {name: p.detach().clone() for name, p in current.items()}
        with torch.no_grad():
            try:
                for name, p in current.items():
                    p.copy_(self._imitation[name])
                yield
            finally:
                for name, p in current.items():
                    p.copy_(kept[name])

    def tensors(self) -> dict[str, Tensor]:
        """Trained tensors by name: `policy.*`, `critic.*` and, with a BC term, `imitation.*`."""
        out = {f"policy.{name}": p.detach() for name, p in self.actor.named_policy_parameters()}
        out |= {f"critic.{name}": t for name, t in self.critic.state_dict().items()}
        return out | {f"imitation.{name}": t for name, t in self._imitation.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`. ValueError when a tensor is missing."""
        for name, target in self.tensors().items():
            if name not in tensors:
                raise ValueError(f"the checkpoint has no tensor {name!r}: another model or configuration made it")
            target.copy_(tensors[name])

    def trainer_state(self) -> dict[str, object]:
        """What else an exact resume needs: optimisers, random state, count of updates."""
        return {
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
        }

    def load_trainer_state(self, state: dict[str, object]) -> None:
        """Inverse of `trainer_state`."""
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.critic_optimiser.load_state_dict(state["critic_optimiser"])
        self.generator.set_state(state["generator"])
        self.num_updates = state["num_updates"]
