"""The privileged teacher: how it is trained from demonstrations, fine-tuned by PPO and distilled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rl.configs.learning import ActorConfig, CriticConfig, PPOConfig


@dataclass(frozen=True)
class TeacherConfig:
    """Networks that are averaged, and how each is trained."""

    count: int = 3
    width: int = 256
    steps: int = 3000
    minibatch_size: int = 256
    lr: float = 1e-3
    floor: float = 1e-3
    """What has varied less than this counts as varying so much (m, mostly): more, and what the demonstrations hardly
    vary says less when it does."""
    origin: Literal["world", "hand"] = "world"
    """Where places in the plane of the table are measured from. From the hand, one demonstration serves everywhere."""
    turns: int = 1
    """Imitate every demonstration also turned about the vertical, so many ways in all. Only with `origin` "hand"."""

    def problem(self) -> str | None:
        """What is wrong with this configuration, or None."""
        if min(self.count, self.width, self.steps, self.minibatch_size, self.turns) < 1 or self.floor <= 0:
            return "a teacher's count, width, steps, minibatch_size and turns must be at least 1, its floor above 0"
        if self.turns > 1 and self.origin == "world":
            return 'a teacher\'s demonstrations are turned about its hand: set its origin to "hand", or turns to 1'
        return None


@dataclass(frozen=True)
class TeacherPPOConfig:
    """How long a teacher practises, and how it learns from it."""

    env_steps: int = 150_000
    """Control steps at most, over all worlds; they count as the run's own."""
    enough: float | None = 0.98
    """Success rate of the teacher at which it need not practise. To end practice it must be seen twice running: of many
    looks one is lucky. None: all of `env_steps`."""
    look_every: int = 10
    """Updates after which its success is looked at. These episodes are no control steps of the run: nobody learns."""
    share: float = 0.5
    """Of the run's seconds and control steps, if they are limited: no more is spent on practice."""
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
    """Learning rate and noise shrink over the whole practice."""

    def problem(self) -> str | None:
        """What is wrong with this configuration, or None."""
        if min(self.env_steps, self.decisions_per_update, self.look_every) < 1 or not 0 < self.share <= 1:
            return (
                "a teacher practises at least 1 control step, by at least 1 decision per update, looks after 1 update "
                "or more, and takes a share of the run above 0 and up to 1"
            )
        return self.ppo.problem()


@dataclass(frozen=True)
class DistillConfig:
    """How much, and from how many decisions, is learnt from the teacher."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    practice: TeacherPPOConfig | None = None
    """Before it teaches, the teacher itself learns from the reward. None: it is left as imitation made it."""
    steps: int = 60
    """After every update."""
    minibatch_size: int = 512
    """Decisions per step, over all processes."""
    lr: float = 1e-3
    anneal_updates: int = 250
    """The learning rate falls to `lr_final` of itself over so many updates."""
    lr_final: float = 0.05
    memory: int = 24_000
    """The latest decisions, over all processes, from which steps are drawn."""
    max_grad_norm: float = 1.0

    def problem(self) -> str | None:
        """What is wrong with this configuration, or None."""
        if min(self.steps, self.minibatch_size, self.anneal_updates, self.memory) < 1:
            return "a guide's steps, minibatch_size, anneal_updates and memory must be at least 1"
        return self.teacher.problem() or (self.practice and self.practice.problem())
