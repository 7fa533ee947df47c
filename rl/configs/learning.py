"""Configuration of the actor, the critic and the algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ActorConfig:
    """The noise, of Gaussians in normalised action units ([-1, 1] spans the demonstrations), and what learns."""

    motion_std: float = 0.2
    gripper_std: float = 0.3
    """A value of its own: the environment reads only the sign, so small noise there explores nothing."""
    std_min: float = 0.03
    std_max: float = 0.5
    noise: Literal["action", "flow", "tokens"] = "action"
    """On the chunk itself, or between the denoising steps of a flow head, which then learns as a chain of normals, or
    in the choice of the bins of a head `bins` or `frequencies`."""
    temperature: float = 1.0
    """The logits are divided by it where tokens are drawn and scored. No gradient changes it; VLA-RL has 1.5."""
    correlation: float = 0.0
    """Correlation of the noise of neighbouring steps in a chunk (an AR(1) process with the spread above); 0: none."""
    log_prob_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 exists for comparison: at small standard deviations its rounding alone leaves the clip range."""
    refiner_width: int = 0
    """Train only a residual of this width on the action, or with noise "tokens" on the logits
    (`vla.model.heads.residual`), all else frozen. 0: as `trains` says."""
    trains: Literal["head", "bridge"] = "bridge"
    """The head alone, or bridge and head. The backbone is always frozen."""

    def init_std(self, action_names: Sequence[str]) -> tuple[float, ...]:
        """One initial standard deviation per action component; those called '...gripper...' get `gripper_std`."""
        return tuple(self.gripper_std if "gripper" in name else self.motion_std for name in action_names)


@dataclass(frozen=True)
class CriticConfig:
    """The value network, one value a decision. No gradient of it ever reaches the policy."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers."""
    reads: Literal["privileged", "latents"] = "privileged"
    """The simulator's state, which the policy never sees, or the policy's own latents, detached, as in VL-DAC: where an
    environment tells no state. Both see the clock."""


@dataclass(frozen=True)
class PolicyConfig:
    """Shared by all algorithms that improve a policy on decisions with advantages."""

    lr: float = 2e-4
    """Learning rate of the trained part of the network."""
    log_std_lr: float = 2e-4
    """Learning rate of the logarithm of the standard deviation."""
    epochs: int = 4
    minibatch_size: int = 128
    """Decisions per step, over all processes."""
    ratio: Literal["chunk", "token"] = "chunk"
    """The unit whose probability ratio is clipped: the whole chunk, its executed control steps jointly, as in VLA-RL;
    or, with noise "tokens", each token by itself, as in VL-DAC and SimpleVLA-RL."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    clip_high: float | None = None
    """Another bound upwards ("clip-higher", Yu et al. 2025): unlikely actions that worked gain more. None: `clip`."""
    dual_clip: float | None = None
    """With a negative advantage, ignore ratios above this (Ye et al. 2020). None: no bound."""
    kl_stop: float = 0.03
    """No further policy step in this update once a minibatch's KL estimate is above it."""
    max_grad_norm: float = 0.5
    anneal_updates: int = 0
    """Updates over which the learning rate shrinks to a tenth and the noise to a half (0: both stay). Near full success
    most of the gradient is noise, and most failures come from exploration."""
    average_decay: float = 0.0
    """Judge and keep a running mean of the policy's parameters, of which so much stays at every update (0: the last of
    them). Where steps are mostly noise, their mean is the better policy (Polyak and Juditsky 1992)."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if not 0.0 <= self.average_decay < 1.0:
            return f"average_decay must be in [0, 1), got {self.average_decay}"
        if self.dual_clip is not None and self.dual_clip <= 1:
            return f"dual_clip bounds a ratio from above and must be more than 1, got {self.dual_clip}"
        return None


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """Chunk-level PPO. The defaults learn within minutes on two CPU cores."""

    critic_lr: float = 1e-3
    critic_epochs: int = 4
    critic_memory: int = 1
    """Rollouts whose states and targets the critic learns from, the newest among them: a policy changes little from one
    to the next, and a critic that has seen more makes a smaller `lam` trustworthy."""
    critic_lam: float | None = None
    """`lam` of the critic's targets (None: the same). With a small `lam` it would learn from its own guesses; Yue et
    al. 2025 (VC-PPO, arXiv 2503.01491) give the two their own, too."""
    gamma: float = 0.97
    """Discount per decision (action chunk)."""
    lam: float = 0.95
    """GAE lambda of the advantages: lower relies more on the critic, since the rest is mostly the luck of later
    decisions."""
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    """The value of a truncated episode's last state: the critic's estimate, or 0 where finishing in time is itself the
    task. Pardo et al. 2018, "Time limits in reinforcement learning"."""
    critic_warmup: int = 4
    """First updates that train the critic alone: advantages of a random critic would destroy the imitation policy."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if self.critic_memory < 1:
            return f"critic_memory counts rollouts, the newest among them: at least 1, got {self.critic_memory}"
        return super().problem()


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """One advantage per episode, the same for all of its decisions."""

    clip_high: float | None = 0.28
    group_size: int = 8
    """Episodes that share their initial state."""
    baseline: Literal["grpo", "rloo"] = "grpo"
    """(R - mean) / std of the group, or R minus the mean of the others."""
    keep: tuple[float, float] = (0.1, 0.9)
    """Range of a group's success rate, inclusive, for it to be used. Groups with equal outcomes give no gradient."""
    episodes_per_update: int = 96
    """Episodes to keep, over all processes: rollouts continue until there are as many."""
    max_rounds: int = 4
    """But no more than these in one update: a policy that always succeeds has no mixed groups left."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        low, high = self.keep
        if self.group_size < 2:
            return f"group_size must be at least 2, got {self.group_size}: one episode has no others to compare with"
        if not 0.0 <= low <= high <= 1.0:
            return f"keep must be an increasing pair within [0, 1], got {self.keep}"
        if self.max_rounds < 1 or self.episodes_per_update < 1:
            return "max_rounds and episodes_per_update must be at least 1"
        return super().problem()


@dataclass(frozen=True)
class FilteredConfig(PolicyConfig):
    """Maximum likelihood of the successful episodes' decisions. The spread stays: likelihood alone would shrink it."""

    log_std_lr: float = 0.0
    kl_stop: float = 1e9
    episodes_per_update: int = 48
    """Successful ones, over all processes."""
    max_rounds: int = 4
    """Rounds of episodes played in one update at most."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if self.ratio != "chunk":
            return f"filtered imitation has no ratio: leave it at 'chunk', got {self.ratio!r}"
        return super().problem()
