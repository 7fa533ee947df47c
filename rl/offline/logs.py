"""The logs that are there before any learning: demonstrations, and the imitation policy's episodes with outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.configs.offline import ResetFreeConfig
from rl.offline.agent import Agent
from rl.offline.judges import SimulatorJudge
from rl.offline.practice import Practice, PracticeEnv, demonstrated
from rl.offline.replay import Replay, Step
from rl.rewards.success_classifier import Watched
from vla.core.checkpoint import load_checkpoint, save_checkpoint
from vla.core.config import encode
from vla.data.lerobot_dataset import DemoSet
from vla.training.run_identity import same_data

_PATIENCE = 2


@dataclass
class Logs:
    """Transitions, and the frames that a success classifier learns from."""

    replay: Replay
    watched: list[Watched] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, config: ResetFreeConfig) -> None:
        """Write them, atomically."""
        lengths = torch.tensor([len(w.done_T) for w in self.watched])
        tensors = {f"replay.{name}": tensor for name, tensor in self.replay.tensors().items()}
        tensors |= {
            "watched.lengths": lengths,
            "watched.seen": torch.cat([w.seen_TS for w in self.watched]),
            "watched.done": torch.cat([w.done_T for w in self.watched]),
        }
        save_checkpoint(folder, config=_asked(config), tensors=tensors, stats={}, trainer_state=self.figures)

    def finished(self, config: ResetFreeConfig) -> bool:
        """True when all the episodes that were asked for have been played."""
        return self.figures.get("episodes", config.logged_episodes) >= config.logged_episodes

    @staticmethod
    def load(folder: Path, config: ResetFreeConfig, begun: Mapping[str, str]) -> Logs:
        """Read them. ValueError where they were logged with other settings, or where `begun` (what `figures` keeps of
        the policy and the demonstrations that they began with) is not theirs. Earlier versions kept nothing."""
        saved = load_checkpoint(folder)
        kept = saved.trainer_state or {}
        for name, now in begun.items():
            if not same_data(kept.get(name, now), now):
                raise ValueError(
                    f"the episodes in {folder} were logged with another {name}: give what they were logged with "
                    "(--init, --demos, --suite), or choose another folder (--out)"
                )
        had = {name: value for name, value in saved.config.items() if name in _asked(config)}
        if had != _asked(config):
            raise ValueError(f"{folder} was logged with other settings ({had}): choose another folder")
        groups: dict[str, dict[str, Tensor]] = {"replay": {}, "watched": {}}
        for name, tensor in saved.tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        replay = Replay(max(1, int(groups["replay"]["added"])))
        replay.load(groups["replay"])
        lengths = groups["watched"]["lengths"].tolist()
        seen, done = (groups["watched"][name].split(lengths) for name in ("seen", "done"))
        watched = [Watched(*pair) for pair in zip(seen, done, strict=True)]
        return Logs(replay, watched, kept)


def _asked(config: ResetFreeConfig) -> dict[str, Any]:
    names = ("suite", "pair", "num_envs", "n_action_steps", "horizon", "reset_every", "logged_episodes", "seed")
    agent = ("gamma", "n_step", "motion_std", "gripper_std", "correlation")
    return {name: encode(config)[name] for name in names} | {name: encode(config.agent)[name] for name in agent}


def log(
    agent: Agent,
    env: PracticeEnv,
    demos: DemoSet,
    config: ResetFreeConfig,
    *,
    kept: Logs | None = None,
    keep: Callable[[Logs], None] = lambda logs: None,
) -> Logs:
    """Play `logged_episodes` of the agent, which is still the imitation policy, with its noise; the outcomes are what a
    person who watched would note down. `keep` is called before every reset, and at the end; from what it was given
    last, `kept`, the logging goes on."""
    generator = torch.Generator().manual_seed(config.seed + 29)
    judge = SimulatorJudge(env.num_envs, _PATIENCE)
    practice = Practice(env, agent, judge, generator=generator)
    fresh: list[tuple[list[Step], Watched]] = []
    if kept is None:
        fresh = [*demonstrated(agent, demos)]
        figures: dict[str, Any] = {"demonstrations": len(fresh), "episodes": 0}
    else:
        figures = kept.figures
        generator.set_state(figures["generator"])
        practice.control_steps = figures["control_steps"]

    def logs() -> Logs:
        nonlocal kept, fresh
        before = Logs(Replay(1, config.agent.n_step)) if kept is None else kept
        replay = Replay(before.replay.size + sum(len(steps) for steps, _ in fresh), config.agent.n_step)
        replay.load(before.replay.tensors())
        for steps, _ in fresh:
            replay.add_episode(steps)
        figures.update(control_steps=practice.control_steps, generator=generator.get_state())
        kept, fresh = Logs(replay, [*before.watched, *(watched for _, watched in fresh)], figures), []
        return kept

    practice.start()
    unsaved = 0
    while figures["episodes"] < config.logged_episodes:
        ended = practice.step()
        for played in ended:
            fresh.append((played.steps, played.watched))
            for name, count in played.counts().items():
                figures[name] = figures.get(name, 0) + count
        unsaved += len(ended)
        if figures["episodes"] >= config.logged_episodes:
            break
        due = env.reset_is_due
        if due or (env.save_every and unsaved >= env.save_every):
            keep(logs())
            unsaved = 0
        if due:
            practice.start()
    keep(logs())
    assert kept is not None
    return kept
