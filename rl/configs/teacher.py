"""The privileged teacher: how it is trained from demonstrations, fine-tuned by PPO and distilled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rl.configs.learning import ActorConfig, CriticConfig, PPOConfig


@dataclass(frozen=True)
class TeacherConfig:
    """The privileged teacher: an ensemble of networks, and how each imitates the demonstrations."""

    count: int = 3
    width: int = 256
    steps: int = 3000
    minibatch_size: int = 256
    lr: float = 1e-3
    floor: float = 1e-3
    """Least standard deviation (mostly m) by which an input is divided. A higher floor weakens inputs that hardly vary
    in the demonstrations."""
    origin: Literal["world", "hand"] = "world"
    """Origin of positions in the plane of the table. In the gripper's frame one demonstration serves everywhere."""
    turns: int = 1
    """Number of rotations about the vertical in which every demonstration is imitated. Only with `origin` "hand"."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if min(self.count, self.width, self.steps, self.minibatch_size, self.turns) < 1 or self.floor <= 0:
            return "a teacher's count, width, steps, minibatch_size and turns must be at least 1, its floor above 0"
        if self.turns > 1 and self.origin == "world":
            return 'a teacher\'s demonstrations are turned about its hand: set its origin to "hand", or turns to 1'
        return None


@dataclass(frozen=True)
class TeacherPPOConfig:
    """Fine-tuning of the privileged teacher with PPO before distillation."""

    env_steps: int = 150_000
    """Control steps at most, over all environments; they count towards the run's."""
    enough: float | None = 0.98
    """Success rate at which the teacher is trained no further; it must hold in two consecutive evaluations, to guard
    against noise. None: use all of `env_steps`."""
    look_every: int = 10
    """Updates between evaluations of the teacher. These do not count as control steps: they are not trained on."""
    share: float = 0.5
    """The largest share of the run's seconds and control steps, where they are limited."""
    decisions_per_update: int = 20
    actor: ActorConfig = field(default_factory=lambda: ActorConfig(motion_std=0.2, gripper_std=0.4, correlation=0.5))
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(hidden=(256, 256)))
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            lr=3e-4, critic_lr=1e-3, epochs=8, critic_epochs=5, critic_memory=4, minibatch_size=480, clip=0.2,
            kl_stop=0.05, gamma=0.985, lam=0.5, critic_lam=0.95, time_limit="terminal", critic_warmup=3,
            average_decay=0.8,
        )
    )  # fmt: skip
    """Learning rate and noise are annealed over all updates."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if min(self.env_steps, self.decisions_per_update, self.look_every) < 1 or not 0 < self.share <= 1:
            return (
                "teacher PPO needs at least 1 control step, decisions_per_update and look_every of at least 1, and a "
                "share of the run above 0 and up to 1"
            )
        return self.ppo.problem()


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of the privileged teacher into the policy, after every update."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    practice: TeacherPPOConfig | None = None
    """PPO of the teacher itself, before distillation. None: it stays as imitation made it."""
    steps: int = 60
    """Gradient steps after every update of the policy."""
    minibatch_size: int = 512
    """Decisions per step, over all processes."""
    lr: float = 1e-3
    anneal_updates: int = 250
    """Updates over which the learning rate falls to `lr_final` times its initial value."""
    lr_final: float = 0.05
    memory: int = 24_000
    """The latest decisions, over all processes, from which steps are drawn."""
    max_grad_norm: float = 1.0

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if min(self.steps, self.minibatch_size, self.anneal_updates, self.memory) < 1:
            return "distillation's steps, minibatch_size, anneal_updates and memory must be at least 1"
        return self.teacher.problem() or (self.practice and self.practice.problem())
