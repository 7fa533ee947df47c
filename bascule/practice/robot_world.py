"""One robot as the environment that an agent practises in, driven by the control loop with all its guards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from bascule.practice.attendants import DONE, OUT_OF_REACH, Attendant
from bascule.practice.handover import Handover
from envs.backends.reset_free_env import ResetCounts
from policies.control.config import ControlConfig, ControlReport
from policies.control.controller import control
from policies.teleop.keys import Key
from vla.core.types import ActionChunk, Observation, Policy, StepResult

FRESH_S = 10.0
"""Longest wait in seconds for an observation of a task that has just begun."""


class RobotStopped(ConnectionError):
    """The control loop has ended by itself: an emergency stop, a guard's, or the robot is lost."""


class RobotWorld:
    """A robot (B = 1) with the interface of `envs.backends.reset_free_env.ResetFreeVecEnv`.

    A control loop keeps the robot's time in a thread of its own: it plays each chunk, asks for the next one when that
    is over, and holds the robot until it comes. Things are put back by an attendant, who also says when a task is done.
    """

    num_envs = 1
    save_every = 5
    """See `rl.offline.practice.PracticeEnv`."""

    def __init__(
        self,
        robot: Any,
        policy: Policy,
        attendant: Attendant,
        config: ControlConfig,
        *,
        reset_every: int,
        horizon: int,
    ) -> None:
        """`robot`: a `policies.control.robots.Robot`. `policy`: any that fits it, to warm up. `config`: as for
        `policies.control.controller.control`; its n_action_steps are the length of a chunk. `horizon`: control steps of
        the policy after which an episode is cut."""
        assert policy.spec.action_spec is not None
        self.action_spec = policy.spec.action_spec
        self.attendant, self.reset_every, self.horizon = attendant, reset_every, horizon
        self.counts = ResetCounts()
        self.forward = np.ones(1, bool)
        """(1,) True where the present episode is one of the first task of the pair."""
        self.report: ControlReport | None = None
        """How the latest run of the control loop ended."""
        self._robot = _Watched(robot, stays=attendant.robot_stays)
        self._policy = policy
        # It is asked when a chunk is over, and the robot holds while the agent learns: that is no server that has died.
        self._config = replace(
            config, asynchronous=False, in_flight=1, join="switch", duration_s=1e9, server_timeout_s=1e9
        )
        self._handover = Handover()
        self._loop: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._elapsed = self._ended = 0

    @property
    def reset_is_due(self) -> bool:
        """True when it has had its episodes since things were last put back."""
        return self._ended >= self.reset_every

    def start(self) -> Observation:
        """Things are put back, and the first task begins."""
        self._ended = 0
        self.counts.scheduled += 1
        return self._put_back()

    def begin(self, env_ids: list[int]) -> Observation:
        """End the episode and begin the other task where things are, or after they were put back if they are out of
        reach."""
        self._ended += 1
        if self.attendant.word() == OUT_OF_REACH:
            self.counts.out_of_reach += 1
            return self._put_back()
        self.counts.continued += 1
        self.forward ^= True
        self._begin_episode()
        self.attendant.next_task(forward=bool(self.forward[0]))
        return self._robot.seen_after(time.monotonic(), self._alive)

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """Play a chunk (1, C, A) to its end. `info["success"]` is the attendant's word so far. RobotStopped when the
        control loop has ended."""
        self._handover.answer(np.asarray(chunk)[0])
        obs = self._next_question()
        steps = np.array([np.shape(chunk)[1]])
        self._elapsed += int(steps[0])
        word = self.attendant.word()
        lost = np.array([word == OUT_OF_REACH])
        truncated = lost | (self._elapsed >= self.horizon)
        info = {"success": np.array([word == DONE]), "wrong_object": np.zeros(1, bool), "out_of_reach": lost}
        return StepResult(obs, np.zeros(1, np.float32), np.zeros(1, bool), truncated, steps, info)

    def close(self) -> None:
        """Let go of the robot."""
        self._stop()
        self._robot.let_go()

    def _put_back(self) -> Observation:
        self._stop()
        self.forward[:] = True
        self._begin_episode()
        if not self.attendant.robot_stays:
            self.attendant.put_back()
            self._drive()
            return self._next_question()
        self._drive()
        self._next_question()
        self.attendant.put_back()
        return self._robot.seen_after(time.monotonic(), self._alive)

    def _begin_episode(self) -> None:
        self._elapsed = 0
        words = self.attendant.words
        self._robot.words = None if words is None else words[0 if self.forward[0] else 1]

    def _drive(self) -> None:
        """Start the control loop in its thread."""
        self._handover, self._failed, self._robot.done = Handover(), None, False
        handover = self._handover

        def run() -> None:
            try:
                with ExitStack() as open_ones:
                    pressed = Key(open_ones, others=self.attendant.key)
                    self.report = control(self._robot, self._policy, self._config, pressed=pressed, asking=handover)
            except BaseException as error:  # told to whoever waits for a question
                self._failed = error
            finally:
                handover.close()

        self._loop = threading.Thread(target=run, name="control loop", daemon=True)
        self._loop.start()

    def _stop(self) -> None:
        if self._loop is not None:
            self._robot.done = True
            self._loop.join()
            self._loop = None

    def _next_question(self) -> Observation:
        obs = self._handover.question()
        if obs is None:
            self._alive()
        assert obs is not None
        return obs

    def _alive(self) -> None:
        """Raise what ended the control loop, if it has ended."""
        if self._loop is not None and self._loop.is_alive() and not self._handover.closed:
            return
        if self._loop is not None:
            self._loop.join()  # its report comes after its last question
        if self._failed is not None:
            raise self._failed
        told = "" if self.report is None else "; ".join(self.report.reasons.values()) or ", ".join(self.report.guards)
        raise RobotStopped(f"the robot was stopped{f' ({told})' if told else ''}")


class _Watched:
    """A robot whose observations a second thread may see, with other words, and that can be told to end its run."""

    def __init__(self, robot: Any, *, stays: bool) -> None:
        self._robot, self._stays = robot, stays
        self.words: str | None = None
        self.done = False
        self._latest: tuple[Observation, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    def observe(self) -> tuple[Observation, float]:
        """See `policies.control.robots.Robot.observe`."""
        obs, seen_s = self._robot.observe()
        if self.words is not None and isinstance(obs, Observation):
            obs = replace(obs, instruction=[self.words])
        self._latest = obs, seen_s
        return obs, seen_s

    def disconnect(self) -> None:
        """Let go of the robot, unless it stays for the next run."""
        if not self._stays:
            self._robot.disconnect()

    def let_go(self) -> None:
        """Let go of the robot in any case."""
        self._robot.disconnect()

    def seen_after(self, since_s: float, alive: Callable[[], None]) -> Observation:
        """The first observation of the control loop after `since_s` (`time.monotonic`). `alive` raises when it has
        ended."""
        while not (self._latest is not None and self._latest[1] > since_s and _usable(self._latest[0])):
            alive()
            if time.monotonic() > since_s + FRESH_S:
                raise RobotStopped(f"the robot has shown nothing for {FRESH_S:g} s")
            time.sleep(0.002)
        return self._latest[0]


def _usable(obs: Any) -> bool:
    """False for what makes the control loop hold, until the robot shows something better."""
    return isinstance(obs, Observation) and bool(np.isfinite(obs.proprio).all())
