"""What every policy-gradient learner here shares: the clipped step on stored decisions, its guards and its stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rl.configs.learning import PolicyConfig
from rl.models.actor import GaussianChunkActor
from rl.models.state_std import StateScale
from rl.storage.rollout_buffer import NonFiniteError, PolicyBatch, Transitions, require_finite
from vla.model.heads import masked_l1
from vla.runtime.distributed import Team
from vla.training.optim import average_into, copy_into

if TYPE_CHECKING:
    from rl.storage.demonstrations import DemoRows

MAX_FIRST_LOG_RATIO = 0.05
"""Before its first step the policy scored is the one that acted: fp32 leaves about 1e-5 of log-ratio, a bug more."""
LR_RANGE = (1e-6, 1e-2)
"""Bounds of the adaptive learning rate."""


def clipped_surrogate(
    log_ratio: Tensor,
    advantage: Tensor,
    clip: float,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, float]:
    """PPO's policy loss (scalar, to minimise) and the fraction of samples outside the clip band. All inputs (M,)."""
    ratio = log_ratio.exp()
    high = 1 + (clip if clip_high is None else clip_high)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, high) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    outside = (ratio.detach() > high) | (ratio.detach() < 1 - clip)
    return -gain.mean(), float(outside.float().mean())


def kl_estimate(log_ratio: Tensor) -> float:
    """KL(old || new) from samples of old: mean of r - 1 - log r, never negative (Schulman's k3)."""
    log_ratio = log_ratio.detach()
    return float((log_ratio.expm1() - log_ratio).mean())


def adapted_lr(lr: float, kl: float, target: float) -> float:
    """The next learning rate: down by 1.5 above twice the target KL, up by as much below half of it.

    Rudin et al. 2021 (rsl_rl's adaptive schedule).
    """
    low, high = LR_RANGE
    if kl > 2 * target:
        return max(low, lr / 1.5)
    if 0.0 < kl < target / 2:
        return min(high, lr * 1.5)
    return lr


class PolicyObjective(nn.Module):
    """Minibatch -> (loss, log-ratio (M,), metrics): what is differentiated, and what several processes share."""

    def __init__(self, actor: GaussianChunkActor, config: PolicyConfig) -> None:
        super().__init__()
        self.actor, self.config = actor, config

    def forward(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        config = self.config
        policy = self.actor.distribution(batch.conditions, batch.proprio_BP)
        log_ratio = policy.log_prob(batch.action, batch.executed_BC) - batch.log_prob_B
        loss, clip_fraction = clipped_surrogate(
            log_ratio, batch.advantage_B, config.clip, clip_high=config.clip_high, dual_clip=config.dual_clip
        )
        metrics = {"policy_loss": float(loss.detach()), "clip_fraction": clip_fraction, "kl": kl_estimate(log_ratio)}
        if batch.reference is not None:
            bc_loss = policy.kl_from(batch.reference, batch.action, batch.executed_BC).mean()
            metrics["bc_loss"] = float(bc_loss.detach())
            loss = loss + config.bc_coef * bc_loss
        if batch.demo is not None:
            error_BCA = self.actor.mean(batch.demo.conditions, batch.demo.proprio_BP) - batch.demo.action_BCA
            demo_loss = masked_l1(error_BCA, batch.demo.mask_BC)
            metrics["demo_loss"] = float(demo_loss.detach())
            loss = loss + config.demo_coef * demo_loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * policy.entropy(batch.executed_BC).mean()
        return loss, log_ratio, metrics


class PolicyLearner:
    """An actor, its optimiser, and `improve`: epochs of minibatch steps on a full buffer."""

    objective_class: type[PolicyObjective] = PolicyObjective

    def __init__(
        self,
        actor: GaussianChunkActor,
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
        backbone = [p for name, p in named.items() if name.startswith("model.backbone.")]
        others = [p for name, p in named.items() if name != "log_std" and not name.startswith("model.backbone.")]
        groups = [{"params": others, "lr": config.lr}, {"params": [actor.log_std], "lr": config.log_std_lr}]
        if backbone:
            groups.append({"params": backbone, "lr": config.backbone_lr})
        self._objective = self.team.wrap(self.objective_class(actor, config))
        self.policy_optimiser = torch.optim.Adam([g for g in groups if g["params"]], fused=True)
        self._initial_lrs = [group["lr"] for group in self.policy_optimiser.param_groups]
        self.num_updates = 0
        self.demos: DemoRows | None = None
        """Needed for `demo_coef`; set by whoever has them."""
        self._average = {name: p.detach().clone() for name, p in named.items()} if config.average_decay else {}
        self._imitation = {}
        if config.bc_coef > 0:
            self._imitation = {name: p.detach().clone() for name, p in named.items() if name != "log_std"}

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(loss, log-ratio (M,), metrics) of a minibatch."""
        return self._objective(batch)

    def remember_imitation(self, buffer: Transitions) -> None:
        """Set the buffer's reference means, if the loss is regularised towards imitation."""
        if self._imitation:
            with self._holding(self._imitation):
                buffer.reference_means = self._means(buffer)

    def improve(self, buffer: Transitions) -> dict[str, float]:
        """Epochs of clipped steps, until done or the KL stop; metrics. NonFiniteError names what broke.

        A broken loss or gradient is found before it reaches a parameter.
        """
        config, team, where = self.config, self.team, f"in policy update {self.num_updates}"
        history: list[dict[str, float]] = []
        first_log_ratio, stopped = 0.0, False
        rows = team.total(float(buffer.size))[0] if team.size > 1 else buffer.size
        # as many steps in every process, however many decisions each of them kept
        count = max(1, -(-int(rows) // config.minibatch_size))
        for _ in range(config.epochs):
            for index in buffer.parts(count, self.generator):
                loss, log_ratio, metrics = self._shared_loss(buffer, index, where)
                if not history:
                    first_log_ratio = float(log_ratio.detach().abs().max())
                    exact = self.actor.config.log_prob_dtype == "float32"
                    if team.any(exact and first_log_ratio > MAX_FIRST_LOG_RATIO):
                        raise RuntimeError(
                            f"log-ratio {first_log_ratio:.3f} before the first policy step: the model scored is not "
                            "the one that acted (dropout, bf16 in the head, or parameters changed since the rollout?)"
                        )
                if metrics["kl"] > config.kl_stop:
                    stopped = True
                    break
                if config.kl_target is not None:
                    self._adapt_lr(metrics["kl"], config.kl_target)
                self.policy_optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.policy_parameters, config.max_grad_norm)
                require_finite("grad (norm of the policy's)", norm, where)
                self.policy_optimiser.step()
                self.actor.clamp_std()
                history.append(metrics | {"grad_norm": float(norm)})
            if stopped:
                break
        if self._average:
            current = [p.detach() for _, p in self.actor.named_policy_parameters()]
            average_into(list(self._average.values()), current, config.average_decay)
        averages = {key: sum(row[key] for row in history) / len(history) for key in history[0]} if history else {}
        return averages | {
            "kl_last": metrics["kl"],
            "kl_stopped": float(stopped),
            "policy_steps": float(len(history)),
            "first_log_ratio": first_log_ratio,
            "lr": self.policy_optimiser.param_groups[0]["lr"],
        }

    def _shared_loss(self, buffer: Transitions, index: Tensor, where: str) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Of this process's part of a minibatch, weighted so that the processes' mean is the whole minibatch's."""
        team = self.team
        if team.size == 1:
            loss, log_ratio, metrics = self.policy_loss(self._batch(buffer, index))
            require_finite("loss", loss.detach(), where)
            return loss, log_ratio, metrics
        mine = len(index)
        if not mine:  # every process must take part in the exchange of gradients: with nothing to say, say zero
            index = torch.zeros(1, dtype=torch.int64, device=index.device)
        loss, log_ratio, metrics = self.policy_loss(self._batch(buffer, index))
        totals = team.total(float(mine), *(value * mine for value in metrics.values()))
        if team.any(not torch.isfinite(loss.detach()).all()):
            raise NonFiniteError(f"loss is not finite {where}, in one process at least")
        together = {name: value / max(1.0, totals[0]) for name, value in zip(metrics, totals[1:], strict=True)}
        return loss * (mine * team.size / max(1.0, totals[0])), log_ratio, together

    def _batch(self, buffer: Transitions, index: Tensor) -> PolicyBatch:
        batch = buffer.policy_batch(index)
        if not self.config.demo_coef:
            return batch
        if self.demos is None:
            raise ValueError("demo_coef needs demonstrations: give the run a data set, or set it to 0")
        return replace(batch, demo=self.demos.draw(len(index), self.generator))

    def _adapt_lr(self, kl: float, target: float) -> None:
        main = self.policy_optimiser.param_groups[0]["lr"]
        factor = adapted_lr(main, kl, target) / main
        for group in self.policy_optimiser.param_groups:
            group["lr"] *= factor

    @torch.no_grad()
    def anneal(self) -> None:
        """One update further: the rate follows from the count of updates, the spread moves with what it has learnt."""
        config = self.config
        if not self.num_updates < config.anneal_updates:
            return
        left = 1.0 - (self.num_updates + 1) / config.anneal_updates
        for group, lr in zip(self.policy_optimiser.param_groups, self._initial_lrs, strict=True):
            group["lr"] = lr * (config.lr_final + (1.0 - config.lr_final) * left)
        self.actor.log_std.add_(math.log(config.std_final) / config.anneal_updates)
        self.actor.clamp_std()

    def _means(self, buffer: Transitions) -> Tensor:
        size, step = buffer.size, self.config.minibatch_size
        parts = []
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            policy = self.actor.distribution(buffer.conditions(rows), buffer.flat("proprio")[rows])
            parts.append(policy.means(buffer.flat("action")[rows]))
        return torch.cat(parts)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the actor is the one to be judged and kept: with `average_decay`, that of the mean parameters."""
        return self._holding(self._average)

    @contextmanager
    def _holding(self, others: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the actor has these parameters; outside, everything is as before."""
        current = [p for name, p in self.actor.named_policy_parameters() if name in others]
        kept = [p.detach().clone() for p in current]
        copy_into(current, list(others.values()))
        try:
            yield
        finally:
            copy_into(current, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Trained tensors by name: `policy.*`, and where there are such, `imitation.*`, `average.*` and `scale.*`."""
        out = {f"policy.{name}": p.detach() for name, p in self.actor.named_policy_parameters()}
        if self.actor.scale is not None:
            out |= {f"scale.{name}": t for name, t in self.actor.scale.state_dict().items()}
        out |= {f"imitation.{name}": t for name, t in self._imitation.items()}
        return out | {f"average.{name}": t for name, t in self._average.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`. ValueError when a tensor is missing."""
        scale = {name.removeprefix("scale."): t for name, t in tensors.items() if name.startswith("scale.")}
        if scale:
            self.actor.scale = StateScale.from_tensors(scale).to(self.actor.device)
        for name, target in self.tensors().items():
            if name not in tensors:
                raise ValueError(f"the checkpoint has no tensor {name!r}: another model or configuration made it")
            target.copy_(tensors[name])

    def trainer_state(self) -> dict[str, Any]:
        """What else an exact resume needs: optimiser, random state, count of updates."""
        return {
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
        }

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """Inverse of `trainer_state`."""
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.generator.set_state(state["generator"])
        self.num_updates = state["num_updates"]
