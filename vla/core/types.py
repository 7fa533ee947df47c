"""The contracts everyone shares. This file imports nothing of ours and no torch.

Tensor letters, used as suffixes where tensors mix:
B batch (environments), V views, P patches, N = V*P image tokens, T text tokens, Q action queries, L layers, D width,
C chunk, A action dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ActionChunk = NDArray[np.float32]
"""A decision: float32 (B, C, A), in environment units (each component within the ActionSpec's bounds)."""


@dataclass(frozen=True)
class ActionSpec:
    """Meaning of one control step's action vector."""

    names: tuple[str, ...]
    """One name per component, e.g. ("dx", "dy", "dz", "gripper")."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    control_hz: float
    """Control steps per second."""

    @property
    def dim(self) -> int:
        """Number of components, A."""
        return len(self.names)


Pair = tuple[int, int]
"""The columns of an x and a y."""


@dataclass(frozen=True)
class PlanarSymmetry:
    """Columns of proprio and privileged state that lie in the plane of the table, along `dx` and `dy`.

    A gripper that moves by displacements may move in the same way anywhere on the table; a policy that reads the state
    can use that.
    """

    hand: Pair
    """Columns of the proprio with the position of the gripper."""
    hand_offsets: tuple[Pair, ...] = ()
    """Columns of the proprio with differences of positions."""
    places: tuple[Pair, ...] = ()
    """Columns of the privileged state with positions."""
    offsets: tuple[Pair, ...] = ()
    """Columns of the privileged state with differences of positions."""
    turns: bool = False
    """True if a scene rotated about the vertical is a valid scene; not with fixtures or angles in the state."""


IMAGE_SIZE = 84
"""Height and width in pixels of pictures where nothing says what a policy or its backbone reads."""


@dataclass
class Observation:
    """Observation of B environments (or one robot, B = 1). Policies may read everything but `privileged` and
    `exact_proprio`."""

    images: dict[str, NDArray[np.uint8]]
    """Camera name -> (B, H, W, 3) RGB, in the order the environment lists its cameras."""
    proprio: NDArray[np.float32]
    """(B, P) robot state, raw units."""
    instruction: list[str]
    """B natural-language instructions."""
    privileged: NDArray[np.float32] | None = None
    """(B, S) simulator state for critics and scripted experts; None outside simulation."""
    depth: dict[str, NDArray[np.float32]] | None = None
    """Camera name -> (B, H, W) metres along the camera's axis; None unless requested, like all fields below."""
    intrinsics: dict[str, NDArray[np.float32]] | None = None
    """Camera name -> (B, 3, 3) pinhole matrix, pixels: the centre of row r, column c is at (c + 0.5, r + 0.5)."""
    extrinsics: dict[str, NDArray[np.float32]] | None = None
    """Camera name -> (B, 4, 4) world_from_camera, metres; camera axes x right, y down, z forward (OpenCV)."""
    history: dict[str, NDArray[np.uint8]] | None = None
    """Camera name -> (B, k, H, W, 3): the frames of the k decisions before this one, oldest first. An episode's first
    frame stands in for those before it."""
    live: NDArray[np.bool_] | None = None
    """(B,) False where no action will be executed, because the episode is over; None: all are live. A policy need not
    decide there."""
    exact_proprio: NDArray[np.float32] | None = None
    """(B, P) `proprio` as it is in the simulator, where sensors are noisy: for who reads `privileged`. None: the same
    as `proprio`."""
    env_ids: NDArray[np.int64] | None = None
    """(B,) which environment or client each row is of, by which a policy that remembers keeps them apart. None: the
    row's number."""

    def __post_init__(self) -> None:
        """ValueError for a single text in place of a list: it would be read letter by letter."""
        if isinstance(self.instruction, str):
            raise ValueError(f"Observation.instruction is a list of B texts: write [{self.instruction!r}]")

    @property
    def batch_size(self) -> int:
        """Number of environments, B."""
        return len(self.instruction)

    @property
    def environments(self) -> NDArray[np.int64]:
        """(B,) the number of the environment, or client, that each row is of: `env_ids`, or else the row's own."""
        return np.arange(self.batch_size) if self.env_ids is None else np.asarray(self.env_ids)

    def select(self, index: Sequence[int] | NDArray[np.int64]) -> Observation:
        """The observation of the environments in `index`, in that order."""
        ids = np.asarray(index, dtype=np.int64)

        def pick(arrays: dict[str, NDArray] | None) -> dict[str, NDArray] | None:
            return None if arrays is None else {name: array[ids] for name, array in arrays.items()}

        return Observation(
            images={name: image[ids] for name, image in self.images.items()},
            proprio=self.proprio[ids],
            instruction=[self.instruction[i] for i in ids],
            privileged=None if self.privileged is None else self.privileged[ids],
            depth=pick(self.depth),
            intrinsics=pick(self.intrinsics),
            extrinsics=pick(self.extrinsics),
            history=pick(self.history),
            live=None if self.live is None else self.live[ids],
            exact_proprio=None if self.exact_proprio is None else self.exact_proprio[ids],
            env_ids=ids if self.env_ids is None else self.env_ids[ids],
        )


@dataclass
class StepResult:
    """Result of `VecEnv.step_chunk`: the state after up to C control steps in each of B environments."""

    obs: Observation
    """Observation of every environment after its last executed step. Never of a new episode: the caller resets."""
    reward: NDArray[np.float32]
    """(B,) summed over the executed control steps."""
    terminated: NDArray[np.bool_]
    """(B,) the task itself ended (success or failure)."""
    truncated: NDArray[np.bool_]
    """(B,) the time limit cut the episode. Never merged with `terminated`: it bootstraps, that one does not."""
    n_steps: NDArray[np.int64]
    """(B,) control steps really executed, 0..C: fewer than C if the episode ended inside the chunk, 0 if before."""
    info: dict[str, NDArray] = field(default_factory=dict)
    """Per-environment arrays; always holds bool `success` (B,) and bool `wrong_object` (B,)."""
    diverged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """(B,) the simulation's state was no longer finite, which truncated the episode. Left out: nowhere."""
    worker_restarted: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """(B,) the episode was lost with its worker process: truncated, without a step or success. Left out: nowhere."""
    executed_until: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(B,) actions of the chunk that were executed or, under latency, will be. Left out: `n_steps`."""

    def __post_init__(self) -> None:
        count = len(self.n_steps)
        if not len(self.diverged):
            self.diverged = np.zeros(count, bool)
        if not len(self.worker_restarted):
            self.worker_restarted = np.zeros(count, bool)
        if not len(self.executed_until):
            self.executed_until = self.n_steps


@dataclass(frozen=True)
class PolicySpec:
    """Interface of a policy and how its action chunks are meant to be executed. None: not declared."""

    action_spec: ActionSpec | None = None
    """Names, bounds and rate of its actions. None: a stock openpi server, or an expert made for its environment."""
    chunk_size: int | None = None
    """Actions of a chunk."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed before the next request. None: all."""
    cameras: tuple[str, ...] | None = None
    """Cameras that the policy reads."""
    proprio_dim: int | None = None
    """Width of the robot state that it reads. None: any."""
    proprio_names: tuple[str, ...] | None = None
    takes_prefix: bool = False
    """True if `act` can continue from the actions that are still to be executed (real-time chunking)."""
    grounding_threshold: float | None = None
    """Below it, the policy's `confidence` says that nothing its instruction names is in sight (`vla.core.grounding`).
    None: it tells no confidence."""
    picture_size: int | None = None
    """Side in pixels of the pictures that a simulator should draw for it. None: any."""
    depth: bool | None = None
    """True if it reads the depth and the calibration of its cameras, too; of a robot, whether it gives them."""
    observations: int = 1
    """Consecutive control steps whose observations it reads. More than 1: it remembers them for each environment, and
    must be asked at every control step."""
    talks: bool = False
    """True if it answers questions about what it sees and does (`vla.language.talking`)."""
    memory_frames: int | None = None
    """Earlier decisions that it looks at again: it must be asked for every decision of an episode in turn, and reset
    before the next. None: each observation decides alone."""
    routes: bool = False
    """True if it chooses at an episode's first decision how to act in all of it (`vla.model.modulators`)."""

    @property
    def episodic(self) -> bool:
        """True if a decision depends on earlier ones of its episode: whose each observation is must be known, and when
        an episode begins."""
        return self.routes or self.memory_frames is not None


@dataclass(frozen=True)
class Prefix:
    """The actions that B robots still have to execute at the moment of their next request."""

    actions: NDArray[np.float32]
    """(B, T, A), environment units; a row's actions after its `left` first ones mean nothing."""
    left: NDArray[np.int64]
    """(B,) how many of them there are."""
    delay: NDArray[np.int64]
    """(B,) how many of those will have been executed when the answer comes."""


@runtime_checkable
class Policy(Protocol):
    """Anything that acts: a VLA, an exported graph, a remote server, a scripted expert, an SB3 model."""

    @property
    def spec(self) -> PolicySpec:
        """The interface of this policy: actions, proprio, cameras and how its chunks are executed."""

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget the state of these environments (all when None): a new episode starts there."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> the whole chunk (B, chunk_size, A) in environment units.

        The caller cuts it to the executed part (`executed`). `prefix` only for a policy whose spec says `takes_prefix`.
        """


def executed(spec: PolicySpec, chunk: ActionChunk) -> ActionChunk:
    """The part (B, n_action_steps, A) of a whole chunk that is executed before the next observation."""
    steps = spec.n_action_steps
    return chunk if steps is None or chunk.shape[1] <= steps else np.ascontiguousarray(chunk[:, :steps])


@runtime_checkable
class VecEnv(Protocol):
    """B environments stepped together: CPU and Warp backends, robosuite and Meta-World adapters.

    Implementations inherit from this class, which gives them the facts that most environments lack.
    """

    num_envs: int
    action_spec: ActionSpec
    cameras: tuple[str, ...]
    proprio_dim: int
    privileged_dim: int
    horizon: int
    """Control steps after which an episode is truncated."""
    proprio_names: tuple[str, ...] = ()
    """One name per component of the proprio; empty where they have none."""
    task_names: tuple[str, ...] = ()
    """Tasks that `reset` takes by name; empty for an environment of one unnamed task."""
    plane: PlanarSymmetry | None = None
    """Planar symmetry of proprio and privileged state; None where there is none, or none is known."""
    n_action_steps: int | None = None
    """Control steps between two decisions where the environment fixes them (latency); None: the length of the chunk."""
    chunk_steps: int | None = None
    """Actions that a chunk must hold at least; None: any number."""

    @property
    def tasks(self) -> list[str]:
        """Task of each environment's current episode (B); "" where it has no name."""
        return [""] * self.num_envs

    @property
    def templates(self) -> list[str]:
        """Phrasing template of each environment's current instruction (B); "" where it has none."""
        return [""] * self.num_envs

    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """Start an episode in environments `env_ids` (all when None), one seed each; the observation is of ALL of them.

        The seed alone (with the task name, when given) fixes the scene, the target and the phrasing.
        """
        ...

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """Run up to C control steps per environment without rendering, then render once. A finished environment stands
        still."""
        ...

    def observation(self) -> Observation:
        """The present observation of all B environments. Images are those of the last render.

        An observation never changes after it was handed out: backends with worker processes or a device copy out of
        their memory, once. Environments in the caller's own process (`envs.sim.base_worlds`) hand out views of their
        images instead, which the next render overwrites.
        """
        ...

    def set_rendering(self, on: bool) -> None:
        """Switch rendering off (images keep the last frame) or on again (from the next reset or chunk)."""

    def alternative_instructions(self) -> list[str]:
        """B instructions that name another object than the one counted (the swapped-instruction control)."""
        return [""] * self.num_envs

    def close(self) -> None:
        """Free processes, memory and graphics contexts. Safe to call twice."""
