"""Shared by every policy-gradient learner: the clipped step on stored decisions, its guards and its stops."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl.configs.learning import PolicyConfig
from rl.models.actor import ChunkActor
from rl.models.distribution import ChunkDistribution
from rl.models.tokens import TokenChunk
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import NonFiniteError, PolicyBatch, Transitions, require_finite
from vla.runtime.distributed import Team
from vla.training.optim import average_into, copy_into

MAX_FIRST_LOG_RATIO = 0.05
"""Before its first step the policy scored is the one that acted: fp32 leaves about 1e-5 of log-ratio, a bug more."""
LR_FINAL, STD_FINAL = 0.1, 0.5
"""Fractions of the learning rate and of the width of the noise that are left after `PolicyConfig.anneal_updates`."""


def clipped_surrogate(
    log_ratio: Tensor,
    advantage: Tensor,
    clip: float,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, float]:
    """PPO's policy loss (scalar, to minimise) and the fraction of samples outside the clip band. All inputs (M,)."""
    gain, outside = clipped_gain(log_ratio, advantage, clip, clip_high, dual_clip)
    return -gain.mean(), float(outside.float().mean())


def clipped_gain(
    log_ratio: Tensor, advantage: Tensor, clip: float, clip_high: float | None, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return PPO's gain, to be maximised, and whether the ratio is outside the clip band: for ratios of any shape."""
    ratio = log_ratio.exp()
    high = 1 + (clip if clip_high is None else clip_high)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, high) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return gain, (ratio.detach() > high) | (ratio.detach() < 1 - clip)


def kl_estimate(log_ratio: Tensor) -> float:
    """KL(old || new) from samples of old: mean of r - 1 - log r, never negative (Schulman's k3)."""
    log_ratio = log_ratio.detach()
    return float((log_ratio.expm1() - log_ratio).mean())


class PolicyObjective(nn.Module):
    """The clipped surrogate loss, one ratio a decision. A module, so that several processes can share its gradient."""

    def __init__(self, actor: ChunkActor, config: PolicyConfig) -> None:
        super().__init__()
        self.actor, self.config = actor, config

    @staticmethod
    def score(policy: ChunkDistribution, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return the log-densities whose ratios are taken; those of the policy that acted are stored."""
        return policy.log_prob(sample, executed_BC)

    def forward(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return (loss, log-ratio (M,), metrics) of a minibatch of M decisions."""
        config = self.config
        policy = self.actor.distribution(batch.inputs, batch.proprio_BP)
        log_ratio = self.score(policy, batch.action, batch.executed_BC) - batch.log_prob
        loss, clip_fraction = clipped_surrogate(
            log_ratio, batch.advantage_B, config.clip, clip_high=config.clip_high, dual_clip=config.dual_clip
        )
        metrics = {"policy_loss": float(loss.detach()), "clip_fraction": clip_fraction, "kl": kl_estimate(log_ratio)}
        return loss, log_ratio, metrics


class TokenObjective(PolicyObjective):
    """A ratio of its own for every token, each with the advantage of its decision: VL-DAC's policy term (arXiv
    2508.04280), and SimpleVLA-RL's (arXiv 2509.09674).

    One token that has moved far is clipped alone. The joint ratio of sixteen tokens leaves its band when all have moved
    a little, and then none of them learns.
    """

    score = staticmethod(TokenChunk.token_log_prob)

    def forward(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return (loss, log-ratio (M, C, A) and 0 for tokens that do not count, metrics) of a minibatch."""
        config = self.config
        policy = self.actor.distribution(batch.inputs, batch.proprio_BP)
        log_ratio = self.score(policy, batch.action, batch.executed_BC) - batch.log_prob
        advantage = batch.advantage_B[:, None, None].expand_as(log_ratio)
        gain, outside = clipped_gain(log_ratio, advantage, config.clip, config.clip_high, config.dual_clip)
        counts = policy.counts(batch.executed_BC)
        # the mean over a decision's tokens: so that decisions weigh alike, and so does every process's part of a batch
        loss = -((gain * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)).mean()
        # the tokens are independent of each other, so that the divergence of a decision is the sum of theirs
        kl = kl_estimate(log_ratio) * log_ratio[0].numel()
        clipped = float((outside & counts).sum() / counts.sum().clamp(min=1))
        return loss, log_ratio, {"policy_loss": float(loss.detach()), "clip_fraction": clipped, "kl": kl}


OBJECTIVES: dict[str, type[PolicyObjective]] = {"chunk": PolicyObjective, "token": TokenObjective}
"""By `PolicyConfig.ratio`."""


class PolicyLearner:
    """An actor and its optimiser; `improve` takes epochs of minibatch steps on a full buffer."""

    objective_class: type[PolicyObjective] | None = None
    """Instead of the one that the configured ratio has."""

    def __init__(
        self,
        actor: ChunkActor,
        config: PolicyConfig,
        *,
        generator: torch.Generator,
        team: Team | None = None,
    ) -> None:
        if problem := config.problem():
            raise ValueError(problem)
        self.actor, self.config, self.generator, self.team = actor, config, generator, team or Team()
        named = dict(actor.named_policy_parameters())
        self.policy_parameters = list(named.values())
        means = [p for p in self.policy_parameters if p is not actor.spread]
        groups = [{"params": means, "lr": config.lr}, {"params": [actor.spread], "lr": config.log_std_lr}]
        objective_class = self.objective_class or OBJECTIVES[config.ratio]
        self._objective = self.team.wrap(objective_class(actor, config))
        self.policy_optimiser = torch.optim.Adam([g for g in groups if g["params"]], fused=True)
        self._initial_lrs = [group["lr"] for group in self.policy_optimiser.param_groups]
        self.num_updates = 0
        self._average = {name: p.detach().clone() for name, p in named.items()} if config.average_decay else {}

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return (loss, log-ratio (M,), metrics) of a minibatch."""
        return self._objective(batch)

    def improve(self, buffer: Transitions) -> dict[str, float]:
        """Take epochs of clipped steps until done or the KL stop, and return metrics.

        NonFiniteError names a broken loss or gradient before it reaches a parameter.
        """
        team, where = self.team, f"in policy update {self.num_updates}"
        history: list[dict[str, float]] = []
        first_log_ratio = last_kl = 0.0
        stopped = False
        for index in self._minibatches(buffer):
            loss, log_ratio, metrics = self._shared_loss(buffer, index, where)
            last_kl = metrics["kl"]
            if not history:
                first_log_ratio = float(log_ratio.detach().abs().max())
                exact = self.actor.config.log_prob_dtype == "float32"
                if team.any(exact and first_log_ratio > MAX_FIRST_LOG_RATIO):
                    raise RuntimeError(
                        f"log-ratio {first_log_ratio:.3f} before the first policy step: the model scored is not "
                        "the one that acted (dropout, bf16 in the head, or parameters changed since the rollout?)"
                    )
            if stopped := last_kl > self.config.kl_stop:
                break
            history.append(metrics | {"grad_norm": self._step(loss, where)})
        if self._average:
            current = [p.detach() for _, p in self.actor.named_policy_parameters()]
            average_into(list(self._average.values()), current, self.config.average_decay)
        averages = {key: sum(row[key] for row in history) / len(history) for key in history[0]} if history else {}
        return averages | {
            "kl_last": last_kl,
            "kl_stopped": float(stopped),
            "policy_steps": float(len(history)),
            "first_log_ratio": first_log_ratio,
            "lr": self.policy_optimiser.param_groups[0]["lr"],
        }

    def _minibatches(self, buffer: Transitions) -> Iterator[Tensor]:
        """Yield the row indices of every minibatch of every epoch, as many in every process."""
        rows = self.team.total(float(buffer.size))[0] if self.team.size > 1 else buffer.size
        count = max(1, -(-int(rows) // self.config.minibatch_size))
        for _ in range(self.config.epochs):
            yield from buffer.parts(count, self.generator)

    def _step(self, loss: Tensor, where: str) -> float:
        """Take one optimiser step and return the gradient's norm before clipping."""
        self.policy_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy_parameters, self.config.max_grad_norm)
        require_finite("grad (norm of the policy's)", norm, where)
        self.policy_optimiser.step()
        self.actor.clamp_spread()
        return float(norm)

    def _shared_loss(self, buffer: Transitions, index: Tensor, where: str) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The loss of this process's part of a minibatch, weighted so that the mean over processes is that of the whole
        minibatch."""
        team = self.team
        if team.size == 1:
            loss, log_ratio, metrics = self.policy_loss(buffer.policy_batch(index))
            require_finite("loss", loss.detach(), where)
            return loss, log_ratio, metrics
        mine = len(index)
        if not mine:  # a rank with an empty shard contributes a zero gradient, so that all take part in the exchange
            index = torch.zeros(1, dtype=torch.int64, device=index.device)
        loss, log_ratio, metrics = self.policy_loss(buffer.policy_batch(index))
        totals = team.total(float(mine), *(value * mine for value in metrics.values()))
        if team.any(not torch.isfinite(loss.detach()).all()):
            raise NonFiniteError(f"loss is not finite {where}, in one process at least")
        together = {name: value / max(1.0, totals[0]) for name, value in zip(metrics, totals[1:], strict=True)}
        return loss * (mine * team.size / max(1.0, totals[0])), log_ratio, together

    @torch.no_grad()
    def anneal(self) -> None:
        """Lower learning rate and standard deviation by one update's share, while fewer than `anneal_updates` are done.

        The rate follows from the count of updates alone; the standard deviation is lowered relative to what was learnt.
        """
        config = self.config
        if not self.num_updates < config.anneal_updates:
            return
        left = 1.0 - (self.num_updates + 1) / config.anneal_updates
        for group, lr in zip(self.policy_optimiser.param_groups, self._initial_lrs, strict=True):
            group["lr"] = lr * (LR_FINAL + (1.0 - LR_FINAL) * left)
        self.actor.widen(math.log(STD_FINAL) / config.anneal_updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While the context lasts, the actor has the parameters to be evaluated and kept: with `average_decay` their
        running mean, else the last ones."""
        current = [p for _, p in self.actor.named_policy_parameters()] if self._average else []
        kept = [p.detach().clone() for p in current]
        copy_into(current, list(self._average.values()))
        try:
            yield
        finally:
            copy_into(current, kept)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name: `policy.*`, and with `average_decay` their running mean `average.*`."""
        out = {f"policy.{name}": p.detach() for name, p in self.actor.named_policy_parameters()}
        return out | {f"average.{name}": t for name, t in self._average.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned. ValueError when a tensor is missing."""
        for name, target in self.tensors().items():
            if name not in tensors:
                raise ValueError(f"the checkpoint has no tensor {name!r}: another model or configuration made it")
            target.copy_(tensors[name])

    def trainer_state(self) -> dict[str, Any]:
        """Optimiser, random state and count of updates, which an exact resume needs besides `tensors`."""
        return {
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
        }

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """Restore what `trainer_state` returned."""
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.generator.set_state(state["generator"])
        self.num_updates = state["num_updates"]


class EpisodeLearner(PolicyLearner, ABC):
    """Learns from whole episodes: `judge` chooses those to learn from, `update` learns from them."""

    @abstractmethod
    def judge(self, returns_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept (groups,), advantages (groups, N)) for the returns of N episodes of every group."""

    def update(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """Take one update on the kept episodes. Without any, in any process, the policy stays and `skipped` is 1."""
        metrics = {"skipped": 1.0}
        if self.team.total(float(buffer.size))[0]:
            metrics = {"skipped": 0.0} | self.improve(buffer)
        self.anneal()
        self.num_updates += 1
        return metrics | self.actor.noise_metrics()
