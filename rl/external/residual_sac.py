"""Residual SAC: a frozen VLA plans chunks, a small network corrects every control step, learnt off-policy.

a = clip(a_VLA + alpha * residual), in normalised action units. The residual sees proprio, the action it corrects, where
in the chunk that is, and the latents that the VLA's own head read. Policy Decorator (Yuan et al. 2024, arXiv
2412.13630), ResFiT (Ankile et al. 2025, arXiv 2509.19301). Learning is Stable-Baselines3's SAC. Extra: `sb3`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from rl.external.sb3 import SAC, LayerNormCritics, StateVecEnv, fill_replay, leave_no_log
from vla.core.disk import writing
from vla.core.types import ActionChunk, Observation, Policy, PolicySpec, Prefix, StepResult, VecEnv
from vla.model.advantage import refuse_guided
from vla.model.model import VLA


@dataclass(frozen=True)
class ResidualConfig:
    """Residual SAC. Defaults after Policy Decorator and RLPD."""

    alpha: float = 0.2
    """Largest correction, in normalised action units ([-1, 1] spans the demonstrations)."""
    n_action_steps: int | None = None
    """Control steps between two looks of the VLA (None: as its configuration says)."""
    gamma: float = 0.99
    """Per control step."""
    n_step: int = 3
    updates_per_step: float = 0.25
    """Gradient steps per control step of one environment."""
    batch_size: int = 256
    buffer_size: int = 200_000
    learning_starts: int = 2_000
    """Control steps, over all environments, of random corrections before learning."""
    width: int = 256
    num_critics: int = 4
    lr: float = 3e-4
    entropy: str = "auto_0.01"
    demo_episodes: int = 48
    """Episodes of the uncorrected policy (or of a demonstrator) put into the buffer first."""

    def problem(self) -> str | None:
        """Return a sentence naming the first invalid value, or None."""
        if not 0 < self.alpha <= 1:
            return f"alpha must be in (0, 1], got {self.alpha}"
        if self.updates_per_step <= 0 or self.n_step < 1:
            return "updates_per_step must be positive and n_step at least 1"
        return None


class Plans:
    """The frozen VLA's current chunk in each of N environments, and the corrector's inputs from it."""

    def __init__(self, vla: VLA, num_envs: int, n_action_steps: int | None = None) -> None:
        steps = n_action_steps or vla.config.n_action_steps or vla.chunk_size
        if not 1 <= steps <= vla.chunk_size:
            raise ValueError(f"n_action_steps must be in 1..{vla.chunk_size} (the chunk size), got {steps}")
        refuse_guided(vla)
        self.vla, self.n_action_steps = vla.eval().requires_grad_(False), steps
        self.at = np.zeros(num_envs, np.int64)
        """Step of the plan that comes next."""
        points = vla.backbone.num_queries * vla.point_dim
        self._chunk = np.zeros((num_envs, vla.chunk_size, vla.action_dim), np.float32)
        self._latent = np.zeros((num_envs, vla.chunk_size, vla.bridge.width), np.float32)
        self._points = np.zeros((num_envs, points), np.float32)

    @property
    def state_dim(self) -> int:
        """Width S of `state`."""
        return (
            self.vla.processor.proprio_width + self._chunk.shape[2] + 1 + self._latent.shape[2] + self._points.shape[1]
        )

    @torch.no_grad()
    def look(self, obs: Observation, ids: Sequence[int]) -> None:
        """Plan a new chunk in environments `ids`, from their images in `obs` (of all environments)."""
        inp = self.vla.processor.prepare(obs.select(list(ids)))
        proprio = inp.proprio_BP.to(self.vla.device)
        latents = self.vla.condition(self.vla.encode(inp), proprio)
        rows = list(ids)
        self._chunk[rows] = self.vla.act_on(latents, proprio).float().cpu().numpy()
        self._latent[rows] = torch.nn.functional.layer_norm(
            latents.latent_BCD, latents.latent_BCD.shape[-1:]
        ).cpu().numpy()  # fmt: skip
        self._points[rows] = latents.points_BE.cpu().numpy()
        self.at[rows] = 0

    def action(self) -> NDArray[np.float32]:
        """Return the VLA's present action (N, A), normalised."""
        return self._now(self._chunk)

    def state(self, obs: Observation) -> NDArray[np.float32]:
        """Return the corrector's input (N, S)."""
        proprio = self.vla.processor.normalise_proprio(obs.proprio).numpy()
        phase = (self.at / self.n_action_steps)[:, None]
        parts = (proprio, self.action(), phase, self._now(self._latent), self._points)
        return np.concatenate(parts, 1).astype(np.float32)

    def corrected(self, residual: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
        """Return the corrected action (N, 1, A) in environment units."""
        return self.vla.processor.unnormalise_action((self.action() + alpha * residual)[:, None].astype(np.float32))

    def _now(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        # a finished environment's plan may have run out: its last step stands
        return rows[np.arange(len(rows)), np.minimum(self.at, rows.shape[1] - 1)]


class ResidualVecEnv(StateVecEnv):
    """The environments as a corrector of the VLA sees them. Images are rendered only when the VLA plans."""

    def __init__(self, env: VecEnv, vla: VLA, config: ResidualConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or ResidualConfig()
        if problem := self.config.problem():
            raise ValueError(problem)
        self.plans = Plans(vla, env.num_envs, self.config.n_action_steps)
        self._tick = 0
        self.control_steps = 0
        super().__init__(env, seed=seed)

    def _state_dim(self) -> int:
        return self.plans.state_dim

    def _action_space(self, bounds: spaces.Box) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, bounds.shape, np.float32)

    def _state(self, obs: Observation) -> NDArray[np.float32]:
        return self.plans.state(obs)

    def _begin(self, ids: Sequence[int]) -> Observation:
        self.env.set_rendering(True)
        obs = super()._begin(ids)
        self.plans.look(obs, ids)
        return obs

    def _step(self, actions: NDArray[np.float32]) -> StepResult:
        # All environments plan at the same ticks (and at their own resets): one batch for the VLA, one render of all.
        self._tick += 1
        looking = self._tick % self.plans.n_action_steps == 0
        self.env.set_rendering(looking)
        result = self.env.step_chunk(self.plans.corrected(actions, self.config.alpha))
        self.control_steps += int(result.n_steps.sum())
        self.plans.at += 1
        if looking:
            self.plans.look(result.obs, range(self.num_envs))
        return result

    def action_of(self, env_action: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the residual (B, A) in [-1, 1] that brings the VLA's action nearest to `env_action`."""
        wanted = self.plans.vla.processor.normalise_action(env_action[:, None])[:, 0]
        return np.clip((wanted - self.plans.action()) / self.config.alpha, -1.0, 1.0).astype(np.float32)


class _Uncorrected:
    """The VLA alone, as a demonstrator for `fill_replay`."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self.spec = PolicySpec(plans.vla.action_spec, chunk_size=1, n_action_steps=1)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Do nothing: the plans belong to the environment and are renewed there."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the VLA's own action (B, 1, A) with a residual of zero."""
        return self._plans.corrected(np.zeros_like(self._plans.action()), 0.0)


class ResidualPolicy:
    """VLA and corrector as a `vla.core.types.Policy`: chunks of one step, one plan per environment."""

    def __init__(self, vla: VLA, model: SAC | None, config: ResidualConfig, num_envs: int) -> None:
        """`model` None: the VLA alone, step by step."""
        self.model, self.config = model, config
        self._plans = Plans(vla, num_envs, config.n_action_steps)
        self.spec = PolicySpec(vla.action_spec, chunk_size=1, n_action_steps=1)
        self.reset()

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Request a new plan for these environments before their next action."""
        self._plans.at[slice(None) if env_ids is None else list(env_ids)] = self._plans.n_action_steps

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the corrected actions (B, 1, A)."""
        stale = np.flatnonzero(self._plans.at >= self._plans.n_action_steps)
        if len(stale):
            self._plans.look(obs, stale.tolist())
        residual = np.zeros_like(self._plans.action())
        if self.model is not None:
            residual, _ = self.model.predict(self._plans.state(obs), deterministic=True)
        action = self._plans.corrected(residual, self.config.alpha)
        self._plans.at += 1
        return action


def learn_residual(
    env: VecEnv,
    vla: VLA,
    config: ResidualConfig,
    *,
    control_steps: int,
    seed: int = 0,
    demonstrator: Policy | None = None,
    judge: Callable[[SAC], float] | None = None,
    checkpoints: int = 1,
) -> tuple[SAC, dict[str, Any]]:
    """SAC on the residual for `control_steps` (those that fill the buffer included): (model, figures).

    With a `judge`, which must not use `env`, the best by its score of `checkpoints` evenly spaced models is returned.

    `demonstrator`'s episodes are put into the buffer first, as nearly as a correction of at most alpha can follow them;
    None: the VLA's own, uncorrected.
    """
    worlds = ResidualVecEnv(env, vla, config, seed=seed)
    try:
        per_call = max(1, round(config.updates_per_step * env.num_envs))
        model = SAC(
            LayerNormCritics, worlds, learning_rate=config.lr, buffer_size=config.buffer_size,
            learning_starts=config.learning_starts, batch_size=config.batch_size, gamma=config.gamma, train_freq=1,
            gradient_steps=per_call, n_steps=config.n_step, ent_coef=config.entropy, seed=seed, device="cpu",
            policy_kwargs={"net_arch": [config.width, config.width], "n_critics": config.num_critics},
        )  # fmt: skip
        leave_no_log(model)
        stored = successes = 0
        if config.demo_episodes:
            first = demonstrator or _Uncorrected(worlds.plans)
            stored, successes = fill_replay(model, first, config.demo_episodes)
        best, best_score = None, -np.inf
        for part in range(checkpoints):
            # counted by the worlds: what the buffer was filled with is part of the budget
            goal = stored + (control_steps - stored) * (part + 1) // checkpoints
            left = max(0, goal - worlds.control_steps)
            model.learn(left, log_interval=None, reset_num_timesteps=part == 0)  # type: ignore[arg-type]
            if judge is not None and (score := judge(model)) >= best_score:
                best, best_score = deepcopy(model.get_parameters()), score
        if best is not None:
            model.set_parameters(best)
    finally:
        worlds.close()
    return model, {"stored": stored, "stored_successes": successes, "control_steps": worlds.control_steps}


def save_residual(model: SAC, folder: Path) -> Path:
    """The corrector's file in `folder`; the VLA it belongs to has its own checkpoint."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "residual.zip")
    return folder / "residual.zip"
