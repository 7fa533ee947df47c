"""Keyframes as actions: from an observation and what a keyframe policy says about it to a chunk. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.core.types import ActionChunk, Observation
from vla.model.heatmap.config import Body, HeatmapConfig, Workspace
from vla.model.heatmap.motion import plan
from vla.model.heatmap.rotation import BINS, matrices, middles, turn_of, turns
from vla.processing.preprocess import Preprocessor


@dataclass(frozen=True)
class Keyframes:
    """B poses that the hand goes to next."""

    position_B3: NDArray[np.float32]
    """In the robot's frame, m."""
    open_B: NDArray[np.bool_]
    """The gripper's command once there."""
    lift_B: NDArray[np.bool_]
    """Up, across and down, instead of straight."""
    done_B: NDArray[np.bool_]
    """There is none: the task is over, and the hand stays."""
    turn_B3: NDArray[np.int64] | None
    """The hand's orientation there, in `rotation.BINS` bins about three axes; None for a hand that keeps its own."""

    @staticmethod
    def of(position_B3: NDArray[np.float32], verdicts_BF: NDArray[np.float32], config: HeatmapConfig) -> Keyframes:
        """From a look's verdicts: logits of the flags, and of the bins."""
        flags = verdicts_BF[:, : len(config.flags)] > 0
        turn = verdicts_BF[:, len(config.flags) :].reshape(len(flags), -1, BINS).argmax(-1)
        done = flags[:, 2] if config.done else np.zeros(len(flags), bool)
        return Keyframes(position_B3, flags[:, 0], flags[:, 1], done, turn if turn.shape[1] else None)


class Columns:
    """Where a robot's state and actions hold what a keyframe policy needs."""

    def __init__(self, body: Body, proprio_names: Sequence[str], action_names: Sequence[str]) -> None:
        """ValueError naming what is missing, or what the policy cannot give."""

        def places(names: Sequence[str], known: Sequence[str], what: str) -> list[int]:
            missing = [name for name in names if name not in known]
            if missing:
                raise ValueError(
                    f"heat-maps need {what} called {', '.join(names)}; these demonstrations have {', '.join(known)}"
                )
            return [list(known).index(name) for name in names]

        self.hand = places(body.hand, proprio_names, "state components")
        self.lead = places(body.lead, proprio_names, "state components") if body.lead else None
        self.gripper = places([body.gripper], proprio_names, "a state component")[0]
        self.orientation = places(body.orientation, proprio_names, "state components") if body.orientation else None
        taken = {*self.hand, *(self.lead or ()), *(self.orientation or ())}
        self.state = [column for column in range(len(proprio_names)) if column not in taken]
        self.move = places(body.move, action_names, "action components")
        self.grip = places([body.grip], action_names, "an action component")[0]
        self.turn = places(body.turn, action_names, "action components") if body.turn else []
        if foreign := set(action_names) - {*body.move, body.grip, *(body.turn or ())}:
            raise ValueError(
                f"heat-maps give a pose and the gripper, not {', '.join(sorted(foreign))}: these demonstrations "
                "turn the hand in a way that is not known, or have another arm; train a chunk policy (--head l1)"
            )

    def commanded(self, proprio: NDArray[np.floating]) -> NDArray[np.floating]:
        """(..., 3) commanded positions of states (..., P): the hand's own where the state tells no lead."""
        hand = proprio[..., self.hand]
        return hand if self.lead is None else hand + proprio[..., self.lead]


class Execution:
    """One robot's way to its keyframes: what surrounds the network, whoever runs it."""

    def __init__(self, config: HeatmapConfig, processor: Preprocessor) -> None:
        """ValueError as `Columns`."""
        self.config, self.processor = config, processor
        names = processor.config.proprio_names or ()
        self.columns = Columns(config.body, names, processor.config.action_names)

    def chunk(self, obs: Observation, decide: Callable[[Any, NDArray[np.float64]], Keyframes]) -> ActionChunk:
        """The way (B, chunk_size, A) to the next keyframe, environment units. Environments that are not live stand
        still, and so do those whose task is over. `decide` is given the processor's arrays of those that are live, and
        their raw state.

        FloatingPointError if a position is not finite."""
        live = np.ones(obs.batch_size, bool) if obs.live is None else obs.live
        columns, motion = self.columns, self.config.motion
        proprio = np.asarray(obs.proprio, np.float64)
        opened = proprio[:, columns.gripper] > self.config.body.open_above
        chunk = np.zeros((obs.batch_size, self.config.chunk_size, len(self.processor.config.action_names)))
        chunk[..., columns.grip] = np.where(opened, 1.0, -1.0)[:, None]
        if live.any():
            rows = np.flatnonzero(live)
            key = decide(self.processor.arrays(obs if live.all() else obs.select(rows)), proprio[rows])
            if not np.isfinite(key.position_B3).all():
                raise FloatingPointError("the model's position is not finite: its weights or inputs are damaged")
            for at, row in enumerate(rows):
                if key.done_B[at]:
                    continue
                way = plan(
                    proprio[row, columns.hand], columns.commanded(proprio[row]), key.position_B3[at],
                    open_now=bool(opened[row]), open_then=bool(key.open_B[at]), lift=bool(key.lift_B[at]),
                    motion=motion, chunk_size=chunk.shape[1],
                    turning=None if key.turn_B3 is None else self._turning(proprio[row], key.turn_B3[at]),
                )  # fmt: skip
                chunk[row][:, [*columns.move, *columns.turn, columns.grip]] = way
        low, high = (np.array(bound) for bound in (self.processor.action_spec.low, self.processor.action_spec.high))
        # Only the gripper may have other ends than +1 and -1: displacements are scaled by what was measured.
        ends = (high, low) if self.config.body.grip_opens == "high" else (low, high)
        chunk[..., columns.grip] = np.where(chunk[..., columns.grip] > 0, *(end[columns.grip] for end in ends))
        return np.clip(chunk, low, high).astype(np.float32)

    def _turning(self, proprio_P: NDArray[np.float64], bins_3: NDArray[np.int64]) -> NDArray[np.floating]:
        """(n, 3) actions that turn the hand, no faster than the robot's bounds allow."""
        motion, spec, columns = self.config.motion, self.processor.action_spec, self.columns
        now = matrices(proprio_P[None, columns.orientation])[0]
        low, high = (np.array(bound)[columns.turn] for bound in (spec.low, spec.high))
        return turns(
            now, turn_of(middles(bins_3[None]))[0], radians_per_action=motion.radians_per_action, speed=motion.speed,
            most=self.config.chunk_size, bounds=(low, high),
        )  # fmt: skip


def require_sight(sees_B: NDArray[np.bool_], workspace: Workspace) -> None:
    """ValueError where no camera sees anything of the workspace: heat-maps of nothing have a peak, too."""
    if not sees_B.all():
        raise ValueError(
            f"no camera measures a point of the workspace, {workspace.half_m:g} m to each side of "
            f"({', '.join(f'{x:g}' for x in workspace.centre_m)}): the policy does not move; is depth in metres, "
            "and are the extrinsics in the robot's frame?"
        )
