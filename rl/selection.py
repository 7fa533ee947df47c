"""Choosing the policy to keep: evaluations of a run, its best parameters so far, and when to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rl.configs.run import RunnerConfig
from rl.models.actor import ChunkActor
from vla.runtime.distributed import Team


class Selection:
    """Evaluations (update, successes, episodes) so far, and the parameters of the best one."""

    def __init__(self, actor: ChunkActor, folder: Path, team: Team) -> None:
        """`folder` receives the best policy, by the model's own `save`."""
        self.actor, self.folder, self.team = actor, folder, team
        self.evaluations: list[tuple[int, int, int]] = []
        self.best_update = 0
        self.best: dict[str, torch.Tensor] = {}
        """The best parameters by name; empty before the first evaluation."""

    def record(self, update: int, successes: int, episodes: int) -> float:
        """Add this process's counts to an evaluation over all processes and keep the parameters if none was better;
        return the success rate."""
        successes, episodes = (int(n) for n in self.team.total(float(successes), float(episodes)))
        best = max((s / n for _, s, n in self.evaluations), default=-1.0)
        self.evaluations.append((update, successes, episodes))
        if successes / episodes >= best:  # at equal success the later policy has seen more
            self.keep(update)
        return successes / episodes

    def keep(self, update: int) -> None:
        """Remember the actor's parameters as the best, and save the model."""
        self.best_update = update
        self.best = {name: p.detach().clone() for name, p in self.actor.named_policy_parameters()}
        if self.team.rank == 0:
            self.actor.model.save(self.folder)
        self.team.wait()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the actor the best parameters."""
        for name, p in self.actor.named_policy_parameters():
            p.copy_(self.best[name])

    def stop_reason(self, config: RunnerConfig, *, updates: int, env_steps: int, seconds: float) -> str:
        """Return why the run should stop (`RunResult.stopped_by`), or ''. The same in every process."""
        target = config.target_success
        rates = [successes / episodes for _, successes, episodes in self.evaluations[-2:]]
        since_best = sum(update > self.best_update for update, _, _ in self.evaluations)
        reasons = {
            "target": target is not None and len(rates) == 2 and min(rates) >= target,
            "patience": config.patience is not None and since_best >= config.patience,
            "updates": config.max_updates is not None and updates >= config.max_updates,
            "env_steps": config.max_env_steps is not None and env_steps >= config.max_env_steps,
            # clocks differ: if one process has run out of time, all stop
            "seconds": config.max_seconds is not None and self.team.any(seconds >= config.max_seconds),
        }
        return next((name for name, holds in reasons.items() if holds), "")

    def state(self) -> dict[str, Any]:
        """Return the state for an exact resume, without `best`."""
        return {"evaluations": [list(row) for row in self.evaluations], "best_update": self.best_update}

    def load_state(self, state: dict[str, Any], best: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned, and the best parameters."""
        self.evaluations = [tuple(row) for row in state["evaluations"]]
        self.best_update, self.best = state["best_update"], best
