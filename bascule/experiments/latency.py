"""`vla experiment latency`: success of a policy whose answers are delayed. May import every package.

The controller's own loop (`policies.control.loop.ControlLoop`), one per environment, in virtual time:
a control step is a tick, however long it takes to compute. Only the delay between request and answer is simulated: as
long as the condition says, sometimes longer, sometimes without an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bascule.catalogue import trained
from bascule.experiments.arms import Report, Row, arms_of, evaluation_scenes, in_turn, kept, played_with, share_kept
from vla.core.config import lookup
from vla.core.types import ActionSpec, Observation, Prefix

if TYPE_CHECKING:
    from policies.control.playback import Answer

PIPELINED = 8
"""Requests in flight: one at every control step, as long as answers take no longer than eight steps."""
TIMEOUT_S = 0.4
"""Seconds after which a client stops waiting for an answer and sends a new request."""


@dataclass(frozen=True)
class Condition:
    """The delay between request and answer, in seconds."""

    latency_s: float
    jitter_s: float = 0.0
    """Uniform jitter of up to this many seconds, either way."""
    stalls: float = 0.0
    """Share of the answers that take half a second longer."""
    drops: float = 0.0
    """Share of the answers that never arrive."""

    def draw(self, rng: np.random.Generator) -> tuple[float, bool]:
        """Draw (seconds, True if an answer arrives then, False if the client gives up)."""
        if rng.random() < self.drops:
            return TIMEOUT_S, False
        late = rng.uniform(-self.jitter_s, self.jitter_s) + (0.5 if rng.random() < self.stalls else 0.0)
        return max(0.0, self.latency_s + late), True


CONDITIONS: dict[str, Condition] = {
    "0 ms": Condition(0.0),
    "100 ms": Condition(0.1),
    "200 ms": Condition(0.2),
    "300 ms": Condition(0.3),
    "200 ms, jitter": Condition(0.2, jitter_s=0.1),
    "100 ms, stalls": Condition(0.1, stalls=0.1),
    "100 ms, drops": Condition(0.1, drops=0.1),
}


@dataclass(frozen=True)
class LatencyConfig:
    """Delayed answers, and the ways to join a chunk that was computed from an earlier observation."""

    policy: tuple[Path, ...] = ()
    """Checkpoints, or NAME=CHECKPOINT. At least twice as many actions to a chunk as an answer takes control steps, or
    robots run dry."""
    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ("switch", "blend", "ensemble", "pipelined")
    """Values of `policies.control.config.ControlConfig.join`: switch is the naive way, rtc is for flow heads. Also
    pipelined: blend with up to eight requests in flight."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """How late answers come: milliseconds, with jitter, stalls or drops."""
    episodes: int = 96
    """Evaluation scenes, the same for every arm."""
    seed0: int | None = None
    """Seed of the first scene. Default: the suite's first evaluation scene."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def latency(config: LatencyConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Success and jerk of every policy, arm and condition; each cell is kept in OUT. ValueError without a policy."""
    from policies.control.config import JOINS

    if not config.policy:
        raise ValueError("vla experiment latency needs trained policies: --policy CHECKPOINT [CHECKPOINT ...]")
    for name in config.conditions:
        lookup(name, CONDITIONS, "condition")
    for arm in config.arms:
        lookup(arm, dict.fromkeys((*JOINS, "pipelined")), "arm")
    policies = arms_of(config.policy)
    if twice := next((name for name, folders in policies.items() if len(folders) > 1), None):
        raise ValueError(f"two policies are called '{twice}': give each a name of its own, NAME=CHECKPOINT")
    for folders in policies.values():
        trained(folders[0])  # not an export, whose answers cannot be led
    cells = [(name, arm, c) for name in policies for c in config.conditions for arm in config.arms]
    started, arms, sync = time.monotonic(), {}, {}
    for name, arm, condition in in_turn(cells, ", ".join, on_progress):
        cell = partial(_cell, config, out, name, Path(policies[name][0]))
        if name not in sync:
            arms[f"{name}: no latency"] = sync[name] = cell("waits", "0 ms")
        row = cell(arm, condition)
        arms[f"{name}: {arm}, {condition}"] = row | {"kept": share_kept(row, sync[name])}
    seconds = round(time.monotonic() - started, 1)
    return {"experiment": "latency", "seeds": [0], "arms": arms, "columns": ["kept", "jerk"], "seconds": seconds}


def _cell(config: LatencyConfig, out: Path, name: str, folder: Path, arm: str, condition: str) -> Row:
    file = out / f"{name}-{arm}-{condition.replace(' ', '').replace(',', '-')}.json"
    asked = {"suite": config.suite, "episodes": config.episodes, "policy": str(folder)}
    asked |= played_with(folder, config.suite)
    asked |= {} if config.seed0 is None else {"seed0": config.seed0}
    return kept(file, asked, partial(_measured, config, folder, arm, condition))


def _measured(config: LatencyConfig, folder: Path, arm: str, condition: str) -> Row:
    from policies.load import chosen_embodiment
    from vla.core.compatibility import require_same
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    policy = VLAPolicy(VLA.load(folder, member=chosen_embodiment(folder)))
    with evaluation_scenes(config, policy, seed0=config.seed0) as (env, seeds):
        require_same(policy, env)
        if policy.spec.memory_frames:
            raise ValueError(f"{folder.name} remembers its decisions; this experiment asks for them out of turn")
        if arm == "rtc" and not policy.spec.takes_prefix:
            raise ValueError(f"{folder.name} has no flow head, so it cannot be led: leave rtc out of --arms")
        return play(policy, env, seeds, join=arm, condition=CONDITIONS[condition])


def play(policy: Any, env: Any, seeds: Sequence[int], *, join: str, condition: Condition) -> dict[str, Any]:
    """One episode per seed under one condition. `join` "waits": the simulation pauses until the answer arrives.

    {"successes", ..., "jerk"}: mean norm of the third derivative of the gripper's measured position, m/s^3.
    """
    from envs.evaluation.evaluate import Count

    successes, jerks, delays = 0, [], []
    for start in range(0, len(seeds), env.num_envs):
        wave = list(seeds[start : start + env.num_envs])
        success, jerk, delay = _wave(policy, env, wave, join, condition)
        successes, jerks, delays = successes + success, jerks + jerk, delays + delay
    measured = {"jerk": round(float(np.mean(jerks)), 2), "delay": round(float(np.mean(delays or [0])), 2)}
    return Count(successes, len(seeds)).to_dict() | measured


def _wave(
    policy: Any, env: Any, seeds: list[int], join: str, condition: Condition
) -> tuple[int, list[float], list[int]]:
    from policies.control.config import ControlConfig
    from policies.control.guards import GuardConfig
    from policies.control.loop import ControlLoop

    world = _Worlds(env, seeds)
    waits = join == "waits"
    config = ControlConfig(
        join={"waits": "switch", "pipelined": "blend"}.get(join, join),  # type: ignore[arg-type]
        catch_up_steps=0 if join == "switch" else ControlConfig.catch_up_steps,  # the naive way
        in_flight=PIPELINED if join == "pipelined" else 1,
        asynchronous=not waits,
        n_action_steps=policy.spec.n_action_steps,
        guards=GuardConfig(give_up_s=60.0),  # a simulated robot is safe: it may hold for as long as an episode
    )
    loops = []
    for i, seed in enumerate(seeds):
        rng = np.random.default_rng([seed, 97])
        post = _Post(world, condition, rng, policy if waits else None, in_flight=config.in_flight)
        loops.append(ControlLoop(_Row(world, i), post, config, clock=world.clock))
        loops[-1].policy.chunk_size = policy.spec.chunk_size
    world.look()
    track = [[world.obs.proprio[i, :3].copy()] for i in range(len(seeds))]
    while running := [i for i in range(len(seeds)) if not world.over[i]]:
        for i in running:
            loops[i].tick(world.now)
        _answer(policy, world.obs, [(i, loops[i].policy.inference) for i in running])
        world.step(render=any(loops[i].policy.inference.may_be_asked(world.now + world.dt) for i in running))
        for i in running:
            track[i].append(world.obs.proprio[i, :3].copy())
    jerk = [float(np.linalg.norm(np.diff(path, n=3, axis=0), axis=1).mean() / world.dt**3) for path in track]
    return (
        int(world.success.sum()),
        jerk,
        [late for loop in loops for late, n in loop.report().delays.items() for _ in range(n)],
    )


def _answer(policy: Any, obs: Observation, posts: list[tuple[int, _Post]]) -> None:
    """Answer all requests of this tick in one batch."""
    asking = [(i, post) for i, post in posts if post.open]
    if not asking:
        return
    seen = obs.select([i for i, _ in asking])
    prefixes: list[Prefix | None] = [post.questions[-1].prefix for _, post in asking]
    if all(prefix is None for prefix in prefixes):
        chunks = policy.act(seen)
    else:
        spec = policy.spec
        actions = np.zeros((len(asking), spec.chunk_size, spec.action_spec.dim), np.float32)
        left, delay = np.zeros((2, len(asking)), np.int64)
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                left[row], delay[row] = prefix.left[0], prefix.delay[0]
                actions[row, : left[row]] = prefix.actions[0]
        chunks = policy.act(seen, prefix=Prefix(actions, left, delay))
    for (_, post), chunk in zip(asking, chunks, strict=True):
        post.questions[-1].chunk = chunk


class _Worlds:
    """The environment, one control step at a time, and the virtual clock."""

    def __init__(self, env: Any, seeds: list[int]) -> None:
        self.env, self.dt, self.now = env, 1.0 / env.action_spec.control_hz, 0.0
        spare = [seeds[0]] * (env.num_envs - len(seeds))
        env.set_rendering(True)
        self.obs = env.reset(seeds=[*seeds, *spare])
        self.over = np.zeros(len(seeds), bool)
        self.success = np.zeros(len(seeds), bool)
        self.actions = np.zeros((env.num_envs, 1, env.action_spec.dim), np.float32)
        self._renders = True

    def clock(self) -> float:
        return self.now

    def look(self) -> None:
        self.obs = self.env.observation()

    def step(self, *, render: bool) -> None:
        if render != self._renders:  # most frames are never used, and they cost more than the physics
            self.env.set_rendering(render)
            self._renders = render
        result = self.env.step_chunk(self.actions)
        n = len(self.over)
        self.obs, self.now = result.obs, self.now + self.dt
        self.over |= (result.terminated | result.truncated)[:n]
        self.success |= result.info["success"][:n]


class _Row:
    """One of the environments as `policies.control.robots.Robot`."""

    proprio_names: tuple[str, ...] = ()
    done = False

    def __init__(self, world: _Worlds, index: int) -> None:
        self._world, self._index = world, index
        self.action_spec: ActionSpec = world.env.action_spec
        self.kinds = tuple("switch" if name == "gripper" else "displacement" for name in self.action_spec.names)

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def rest(self) -> tuple[float, ...]:
        return tuple(1.0 if kind == "switch" else 0.0 for kind in self.kinds)

    def observe(self) -> tuple[Observation, float]:
        return self._world.obs.select([self._index]), self._world.now

    def send(self, action_A: np.ndarray) -> None:
        self._world.actions[self._index, 0] = action_A


@dataclass
class _Question:
    """A request in flight, or answered and not yet fetched."""

    step: int
    asked_s: float
    seen_s: float
    arrives_s: float
    comes: bool
    prefix: Prefix | None = None
    chunk: np.ndarray | None = None


class _Post:
    """`policies.control.playback.Asking` in virtual time: answers arrive later, or not at all."""

    def __init__(
        self, world: _Worlds, condition: Condition, rng: np.random.Generator, policy: Any = None, *, in_flight: int = 1
    ) -> None:
        """`policy`: if given, answers at once."""
        self._world, self._condition, self._rng, self._policy = world, condition, rng, policy
        self._in_flight = in_flight
        self.questions: list[_Question] = []

    @property
    def busy(self) -> bool:
        return len(self.questions) >= self._in_flight

    @property
    def open(self) -> bool:
        """True if the latest request has not been passed to the policy yet."""
        return bool(self.questions) and self.questions[-1].chunk is None

    def may_be_asked(self, at_s: float) -> bool:
        return not self.busy or self.questions[0].arrives_s <= at_s + 1e-9

    def waiting_s(self) -> float:
        return self._world.now - self.questions[0].asked_s if self.questions else 0.0

    def ask(self, obs: Observation, *, step: int, seen_s: float, prefix: Prefix | None = None, scene: int = 0) -> None:
        now = self._world.now
        if self._policy is not None:
            self.questions.append(_Question(step, now, seen_s, now, True, chunk=self._policy.act(obs)[0]))
            return
        seconds, comes = self._condition.draw(self._rng)
        arrives_s = now + max(seconds, self._world.dt)  # no answer is there in the tick that asks
        if self.questions:  # nor before an earlier one
            arrives_s = max(arrives_s, self.questions[-1].arrives_s)
        self.questions.append(_Question(step, now, seen_s, arrives_s, comes, prefix))

    def fetch(self) -> Answer | None:
        from policies.control.playback import Answer

        if not self.questions or self.questions[0].chunk is None:
            return None
        if self._world.now < self.questions[0].arrives_s - 1e-9:
            return None
        first = self.questions.pop(0)
        error = None if first.comes else TimeoutError("no answer")
        return Answer(
            first.chunk if first.comes else None, error, first.step, first.seen_s, self._world.now - first.seen_s
        )

    def close(self) -> None: ...
