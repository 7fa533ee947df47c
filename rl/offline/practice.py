"""Practice: an agent plays environments that are not reset, episode after episode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from envs.backends.reset_free_env import ResetCounts
from rl.models.policy_inputs import summary
from rl.offline.agent import Agent
from rl.offline.inputs import AgentInput, look
from rl.offline.judges import Judge
from rl.offline.replay import Replay, Step
from rl.rewards.success_classifier import Watched
from vla.core.types import ActionChunk, ActionSpec, Observation, StepResult
from vla.data.lerobot_dataset import DemoSet

_HELD = 3
"""The last frames of a demonstration that show its task done: it ends when that has held for a moment."""


class PracticeEnv(Protocol):
    """Environments that are not reset: `envs.backends.reset_free_env.ResetFreeVecEnv`, or a robot."""

    num_envs: int
    action_spec: ActionSpec
    counts: ResetCounts
    forward: np.ndarray
    """(B,) True where the present episode is one of the first task of the pair."""
    save_every: int
    """Episodes after which a run is saved besides at scheduled resets: where nothing can be repeated exactly, as on a
    robot, a run that is killed should lose little. 0: never."""

    @property
    def reset_is_due(self) -> bool:
        """True when all environments have had their episodes since the last scheduled reset."""
        ...

    def start(self) -> Observation:
        """A scheduled reset of all environments, which then begin the first task of the pair."""
        ...

    def begin(self, env_ids: list[int]) -> Observation:
        """End the episodes in `env_ids` and begin the other task of the pair there."""
        ...

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """One chunk in every environment; `info` holds `success` and `out_of_reach` (B,)."""
        ...


@dataclass(frozen=True)
class Played:
    """An episode that has ended."""

    forward: bool
    """True if it was the first task of the pair."""
    steps: list[Step]
    watched: Watched
    """The frames after each of its chunks, and whether the simulator had said by then that it was done."""
    success: bool
    """The simulator's word."""
    judged: bool
    """The judge's, which was the reward."""
    trivial: bool
    """It was done within its first chunk: there was nothing to do."""

    def counts(self) -> dict[str, int]:
        """The counts that it adds to the figures of a run. Trivial episodes add nothing else."""
        way = "forward" if self.forward else "undo"
        if self.trivial:
            return {"trivial": 1}
        return {
            "episodes": 1, "successes": int(self.success), f"{way}_episodes": 1, f"{way}_successes": int(self.success),
            "judged": int(self.judged), "false_positives": int(self.judged and not self.success),
            "false_negatives": int(self.success and not self.judged),
        }  # fmt: skip


class Practice:
    """Environments, agent and judge. `start`, then `step` again and again."""

    def __init__(self, env: PracticeEnv, agent: Agent, judge: Judge, *, generator: torch.Generator) -> None:
        self.env, self.agent, self.judge, self.generator = env, agent, judge, generator
        self.control_steps = 0
        self._seen: AgentInput | None = None
        self._steps: list[list[Step]] = [[] for _ in range(env.num_envs)]
        self._watched: list[list[tuple[Tensor, bool]]] = [[] for _ in range(env.num_envs)]

    def start(self) -> None:
        """A real reset of all environments; unfinished episodes are forgotten."""
        everyone = np.arange(self.env.num_envs)
        self._forget(everyone)
        self._seen, _ = self._look(self.env.start())

    def step(self, *, noise: float = 1.0) -> list[Played]:
        """One chunk in every environment; the episodes that ended with it."""
        assert self._seen is not None, "start first"
        action = self.agent.act(self._seen, self.generator, noise=noise)
        processor = self.agent.vla.processor
        result = self.env.step_chunk(processor.unnormalise_action(action.numpy()))
        self.control_steps += int(result.n_steps.sum())
        after, watched = self._look(result.obs)
        success = result.info["success"]
        done = self.judge.verdict(result.obs, watched, success)
        over = done | result.truncated
        lost = result.worker_restarted
        for i in range(self.env.num_envs):
            ends, row = done[i] or result.info["out_of_reach"][i], [i]
            discount = 0.0 if ends else self.agent.config.gamma ** int(result.n_steps[i])
            self._steps[i].append(
                Step(
                    self._seen.select(row), action[i], int(result.n_steps[i]), float(done[i]), discount,
                    after.select(row),
                )
            )  # fmt: skip
            self._watched[i].append((watched[i], bool(success[i])))
        ended = np.flatnonzero(over)
        played = [self._played(i, bool(done[i]), bool(success[i])) for i in ended if not lost[i]]
        if len(ended):
            self._forget(ended)
            after, _ = self._look(self.env.begin(ended.tolist()), after, ended)
        self._seen = after
        return played

    def _look(
        self, obs: Observation, before: AgentInput | None = None, ids: np.ndarray | None = None
    ) -> tuple[AgentInput, Tensor]:
        """The agent's and the judge's inputs; with `before`, only the rows `ids` are looked at again."""
        if before is None or ids is None:
            seen, features = look(self.agent.vla, obs, self.agent.steps)
            return seen, summary(features, seen.proprio_BP)
        fresh, features = look(self.agent.vla, obs.select(ids), self.agent.steps)
        rows = torch.as_tensor(ids)
        merged = before.map(torch.clone)
        for name, tensor in merged.tensors().items():
            tensor[rows] = fresh.tensors()[name]
        return merged, summary(features, fresh.proprio_BP)

    def _played(self, i: int, judged: bool, success: bool) -> Played:
        seen, done = zip(*self._watched[i], strict=True)
        watched = Watched(torch.stack(seen), torch.tensor(done))
        return Played(bool(self.env.forward[i]), self._steps[i], watched, success, judged, trivial=bool(done[0]))

    def _forget(self, ids: np.ndarray) -> None:
        self.judge.begin(ids)
        for i in ids:
            self._steps[i], self._watched[i] = [], []


def demonstrated(agent: Agent, demos: DemoSet, *, batch_size: int = 64) -> Iterator[tuple[list[Step], Watched]]:
    """The episodes of demonstrations, all of them successes, as chunks like the agent's, and their frames."""
    n, vla = agent.steps, agent.vla
    for episode in demos.episodes:
        frames = np.flatnonzero(demos.episode_index == episode)
        looks = [*frames[::n], frames[-1]]
        parts, seen = [], []
        for first in range(0, len(looks), batch_size):
            rows = np.asarray(looks[first : first + batch_size])
            obs = Observation(
                {name: np.asarray(image[rows]) for name, image in demos.images.items()},
                demos.proprio[rows], [demos.instruction[i] for i in rows],
            )  # fmt: skip
            part, features = look(vla, obs, n)
            parts.append(part)
            seen.append(summary(features, part.proprio_BP))
        whole = AgentInput(**{name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()})
        actions = torch.from_numpy(vla.processor.normalise_action(demos.action[frames]))
        steps = []
        for k in range(len(looks) - 1):
            part = actions[k * n : (k + 1) * n]
            chunk = torch.zeros(n, actions.shape[1])
            chunk[: len(part)] = agent.bounded(part)
            last = k == len(looks) - 2
            discount = 0.0 if last else agent.config.gamma ** len(part)
            steps.append(Step(whole.select([k]), chunk, len(part), float(last), discount, whole.select([k + 1])))
        done = torch.tensor([int(frames[-1]) - int(frame) < _HELD for frame in looks])
        yield steps, Watched(torch.cat(seen), done)


def remember(replay: Replay, played: list[Played]) -> None:
    """Add episodes to a replay."""
    for episode in played:
        replay.add_episode(episode.steps)
