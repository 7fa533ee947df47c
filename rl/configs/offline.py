"""Offline and then online learning without resets: the agent (`AgentConfig`) and a run of it (`ResetFreeConfig`)."""

from __future__ import annotations

from dataclasses import dataclass, field

ALGORITHMS = ("cal-ql", "cql", "awac", "rlpd", "filtered")
REWARDS = ("classifier", "simulator", "shuffled")


@dataclass(frozen=True)
class AgentConfig:
    """An off-policy actor-critic over action chunks. Rewards are 0 or 1, so values lie in [0, 1]."""

    algorithm: str = "cal-ql"
    """cal-ql: conservative values, pushed down no further than what the data returned (Nakamoto et al. 2023); cql: the
    same without that bound; awac: imitation weighted by advantages; rlpd: neither, half of every batch logged data;
    filtered: imitation of what was rewarded in the end, the baseline of them all."""
    refiner_width: int = 128
    """Width of the residual on the VLA's actions: all of the policy that learns."""
    critic_width: int = 128
    gamma: float = 0.98
    """Discount of a control step; that of a chunk of n steps is its n-th power."""
    n_step: int = 4
    """Chunks until the value that a critic's target goes on with."""
    lr: float = 5e-4
    critic_lr: float = 5e-4
    batch_size: int = 128
    target_rate: float = 0.02
    """Share of the critics in the moving average that the targets are computed with."""
    actor_every: int = 2
    """Critic updates for each of the actor."""
    motion_std: float = 0.1
    """Standard deviation of the policy's actions, normalised units."""
    gripper_std: float = 0.3
    correlation: float = 0.5
    """Correlation of the noise of neighbouring control steps."""
    anchor: float = 0.005
    """Weight of the squared residual, in standard deviations, beside the value: stay near the imitation policy."""
    penalty: float = 0.1
    """Weight of the conservative penalty."""
    temperature: float = 0.1
    """Temperature of its soft maximum over actions."""
    samples: int = 4
    """Actions of the policy, and as many random ones, that the penalty looks at in each state."""
    reach: float = 6.0
    """How far from the imitation policy random actions lie at most, in standard deviations."""
    advantage_scale: float = 0.1
    """AWAC's temperature: an advantage of this size has e times the weight."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if self.algorithm not in ALGORITHMS:
            return f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}"
        for name in ("gamma", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                return f"{name} must be in (0, 1], got {getattr(self, name)}"
        if self.n_step < 1:
            return f"n_step must be at least 1, got {self.n_step}"
        for name in ("motion_std", "gripper_std", "temperature", "advantage_scale", "lr", "critic_lr"):
            if getattr(self, name) <= 0:
                return f"{name} must be positive, got {getattr(self, name)}"
        return None


@dataclass(frozen=True)
class ClassifierConfig:
    """Training and calibration of a success classifier."""

    width: int = 128
    steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.2
    held_out: float = 0.3
    """Share of the episodes that only choose the threshold."""
    patience: int = 2
    """Frames in a row that must be classified as done before the episode counts as a success."""
    false_positives: float = 0.05
    """Share of the held-out episodes that may be taken for successes before they are."""


@dataclass(frozen=True)
class ResetFreeConfig:
    """A run: logged data, offline steps, then practice without resets."""

    suite: str = "tabletop-tray"
    pair: tuple[str, str] = ("into-tray", "out-of-tray")
    """A task of the suite and the one that undoes it."""
    num_envs: int = 16
    reward: str = "classifier"
    """Who says that a task is done while practising: a classifier learnt from the logs, the simulator, or, as a control
    that must fail, a classifier learnt from shuffled labels."""
    rewarded_by: str | None = None
    """A digest of the classifiers that reward, where they were not learnt from the logs."""
    n_action_steps: int = 4
    """Control steps of a chunk that are executed."""
    horizon: int | None = None
    """Control steps of an episode (None: the suite's)."""
    reset_every: int = 25
    """Episodes of an environment between real resets."""
    logged_episodes: int = 96
    """Episodes of the imitation policy, successes and failures, that are logged before learning."""
    offline_steps: int = 2000
    """Critic updates on the logged data and the demonstrations."""
    decisions: int = 10_000
    """Chunks executed online, over all environments."""
    updates_per_decision: float = 0.5
    """Critic updates for each of them."""
    logged_share: float = 0.5
    """Part of every online batch that is logged data."""
    evaluate_at: tuple[str, ...] = ("start", "switch", "online", "end")
    """When true success is measured: before anything is learnt, between offline and online learning, every
    `evaluate_every` decisions, and at the end."""
    evaluate_every: int = 0
    """Decisions between evaluations while it learns online; 0: none."""
    window: int = 1600
    """Decisions over which the practised episodes are counted together."""
    seed: int = 0
    """Seed of scenes, exploration, batches and fresh weights."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if self.reward not in REWARDS:
            return f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}"
        if not 0 <= self.logged_share < 1:
            return f"logged_share must be in [0, 1), got {self.logged_share}"
        for name in ("num_envs", "n_action_steps", "reset_every", "logged_episodes", "decisions", "window"):
            if getattr(self, name) < 1:
                return f"{name} must be at least 1, got {getattr(self, name)}"
        return self.agent.problem()
