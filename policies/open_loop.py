"""A policy beside a recording: what it would have done at each moment, and how far that is from what was done.

Open loop: the policy sees the recorded pictures and state, never where its own actions would have led.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.checking.check import Report
from vla.checking.recording import Recording
from vla.core.compatibility import fitted
from vla.core.types import ActionSpec, Observation, Policy, PolicySpec, executed
from vla.data.camera_geometry import CameraGeometry, geometry_features, measured_by, read_geometry, table_columns
from vla.data.findings import Finding
from vla.data.lerobot_dataset import ACTION, PROPRIO, on_disk
from vla.data.tables import instructions, read_table

PHASES = ("start", "middle", "end")
"""Thirds of an episode."""
_BATCH = 16


@dataclass(frozen=True, eq=False)
class OpenLoop:
    """A policy's actions beside the recorded ones."""

    name: str
    """The policy's folder or server."""
    predicted: dict[int, NDArray[np.float32]]
    """Episode -> (T, A): the actions as they would be executed, chunk after chunk."""
    error: NDArray[np.float64]
    """(phases, A) mean absolute error, as a share of the component's range in the recording."""
    mean_error: NDArray[np.float64]
    """(phases, A) that of the recording's mean action."""
    names: tuple[str, ...]

    def finding(self) -> Finding:
        """The result in one sentence: a warning for a policy no better than the mean action."""
        total, mean = float(self.error.mean()), float(self.mean_error.mean())
        parts = self.error.mean(0)
        phases = self.error.mean(1)
        worst, phase = int(parts.argmax()), int(phases.argmax())
        figures = (
            f"{self.name} differs from the recorded actions by {100 * total:.1f}% of their range on average over "
            f"{len(self.predicted)} episodes (the mean action: {100 * mean:.1f}%), most in '{self.names[worst]}' "
            f"({100 * parts[worst]:.1f}%) and at the {PHASES[phase]} of episodes ({100 * phases[phase]:.1f}%)"
        )
        if total < mean:
            return Finding("policy_error", "note", figures, tuple(self.predicted))
        remedy = "it does not know these scenes, or cameras, units or state differ from its training"
        return Finding("policy_lost", "warning", f"{figures}: {remedy}", tuple(self.predicted))

    def data(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        rows = {phase: dict(zip(self.names, row, strict=True)) for phase, row in zip(PHASES, self.error.tolist())}  # noqa: B905
        total = float(self.error.mean())
        return {"policy": self.name, "episodes": list(self.predicted), "error": total,
                "error_of_mean_action": float(self.mean_error.mean()), "per_phase": rows}  # fmt: skip


def spread(report: Report, count: int) -> list[int]:
    """At most `count` of the readable episodes, evenly spread."""
    numbers = [episode.number for episode in report.episodes]
    places = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)) if numbers else []
    return [numbers[place] for place in places]


def open_loop(
    policy: Policy,
    name: str,
    report: Report,
    episodes: Sequence[int],
    *,
    say: Callable[[str], None],
    on_episode: Callable[[int], None] = lambda _: None,
) -> OpenLoop:
    """Play `policy` beside these episodes. ValueError, one line, where its components, cameras or state do not fit the
    recording's, or there is nothing to play beside."""
    recording = report.recording
    if not episodes:
        raise ValueError(f"{recording.root} has no episode whose values can be read: there is nothing to compare with")
    policy = fitted(policy, _side(report), say=say, where="recording")
    cameras = [camera for camera in recording.cameras if camera in (policy.spec.cameras or recording.cameras)]
    readers = {
        camera: on_disk(
            recording.root, recording.info, recording.table, recording.order, recording.cameras[camera], None
        )
        for camera in cameras
    }
    geometry = _geometry(recording, cameras) if policy.spec.depth else {}
    texts = instructions(recording.root, recording.table)
    span, mean = report.scales[ACTION].span, report.scales[ACTION].mean
    predicted: dict[int, NDArray[np.float32]] = {}
    sums = np.zeros((2, len(PHASES), len(span)))
    counts = np.zeros(len(PHASES))
    for place, table in recording.vectors():
        number = int(recording.episodes[place])
        if number not in episodes:
            continue
        action, state = (recording.values(table, key) for key in (ACTION, PROPRIO))
        chosen = _played(policy, recording, place, state.astype(np.float32), readers, geometry, texts)
        predicted[number] = chosen
        phase = np.minimum(np.arange(len(action)) * len(PHASES) // len(action), len(PHASES) - 1)
        for which in range(len(PHASES)):
            there = phase == which
            for of, guess in enumerate((chosen, mean)):
                sums[of, which] += (np.abs(action - guess) / span)[there].sum(0)
            counts[which] += there.sum()
        on_episode(len(predicted))
    shares = sums / np.maximum(counts, 1)[None, :, None]
    return OpenLoop(name, predicted, shares[0], shares[1], recording.names[ACTION])


def _geometry(recording: Recording, cameras: Sequence[str]) -> dict[str, CameraGeometry]:
    """Depth and calibration of these cameras, for a policy that reads depth. ValueError naming what is missing."""
    keys = geometry_features(recording.info["features"], cameras)
    table, _ = read_table(recording.root, recording.info, table_columns(recording.info["features"], keys))
    return read_geometry(recording.root, recording.info, table, keys, None)


def _side(report: Report) -> PolicySpec:
    """The recording as what a policy is fitted to."""
    recording, scale = report.recording, report.scales[ACTION]
    bounds = (tuple(part.tolist()) for part in (scale.least, scale.most))
    return PolicySpec(
        action_spec=ActionSpec(recording.names[ACTION], *bounds, recording.fps),
        cameras=tuple(recording.cameras),
        proprio_dim=len(recording.names[PROPRIO]),
        proprio_names=recording.names[PROPRIO],
    )


def _played(
    policy: Policy,
    recording: Recording,
    place: int,
    state: NDArray[np.float32],
    readers: dict[str, Any],
    geometry: Mapping[str, CameraGeometry],
    texts: list[str],
) -> NDArray[np.float32]:
    """(T, A) of one episode: a chunk is asked for where the one before it has been executed."""
    rows = recording.rows(place)
    length = rows.stop - rows.start
    policy.reset()
    first = _act(policy, rows.start, [0], state, readers, geometry, texts)
    step = first.shape[1]
    out = np.empty((length, first.shape[2]), np.float32)
    starts = list(range(0, length, step))
    policy.reset()
    batch = 1 if policy.spec.episodic else _BATCH  # one that keeps something of an episode decides one after another
    for at in range(0, len(starts), batch):
        wanted = starts[at : at + batch]
        for start, chunk in zip(wanted, _act(policy, rows.start, wanted, state, readers, geometry, texts), strict=True):
            out[start : start + step] = chunk[: length - start]
    return out


def _act(
    policy: Policy,
    start: int,
    frames: Sequence[int],
    state: NDArray[np.float32],
    readers: dict[str, Any],
    geometry: Mapping[str, CameraGeometry],
    texts: list[str],
) -> NDArray[np.float32]:
    """(B, n, A): the part of the chunks that is executed, at these frames of the episode that begins at row `start`."""
    rows = start + np.array(frames)
    seen = Observation(
        images={camera: frames_of[rows] for camera, frames_of in readers.items()},
        proprio=state[list(frames)],
        instruction=[texts[row] for row in rows],
        **measured_by(geometry, rows),
    )
    return executed(policy.spec, policy.act(seen))
