"""A run of RoboFuME's kind: learn from logs, then practise without resets and learn on.

Yang et al. 2023 (arXiv 2310.15145). The policy is a residual on a frozen imitation policy, so that what comes out is an
ordinary checkpoint. A checkpoint of the run is made at every scheduled reset: there no state of the simulator is left
that it would have to hold, and so a run that is resumed there is bit-exactly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from envs.backends.reset_free_env import ResetCounts
from rl.configs.offline import ResetFreeConfig
from rl.offline.agent import Agent
from rl.offline.judges import Judge
from rl.offline.logs import Logs
from rl.offline.practice import Played, Practice, PracticeEnv
from rl.offline.replay import Replay, mixed
from rl.run_checkpoint import frozen_digest, require_same_base
from vla.core.checkpoint import CONFIG, load_checkpoint, save_checkpoint
from vla.core.config import difference, encode
from vla.runtime.locks import locked, refuse_used
from vla.runtime.run_log import Metrics

Evaluate = Callable[[], dict[str, list[int]]]
"""True success of the agent's greedy policy: {task: [successes, episodes]}."""


@dataclass
class Outcome:
    """How a run went."""

    decisions: int = 0
    control_steps: int = 0
    resets: dict[str, int] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """{"decisions", "when", "tasks": {task: [successes, episodes]}}, in the order in which they were made."""
    windows: list[dict[str, Any]] = field(default_factory=list)
    """Counts of the practised episodes (`Played.counts`) in stretches of the run."""


class ResetFreeRun:
    """Learns in `out`: `metrics.jsonl`, `last` to resume from, and `policy`, the checkpoint that comes out."""

    def __init__(
        self,
        agent: Agent,
        env: PracticeEnv,
        logs: Logs,
        judge: Judge,
        config: ResetFreeConfig,
        out: Path,
        *,
        evaluate: Evaluate,
        draws: Draws,
        on_window: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """`draws` are the scenes of the environments' resets."""
        self.agent, self.env, self.logs, self.config, self.out = agent, env, logs, config, out
        self.evaluate, self.draws, self.on_window = evaluate, draws, on_window
        self.exploration = torch.Generator().manual_seed(2 * config.seed + 1)
        self.batches = torch.Generator().manual_seed(2 * config.seed)
        self.practice = Practice(env, agent, judge, generator=self.exploration)
        self.online = Replay(config.decisions + 2 * config.num_envs, config.agent.n_step)
        self.outcome = Outcome()
        self._base = frozen_digest(agent.vla)
        self._window: dict[str, Any] = {}
        self._unsaved = 0
        """Episodes since the last checkpoint."""

    def run(self, *, resume: bool = False) -> Outcome:
        """Learn until the budget is used. ValueError when `out` holds a run and `resume` is not asked, or one of
        another configuration or policy."""
        with locked(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            if refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=resume):
                self._load()
            else:
                self._learn_offline()
            with Metrics(self.out, first_step=self.outcome.decisions, config=encode(self.config)) as log:
                self._begin()
                while self.outcome.decisions < self.config.decisions:
                    self._one_step(log)
                self._close_window(log)
                self._note("end")
            self.outcome.control_steps = self.practice.control_steps
            self.outcome.resets = vars(self.env.counts).copy()
            self.agent.vla.config = replace(self.agent.vla.config, n_action_steps=self.agent.steps)
            self.agent.vla.save(self.out / "policy")
            return self.outcome

    def _learn_offline(self) -> None:
        self._note("start")
        for _ in range(self.config.offline_steps):
            self.agent.update(self.logs.replay.sample(self.config.agent.batch_size, self.batches), self.batches)
        self._note("switch")

    def _begin(self) -> None:
        """A checkpoint, and then a scheduled reset."""
        self._save()
        self.practice.start()

    def _one_step(self, log: Metrics) -> None:
        before = self.outcome.decisions
        played = self.practice.step()
        self.outcome.decisions += self.config.num_envs
        for episode in played:
            self.online.add_episode(episode.steps)
        self._count(played)
        figures: dict[str, float] = {}
        updates = round(self.config.updates_per_decision * self.config.num_envs)
        for _ in range(updates if self.online.size else 0):
            figures |= self.agent.update(self._batch(), self.batches)
        self._window |= figures
        if self._passed(before, self.config.evaluate_every):
            self._note("online")
        if self._passed(before, self.config.window):
            self._close_window(log)
        self._unsaved += len(played)
        if self.env.reset_is_due and self.outcome.decisions < self.config.decisions:
            self._begin()
        elif self.env.save_every and self._unsaved >= self.env.save_every:
            self._save()

    def _passed(self, before: int, every: int) -> bool:
        """True if the decisions since `before` went past a multiple of `every`, which is not the run's end."""
        now = self.outcome.decisions
        return bool(every) and now // every > before // every and now < self.config.decisions

    def _batch(self) -> Any:
        size = self.config.agent.batch_size
        old = round(self.config.logged_share * size)
        return mixed(
            self.logs.replay.sample(max(1, old), self.batches), self.online.sample(max(1, size - old), self.batches)
        )

    def _count(self, played: list[Played]) -> None:
        for episode in played:
            for name, count in episode.counts().items():
                self._window[name] = self._window.get(name, 0) + count

    def _close_window(self, log: Metrics) -> None:
        row = {"decisions": self.outcome.decisions, **self._window, "resets": vars(self.env.counts).copy()}
        self._window = {}
        self.outcome.windows.append(row)
        flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
        log.log(self.outcome.decisions, flat | {f"reset_{name}": n for name, n in row["resets"].items()})
        if self.on_window is not None:
            self.on_window(row)

    def _note(self, when: str) -> None:
        if when not in self.config.evaluate_at:
            return
        row = {"decisions": self.outcome.decisions, "when": when, "tasks": self.evaluate()}
        self.outcome.evaluations.append(row)

    def _save(self) -> None:
        """The run as it is, but for the environments: whoever resumes it begins with a reset."""
        self._unsaved = 0
        tensors = {f"agent.{name}": tensor for name, tensor in self.agent.tensors().items()}
        tensors |= {f"online.{name}": tensor for name, tensor in self.online.tensors().items()}
        state = {
            "agent": self.agent.state(), "outcome": vars(self.outcome), "window": self._window, "base": self._base,
            "counts": vars(self.env.counts), "control_steps": self.practice.control_steps, "draws": self.draws.count,
            "generators": [self.exploration.get_state(), self.batches.get_state()],
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        save_checkpoint(self.out / "last", config=encode(self.config), tensors=tensors, stats={}, trainer_state=state)

    def _load(self) -> None:
        saved = load_checkpoint(self.out / "last")
        ours = encode(self.config)
        for name, value in saved.config.items():
            if name in ours and ours[name] != value:
                option, was, wanted = difference(name, value, ours[name])
                raise ValueError(
                    f"{self.out} was made with {option}={was!r}, now it is {wanted!r}: resume with the same "
                    "configuration or start a new run in another folder"
                )
        state = saved.trainer_state or {}
        require_same_base(self.out, state, self._base)
        torch.set_num_threads(state["threads"])
        parts: dict[str, dict[str, torch.Tensor]] = {"agent": {}, "online": {}}
        for name, tensor in saved.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.agent.load(parts["agent"], state["agent"])
        self.online.load(parts["online"])
        self.outcome = Outcome(**state["outcome"])
        self.env.counts = ResetCounts(**state["counts"])
        self._window, self.draws.count = state["window"], state["draws"]
        self.practice.control_steps = state["control_steps"]
        for generator, value in zip((self.exploration, self.batches), state["generators"], strict=True):
            generator.set_state(value)


class Draws:
    """Scenes of real resets: the k-th drawn follows from the seed and k alone."""

    def __init__(self, seed: int, seeds: tuple[int, int]) -> None:
        """`seeds`: the first scene and one past the last."""
        self.seed, self.seeds, self.count = seed, seeds, 0

    def __call__(self, count: int) -> list[int]:
        """The next `count` scenes."""
        first, self.count = self.count, self.count + count
        low, high = self.seeds
        size = high - low
        return [low + (self.seed * 7919 + 104_729 * k) % size for k in range(first, self.count)]
