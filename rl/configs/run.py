"""One refinement run (`RunnerConfig`) and how it ended (`RunResult`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from rl.configs.learning import ActorConfig, CriticConfig, FilteredConfig, GRPOConfig, PPOConfig
from rl.configs.rewards import ShapingConfig
from rl.configs.teacher import DistillConfig


@dataclass(frozen=True)
class CurriculumConfig:
    """The curriculum: how the tasks of new episodes are drawn."""

    rule: str = "vla-rl"
    """uniform (every task as often as any other), vla-rl, frontier, weakest."""
    temperature: float = 0.5
    """vla-rl: tau. frontier and weakest: 1 as they are, less is sharper."""
    floor: float = 0.2
    """The fraction of every draw that is spread evenly, since a task that is never played is forgotten unnoticed."""
    window: int = 64
    """Episodes of a task whose outcomes count, older ones fading exponentially."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if self.temperature <= 0 or self.window < 1:
            return f"temperature and window must be positive, got {self.temperature} and {self.window}"
        if not 0.0 <= self.floor <= 1.0:
            return f"floor must be in [0, 1], got {self.floor}"
        return None


@dataclass(frozen=True)
class RunnerConfig:
    """One refinement run."""

    suite: str = "tabletop-pick"
    num_envs: int = 48
    """Environments, over all processes."""
    decisions_per_update: int = 10
    """Decisions per environment between updates: the batch is num_envs times this. Unused by methods of whole
    episodes."""
    n_action_steps: int | None = None
    """Control steps of a chunk that are executed (None: as the policy's configuration says)."""
    horizon: int | None = None
    """Control steps of an episode while learning and choosing the best (None: the suite's). Where a task takes 60 of
    the 500 that its suite allows, nearly all steps would go into episodes that have failed already."""
    seed: int = 0
    train_seeds: tuple[int, int] = (0, 1_000_000)
    """First and one past the last scene seed of training episodes; evaluation seeds start at 5,000,000."""
    max_updates: int | None = 200
    """Updates of the policy: a budget that learns as much on a busy machine as on an idle one (None: no limit)."""
    max_env_steps: int | None = None
    """Control steps, over all environments."""
    max_seconds: float | None = None
    """Wall clock of calibration, training and evaluation, including resumed sessions. Beside a number of updates or
    control steps it protects from a machine that is too slow, and is reported where it ends the run (`rl.budget`);
    alone it is the budget, and how much is learnt depends on the machine."""
    eval_every: int = 10
    """Updates between evaluations; the last update is always evaluated, too. Each is also a checkpoint, after which all
    environments are reset."""
    target_success: float | None = 0.97
    """Stop when two evaluations in a row reach this (None: use the whole budget)."""
    patience: int | None = None
    """Consecutive evaluations without a new best after which the run stops (None: never)."""
    calibrate_scales: tuple[float, ...] = (1.0, 0.6, 0.35)
    """Multiples of the initial std to try, largest first; empty: no calibration."""
    calibrate_keep: float = 0.7
    """Take the largest scale whose sampled success is at least this fraction of greedy success."""
    calibrate_episodes: int = 48
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    method: FilteredConfig | GRPOConfig | None = None
    """Learn by this instead of PPO."""
    guide: DistillConfig | None = None
    """Distil a privileged teacher into the policy, too (PPO only). Needs demonstrations with the simulator's state."""
    curriculum: CurriculumConfig | None = None
    """Draw tasks by how they succeed (None: as the seeds say, each as often as any other)."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation of the environments, as `vla rl --randomise` takes it, which replaces it."""
    word_noise: float = 0.0
    """Noise on the words that the policy hears while it learns, an episode's each its own, as a multiple of that which
    the backbone `small` was pre-trained with: for instructions in words that no training has. 0: none, and backbones
    without such a pre-training hear none."""
    shaping: ShapingConfig | None = None
    """Add a learnt reward for progress (PPO only). None: the environment's reward alone."""
    trackers: tuple[str, ...] = ()
    """Besides metrics.jsonl: tensorboard, wandb, trackio."""


BUDGET_FIELDS = frozenset(
    {"max_updates", "max_env_steps", "max_seconds", "target_success", "patience", "calibrate_scales", "trackers"}
)
"""Fields that may differ between a run and its continuation; any other makes it another run."""


@dataclass(frozen=True)
class RunResult:
    """The end of a run. `evaluations` are (update, successes, episodes), the first before any update."""

    updates: int
    env_steps: int
    seconds: float
    std_scale: float
    best_update: int
    evaluations: tuple[tuple[int, int, int], ...]
    stopped_by: str
    """"target", "patience", "updates", "env_steps" or "seconds"."""
