"""The agent: a residual on a frozen VLA's chunks as actor, twin critics of chunks, and one step of learning both."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from rl.configs.offline import AgentConfig
from rl.models.distribution import ChunkGaussian
from rl.offline.algorithms import BY_NAME, Opinion, Values
from rl.offline.critics import TwinCritics
from rl.offline.inputs import AgentInput
from rl.offline.replay import Transition
from vla.model.model import VLA


class Agent:
    """Off-policy actor-critic whose actor is the VLA's residual (`vla.model.heads.residual`): the policy that comes out
    is an ordinary checkpoint. At the start its actions are those of imitation."""

    def __init__(self, vla: VLA, action_names: Sequence[str], steps: int, config: AgentConfig, *, seed: int) -> None:
        """`vla` gets a residual unless it has one, and everything else of it is frozen; `steps` are executed of a
        chunk. ValueError for values that make no agent."""
        if problem := config.problem():
            raise ValueError(problem)
        vla.add_refiner(config.refiner_width, seed=seed)
        assert vla.refiner is not None
        vla.eval().requires_grad_(False)
        vla.refiner.requires_grad_(True)
        self.vla, self.config, self.steps, self.seed = vla, config, steps, seed
        self.algorithm = BY_NAME[config.algorithm]
        std = [config.gripper_std if "gripper" in name else config.motion_std for name in action_names]
        self.std_A = torch.tensor(std)
        spec = vla.action_spec
        bounds = torch.tensor([spec.low, spec.high])
        self.low_A, self.high_A = vla.processor.normalise_action(bounds)
        self.critics: TwinCritics | None = None
        self.targets: TwinCritics | None = None
        self.updates = 0
        self.actor_optimiser = torch.optim.Adam(vla.refiner.parameters(), lr=config.lr, fused=True)
        self.critic_optimiser: torch.optim.Optimizer | None = None

    def _critics(self, state_dim: int) -> tuple[TwinCritics, TwinCritics, torch.optim.Optimizer]:
        """The critics, their moving average and optimiser, made when it is known what they read."""
        if self.critics is None or self.targets is None or self.critic_optimiser is None:
            width = self.steps * len(self.std_A)
            self.critics = TwinCritics(state_dim, width, self.config.critic_width, seed=self.seed)
            self.targets = deepcopy(self.critics).requires_grad_(False)
            self.critic_optimiser = torch.optim.Adam(self.critics.parameters(), lr=self.config.critic_lr, fused=True)
        return self.critics, self.targets, self.critic_optimiser

    def mean(self, seen: AgentInput) -> Tensor:
        """The policy's mean chunk (B, n, A), normalised."""
        assert self.vla.refiner is not None
        return seen.base_BnA + self.vla.refiner(seen.latents, seen.proprio_BP)

    def policy(self, mean_BnA: Tensor) -> ChunkGaussian:
        """The distribution around a mean."""
        return ChunkGaussian(mean_BnA, self.std_A.log(), self.config.correlation)

    def bounded(self, action: Tensor) -> Tensor:
        """The action as it is executed."""
        return torch.minimum(torch.maximum(action, self.low_A), self.high_A)

    @torch.no_grad()
    def act(self, seen: AgentInput, generator: torch.Generator, *, noise: float = 1.0) -> Tensor:
        """A chunk (B, n, A), normalised and within bounds."""
        return self.bounded(self.policy(self.mean(seen)).sample(generator, std_scale=noise))

    @torch.no_grad()
    def value(self, seen: AgentInput) -> Tensor:
        """(B,) what the critics expect of the policy's mean action."""
        state = seen.state()
        critics, _, _ = self._critics(state.shape[1])
        return critics(state, self.bounded(self.mean(seen)).flatten(1)[:, None]).amin(0)[:, 0]

    def update(self, batch: Transition, generator: torch.Generator) -> dict[str, float]:
        """One step of the critics, and of the actor at every `actor_every`-th call."""
        state = batch.now.state()
        critics, targets, optimiser = self._critics(state.shape[1])
        with torch.no_grad():
            target_B = self._target(batch, targets, generator)
            mean_BnA = self.mean(batch.now)
        done_B1a = batch.action_BnA.flatten(1)[:, None]
        of_data_2B = critics(state, done_B1a)[..., 0]
        temporal = (of_data_2B - target_B).square().mean(1).sum()
        penalty = temporal.new_zeros(())
        if self.algorithm.penalty is not None:
            penalty = self.algorithm.penalty(self._values(state, mean_BnA, batch, of_data_2B, generator), self.config)
        optimiser.zero_grad(set_to_none=True)
        (temporal + self.config.penalty * penalty).backward()
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(targets.parameters(), critics.parameters(), strict=True):
                slow.lerp_(fast, self.config.target_rate)
        self.updates += 1
        figures = {"temporal": temporal.item(), "penalty": penalty.item(), "value": of_data_2B.mean().item()}
        if self.updates % self.config.actor_every == 0:
            figures |= self._improve(batch, state, generator)
        return figures

    def _target(self, batch: Transition, targets: TwinCritics, generator: torch.Generator) -> Tensor:
        """r + gamma^n min Q'(s', a'): between 0 and 1, as the rewards are."""
        following = self.bounded(self.policy(self.mean(batch.after)).sample(generator)).flatten(1)[:, None]
        value = targets(batch.after.state(), following).amin(0)[:, 0]
        return (batch.reward_B + batch.discount_B * value).clamp(0.0, 1.0)

    def _values(
        self, state: Tensor, mean_BnA: Tensor, batch: Transition, of_data_2B: Tensor, generator: torch.Generator
    ) -> Values:
        count, reach = self.config.samples, self.config.reach * self.std_A
        many = mean_BnA.repeat_interleave(count, 0)
        drawn = self.bounded(self.policy(many).sample(generator))
        anywhere = 2 * torch.rand(many.shape, generator=generator) - 1
        random = self.bounded(batch.now.base_BnA.repeat_interleave(count, 0) + reach * anywhere)
        both = torch.cat([part.reshape(len(state), count, -1) for part in (drawn, random)], 1)
        assert self.critics is not None
        of_both = self.critics(state, both)
        return Values(of_both, of_data_2B, batch.returned_B)

    def _improve(self, batch: Transition, state: Tensor, generator: torch.Generator) -> dict[str, float]:
        """One step of the actor."""
        assert self.critics is not None
        self.critics.requires_grad_(False)
        mean = self.mean(batch.now)
        policy = self.policy(mean)
        drawn = self.bounded(policy.sample(generator)).flatten(1)[:, None]
        value_B = self.critics(state, drawn).amin(0)[:, 0]
        with torch.no_grad():
            of_data_B = self.critics(state, batch.action_BnA.flatten(1)[:, None]).amin(0)[:, 0]
        departure = ((mean - batch.now.base_BnA) / self.std_A).square().mean((1, 2))
        log_prob_B = policy.log_prob(batch.action_BnA, batch.executed_Bn) / batch.action_BnA[0].numel()
        opinion = Opinion(
            value_B=value_B, log_prob_B=log_prob_B, departure_B=departure, succeeded_B=batch.returned_B > 0,
            advantage_B=of_data_B - value_B.detach(),
        )  # fmt: skip
        loss = self.algorithm.improvement(opinion, self.config)
        self.actor_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.actor_optimiser.step()
        self.critics.requires_grad_(True)
        return {"policy_value": value_B.mean().item(), "departure": departure.mean().item()}

    def tensors(self) -> dict[str, Tensor]:
        """The learnt tensors: residual, critics and their averages."""
        assert self.vla.refiner is not None
        parts = {"refiner": self.vla.refiner, "critics": self.critics, "targets": self.targets}
        return {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            if module is not None
            for name, tensor in module.state_dict().items()
        }

    def state(self) -> dict[str, Any]:
        """Everything else that learning goes on from."""
        optimiser = self.critic_optimiser
        return {
            "updates": self.updates,
            "actor": self.actor_optimiser.state_dict(),
            "critics": None if optimiser is None else optimiser.state_dict(),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `tensors` and `state` gave."""
        assert self.vla.refiner is not None
        first = tensors.get("critics.both.0.of_state.weight")
        parts: dict[str, torch.nn.Module] = {"refiner": self.vla.refiner}
        if first is not None:
            critics, targets, optimiser = self._critics(first.shape[1])
            parts |= {"critics": critics, "targets": targets}
            optimiser.load_state_dict(state["critics"])
        for part, module in parts.items():
            prefix = f"{part}."
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.actor_optimiser.load_state_dict(state["actor"])
        self.updates = state["updates"]
