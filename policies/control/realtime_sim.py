"""A simulated environment that runs in real time like a robot: physics and cameras in its own process and clock.

A controller's `send` and `observe` only touch a pipe and shared memory, so that they take microseconds whatever the
simulator is doing, and a simulator that stalls shows as stale observations.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from numpy.typing import NDArray

from policies.control.guards import Kind
from policies.control.policy_process import NICE
from vla.core.subprocesses import spawn
from vla.core.types import ActionSpec, Observation, VecEnv

_HEAD = np.dtype(
    [
        ("count", "<i8"),
        ("seen_s", "<f8"),
        ("done", "<i8"),
        ("scenes", "<i8"),
        ("successes", "<i8"),
        ("called", "<i8"),
        ("word", "<i8"),
        ("told", "S4096"),
    ]
)


class LiveWorld:
    """`policies.control.robots.Robot`: one environment stepped at its own rate, commanded at that rate or a higher one.

    Displacements add up until the environment's next step applies them (as much as the bounds allow; the rest is kept
    for the following step). A switch keeps its last commanded value.
    """

    gives_depth = False

    def __init__(
        self,
        make: Callable[[], VecEnv],
        *,
        control_hz: float,
        seed: int,
        task: str | None = None,
        proprio_names: Sequence[str] = (),
        endless: bool = False,
    ) -> None:
        """`make` (pickled: a module's function, or a partial of one) builds an environment with num_envs 1.

        It is called in the child. `endless`: when an episode ends, the next seed's begins, and the robot is never
        `done`. ValueError for a `control_hz` below the environment's own.
        """
        self._pipe, theirs = Pipe()
        self._process = spawn(_serve, (theirs, make, seed, task, endless, tuple(proprio_names)), name="world")
        theirs.close()
        self._memory: SharedMemory | None = None
        atexit.register(self.disconnect)
        try:
            spec, cameras, size, proprio_dim, name, advises = self._receive()
        except BaseException:
            self.disconnect()
            raise
        self._memory = SharedMemory(name=name)
        self._view = _View(self._memory, len(cameras), size, proprio_dim, spec.dim)
        self.advises = advises
        """True where the environment has somebody who corrects a policy (`advice`)."""
        self.cameras, self.proprio_names = cameras, tuple(proprio_names)
        if control_hz < spec.control_hz:
            self.disconnect()
            raise ValueError(
                f"the rate must be at least the simulation's {spec.control_hz:g} Hz (--hz), got {control_hz:g} Hz"
            )
        self.kinds = _kinds(spec, self.proprio_names)
        share = [spec.control_hz / control_hz if kind == "displacement" else 1.0 for kind in self.kinds]
        low, high = (tuple(float(b * s) for b, s in zip(bound, share, strict=True)) for bound in (spec.low, spec.high))
        self.action_spec = ActionSpec(spec.names, low, high, control_hz)
        self.world_hz = spec.control_hz
        self._latest: tuple[int, Observation, float] | None = None
        self._done = 0
        self._calls = self._word = 0
        self.scenes = self.successes = 0
        """Episodes that have ended, and how many of them succeeded."""

    def connect(self) -> None:
        """Show the environment, which stands still until `begin` or the first `send`. ConnectionError if it shows no
        observation within 60 s."""
        self._send("show")
        until = time.monotonic() + 60.0
        while int(self._view.head["count"][0]) == 0 or int(self._view.head["count"][0]) % 2:
            if time.monotonic() > until or not self._process.is_alive():
                raise ConnectionError("the simulated robot does not start")
            time.sleep(0.001)

    def begin(self) -> None:
        """Start stepping the environment: an episode's time does not pass while a policy warms up."""
        self._send("begin")

    def observe(self) -> tuple[Observation, float]:
        """The latest observation (B = 1) and when it was taken, in seconds. ConnectionError without one."""
        if self._memory is None:
            raise ConnectionError("the simulated robot is not connected")
        seen = self._latest
        for _ in range(100):  # written while it was read: read again
            before = int(self._view.head["count"][0])
            if seen is not None and before == seen[0]:
                break
            images, proprio = self._view.images.copy(), self._view.proprio.copy()
            head = self._view.head[0].copy()
            if before % 2 == 0 and before == int(self._view.head["count"][0]):
                named = {camera: images[None, v] for v, camera in enumerate(self.cameras)}
                told = head["told"].decode(errors="ignore")
                seen = before, Observation(named, proprio[None], [told]), float(head["seen_s"])
                self._done, self.scenes, self.successes = (int(head[name]) for name in ("done", "scenes", "successes"))
                self._word = int(head["word"]) if int(head["called"]) == self._calls else 0
                break
        if seen is None:
            raise ConnectionError("the simulated robot shows nothing")
        self._latest = seen
        return seen[1], seen[2]

    def rest(self) -> tuple[float, ...]:
        """The action (A,) that leaves the robot as it is: displacements 0, switches 1, positions as they are."""
        state = dict(zip(self.proprio_names, self.observe()[0].proprio[0].tolist(), strict=False))
        return _rest(self.action_spec, self.kinds, state)

    def send(self, action_A: NDArray[np.float32]) -> None:
        """Command an action (A,) for one control tick. ConnectionError when the process is gone."""
        self._send([float(x) for x in action_A])

    @property
    def done(self) -> bool:
        """True when the episode is over; never true with `endless`."""
        return bool(self._done)

    def call(self, method: str) -> None:
        """Have the environment's `method()` called between two of its steps; what it returns is observed next.
        ConnectionError where that has not come about after 60 s."""
        self._calls += 1
        self._send(method)
        until = time.monotonic() + 60.0
        while int(self._view.head["called"][0]) < self._calls:
            if time.monotonic() > until or not self._process.is_alive():
                raise ConnectionError(f"the simulated robot does not answer {method}()")
            time.sleep(0.001)

    @property
    def told(self) -> int:
        """The environment's word on its present episode at the latest observation: 0, or 1 when the task is done, or
        what else its `info["word"]` says."""
        return self._word

    @property
    def advice(self) -> tuple[bool, NDArray[np.float32]]:
        """(True if the environment's corrector drives, its action (A,)), as of the environment's last step."""
        told = self._view.advice.copy()
        return bool(told[0]), told[1:]

    @property
    def success(self) -> bool:
        """True when at least one episode has succeeded."""
        return self.successes > 0

    @property
    def pid(self) -> int | None:
        """The process id of the simulator."""
        return self._process.pid

    def disconnect(self) -> None:
        """End the simulator's process and free the shared memory. May be called twice."""
        atexit.unregister(self.disconnect)
        self._pipe.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=5)
        if self._memory is not None:
            del self._view
            with contextlib.suppress(BufferError):  # an observation may still be in use
                self._memory.close()
            with contextlib.suppress(FileNotFoundError):
                self._memory.unlink()
            self._memory = None

    def _send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise ConnectionError("the simulated robot is gone") from error

    def _receive(self) -> tuple:
        try:
            good, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ConnectionError("the simulated robot's process died") from error
        if not good:
            raise value
        return value


class _View:
    """The shared memory as arrays. `count` is odd while it is being written (a seqlock: one writer, any readers)."""

    def __init__(self, memory: SharedMemory, cameras: int, size: int, proprio_dim: int, action_dim: int) -> None:
        self.head = np.ndarray(1, _HEAD, memory.buf)
        self.proprio = np.ndarray(proprio_dim, np.float32, memory.buf, _HEAD.itemsize)
        self.advice = np.ndarray(1 + action_dim, np.float32, memory.buf, _HEAD.itemsize + 4 * proprio_dim)
        offset = _HEAD.itemsize + 4 * (proprio_dim + 1 + action_dim)
        self.images = np.ndarray((cameras, size, size, 3), np.uint8, memory.buf, offset)

    @staticmethod
    def size(cameras: int, size: int, proprio_dim: int, action_dim: int) -> int:
        return _HEAD.itemsize + 4 * (proprio_dim + 1 + action_dim) + cameras * size * size * 3


def _serve(
    pipe: Connection, make: Callable[[], VecEnv], seed: int, task: str | None, endless: bool, names: tuple[str, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    memory = view = None
    try:
        env = make()
        tasks = None if task is None else [task]  # of every scene
        obs = env.reset(seeds=[seed], tasks=tasks)
        size = next(iter(obs.images.values())).shape[1]
        layout = len(env.cameras), size, env.proprio_dim, env.action_spec.dim
        memory = SharedMemory(create=True, size=_View.size(*layout))
        view = _View(memory, *layout)
        view.head["count"] = 0
        view.advice[:] = 0.0
        advises = hasattr(env, "advice")
        pipe.send((True, (env.action_spec, tuple(env.cameras), size, env.proprio_dim, memory.name, advises)))
        pipe.recv()
        following = itertools.count(seed + 1) if endless else None
        _run(pipe, env, view, obs, names, lambda: following and env.reset(seeds=[next(following)], tasks=tasks))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the controller disconnected: the simulation ends
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((False, error))
    finally:
        view = None
        if memory is not None:
            memory.close()
        os._exit(0)  # Mesa's teardown at exit prints errors, and there is nothing left to flush


def _run(
    pipe: Connection,
    env: VecEnv,
    view: _View,
    obs: Observation,
    names: tuple[str, ...],
    next_scene: Callable[[], Observation | None],
) -> None:
    """Step at the environment's rate in real time until the pipe is closed; a late step is not made up for. Before the
    first message, the environment is shown anew at that rate and stands still."""
    spec = env.action_spec
    low, high = np.array(spec.low), np.array(spec.high)
    kinds = _kinds(spec, names)
    kept = np.array([kind != "displacement" for kind in kinds])
    state = dict(zip(names, obs.proprio[0].tolist(), strict=False))
    pending, held = np.zeros(spec.dim), np.array(_rest(spec, kinds, state))
    begun, told = False, dict.fromkeys(("done", "scenes", "successes", "called", "word"), 0)
    _write(view, obs, time.monotonic(), told)
    deadline = time.monotonic()
    while True:
        deadline += 1.0 / spec.control_hz
        while (left := deadline - time.monotonic()) > 0 or pipe.poll():
            if pipe.poll(max(left, 0.0)):
                message = pipe.recv()
                if message == "show":  # it is connected once more
                    continue
                begun = True
                if message == "begin":
                    continue
                if isinstance(message, str):
                    obs, pending[:] = getattr(env, message)(), 0.0
                    told["called"], told["word"] = told["called"] + 1, 0
                    continue
                command = np.array(message)
                pending += np.where(kept, 0.0, command)
                held = np.where(kept, command, held)
        deadline = max(deadline, time.monotonic() - 1.0 / spec.control_hz)
        moved = np.clip(pending, low, high)
        pending -= moved
        seen_s = time.monotonic()  # before the step and its pictures: an age must never look younger than it is
        if begun and not told["done"]:
            action = np.where(kept, held, moved).astype(np.float32)
            result = env.step_chunk(action[None, None])
            success = int(result.info["success"][0])
            obs, told["word"] = result.obs, int(result.info.get("word", [success])[0])
            if result.terminated[0] or result.truncated[0]:
                told["scenes"], told["successes"] = told["scenes"] + 1, told["successes"] + success
                fresh = next_scene()
                told["done"], obs = int(fresh is None), fresh or obs
                pending[:] = 0.0
            if hasattr(env, "advice"):
                view.advice[:] = env.advice()
        _write(view, obs, seen_s, told)


def _write(view: _View, obs: Observation, seen_s: float, told: Mapping[str, int]) -> None:
    head = view.head[0]
    head["count"] += 1
    head["seen_s"] = seen_s
    for name, number in told.items():
        head[name] = number
    head["told"] = obs.instruction[0].encode()[:4096]
    view.proprio[:] = obs.proprio[0]
    for v, image in enumerate(obs.images.values()):
        view.images[v] = image[0]
    head["count"] += 1


def _kinds(spec: ActionSpec, proprio_names: Sequence[str]) -> tuple[Kind, ...]:
    """Positions are what the state tells under the same name; `gripper` is a switch, everything else displacements."""
    return tuple(
        "switch" if name == "gripper" else "position" if name in proprio_names else "displacement"
        for name in spec.names
    )


def _rest(spec: ActionSpec, kinds: Sequence[Kind], state: Mapping[str, float]) -> tuple[float, ...]:
    still: dict[Kind, float] = {"switch": 1.0, "displacement": 0.0}
    return tuple(
        state[name] if kind == "position" else still[kind] for name, kind in zip(spec.names, kinds, strict=True)
    )
