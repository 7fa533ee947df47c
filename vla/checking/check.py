"""`check_dataset`: reads a recording once for its scales, once for its episodes and once for its pictures, and says
what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.checking.cameras import calibration_findings, camera_findings
from vla.checking.commands import command_findings, find_pairs, gripper_pairs
from vla.checking.components import UNITS, component_findings, exchanged_names, offsets
from vla.checking.episodes import BY_RANGE, episode_findings
from vla.checking.motion import EpisodeFacts, Pair, facts_of
from vla.checking.recording import FEATURES, Recording, open_recording
from vla.checking.scales import Following, Sample, Scale
from vla.checking.texts import episode_tasks, task_count, text_findings
from vla.checking.timing import bookkeeping_findings, colour_findings, statistics_findings
from vla.data.dataset_meta import depth_maps, naming_findings, unread_findings, unused_findings
from vla.data.findings import SEVERITIES, Finding, faint_findings, listed, numbered, rare_findings, spread_successes
from vla.data.lerobot_dataset import ACTION, PROPRIO, SUCCESS, DemoSet
from vla.data.tables import Rounding, flags, foreign_findings, lost_motion, not_finite, timing_findings
from vla.model.config import DEFAULT_BACKBONE
from vla.runtime.console import one_line

_QUICK = 1_000_000
"""Frames up to which training looks at all state and actions twice more, some 10 microseconds each."""
_LOOKED_AT = 8
"""Pictures of each camera, and episodes, that training looks at."""
PICTURES = 12
"""Pictures of each camera that are looked at in every episode."""


@dataclass(frozen=True, eq=False)
class Report:
    """The verdict on a recording, and what it rests on."""

    recording: Recording
    findings: tuple[Finding, ...]
    episodes: tuple[EpisodeFacts, ...]
    """Those whose vectors could be read."""
    tasks: dict[int, str]
    scales: dict[str, Scale]
    pairs: tuple[Pair, ...]

    def count(self, severity: str) -> int:
        """Findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def clean(self) -> bool:
        """True without errors and warnings."""
        return not (self.count("error") or self.count("warning"))

    @property
    def verdict(self) -> str:
        """One line for a person."""
        told = ", ".join(numbered(self.count(kind), kind) for kind in SEVERITIES if self.count(kind))
        if self.count("error"):
            return f"do not train on it as it is: {told}"
        if self.count("warning"):
            return f"look at it before training: {told}"
        return f"ready to train on: no fault found ({told})" if told else "ready to train on: no fault found"

    def size(self) -> str:
        """How much there is, for a person."""
        recording = self.recording
        seconds = recording.frames / recording.fps
        tasks = task_count(recording)
        return (
            f"{numbered(len(recording.episodes), 'episode')}, {recording.frames} frames at {recording.fps:g} Hz "
            f"({seconds / 60:.1f} minutes), {numbered(tasks, 'task string')}, cameras {', '.join(recording.cameras)}"
        )

    def data(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        recording = self.recording
        idle = sum(episode.idle[2] for episode in self.episodes)
        return {
            "dataset": str(recording.root),
            "clean": self.clean,
            "verdict": self.verdict,
            "episodes": len(recording.episodes),
            "frames": recording.frames,
            "fps": recording.fps,
            "cameras": list(recording.cameras),
            "idle_share": idle / max(sum(episode.length for episode in self.episodes), 1),
            "findings": [asdict(finding) for finding in self.findings],
            "per_episode": [
                {
                    "episode": episode.number,
                    "frames": episode.length,
                    "task": self.tasks.get(episode.number, ""),
                    "idle_start": episode.idle[0],
                    "idle_end": episode.idle[1],
                    "idle": episode.idle[2],
                    "jerk": None if np.isnan(episode.jerk) else episode.jerk,
                }
                for episode in self.episodes
            ],
        }


def check_dataset(
    root: Path,
    *,
    backbone: str = DEFAULT_BACKBONE,
    pictures: int = PICTURES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a LeRobotDataset v3 folder. ValueError where it is none, or cannot be read at all.

    `backbone`: whose words task strings are compared with; `pictures`: how many of each camera and episode are looked
    at, 0 for none; `on_progress(episodes read, to read)`, of all three passes together.
    """
    recording = open_recording(root)
    count = len(recording.episodes)
    passes = 2 + bool(pictures) * (1 + any(map(recording.encoded, recording.cameras.values())))

    def told(which: int) -> Callable[[int], None]:
        return lambda done: on_progress(which * count + done, passes * count) if on_progress else None

    found = [
        *timing_findings(recording.table, recording.info),
        *bookkeeping_findings(recording),
        *naming_findings(recording.info["features"], FEATURES),
        *unused_findings(recording.info["features"], ACTION),
        *unread_findings(recording.info["features"], PROPRIO),
        *foreign_findings(root),
        *_depth(recording.info["features"]),
        *_successes(recording),
        *text_findings(recording, backbone),
    ]
    survey = _Survey(recording)
    for place, values in _readable(recording, survey.faults):
        survey.add(place, values)
        told(0)(place + 1)
    found += survey.findings()
    facts: list[EpisodeFacts] = []
    scales: dict[str, Scale] = {}
    pairs: list[Pair] = []
    tasks = episode_tasks(recording)
    if survey.places:
        scales = survey.scales()
        pairs = find_pairs(survey.following, scales, recording.names)
        grippers = gripper_pairs(scales, recording.names)
        options: dict[str, Any] = {"fps": recording.fps, "pictures": pictures}
        for place, values in _readable(recording, {}):
            facts.append(facts_of(int(recording.episodes[place]), values, scales, pairs, grippers, **options))
            told(1)(place + 1)
        found += command_findings(pairs, survey.following, facts, scales, recording.names, recording.fps)
        found += exchanged_names(survey.following, scales, recording.names)
        found += offsets(pairs, facts, scales, recording.names)
        told_units = {part for finding in found if finding.code in UNITS for part in finding.components}
        found += component_findings(facts, scales, recording.names, told_units)
        unlike = any(finding.code == "units_differ" for finding in found)  # ranges of two units measure no motion
        found += statistics_findings(recording, facts)
        told_of = episode_findings(facts, tasks, recording.names, recording.fps)
        found += [finding for finding in told_of if not (unlike and finding.code in BY_RANGE)]
    if pictures:
        found += camera_findings(recording, facts, told(2), told(passes - 1))
        found += calibration_findings(recording)
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(recording, tuple(found), tuple(facts), tasks, scales, tuple(pairs))


def _depth(features: Mapping[str, Any]) -> list[Finding]:
    """A note on the cameras that are left out because they see depth."""
    if not (names := depth_maps(features)):
        return []
    text = f"depth maps are left out, policies read colour cameras: {', '.join(names)}"
    return [Finding("depth_left_out", "note", text)]


def _successes(recording: Recording) -> list[Finding]:
    """Findings about when episodes succeeded, where the recording says that they did."""
    if SUCCESS not in recording.info["features"]:
        return []
    try:
        parts = [flags(recording.root, table, SUCCESS) for _, table in recording.vectors((SUCCESS,))]
    except ValueError as problem:
        return [Finding("success_unreadable", "error", one_line(problem))]
    return spread_successes(np.concatenate(parts), recording.table.column("episode_index").to_numpy())


def training_warnings(root: str | Path, demos: DemoSet) -> list[str]:
    """One line for each error and warning about a dataset that is about to be learnt: those of what was loaded, and
    those of `check_dataset` without its pictures. A check that fails is such a line, too: it does not stop training."""
    found = demos.warnings()
    if demos.num_frames <= _QUICK:
        try:
            report = check_dataset(Path(root), pictures=0)
        except (ValueError, OSError) as problem:
            return [*found, f"what `vla check` looks at could not be read: {one_line(problem)}"]
        found += [finding.text for finding in report.findings if finding.severity != "note"]
        cameras = {camera: key for camera, key in report.recording.cameras.items() if camera in demos.images}
        found += [finding.text for finding in colour_findings(Path(root), cameras, _colours(demos))]
    return list(dict.fromkeys(found))


def _colours(demos: DemoSet) -> dict[str, dict[int, NDArray[np.float32]]]:
    """Camera -> episode -> (n, 3) mean colours of a few pictures of some episodes."""
    spread = np.unique(np.linspace(0, len(demos.episodes) - 1, _LOOKED_AT).astype(np.int64))
    found: dict[str, dict[int, NDArray[np.float32]]] = {camera: {} for camera in demos.images}
    for number in np.array(demos.episodes)[spread].tolist():
        rows = np.flatnonzero(demos.episode_index == number)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(np.int64))]
        for camera, image in demos.images.items():
            found[camera][number] = image[rows].mean((1, 2), dtype=np.float32)
    return found


def _readable(
    recording: Recording, faults: dict[tuple[str, str], list[tuple[int, str]]]
) -> Iterator[tuple[int, dict[str, NDArray[np.float64]]]]:
    """(place, feature -> (T, D)) of every episode whose vectors are finite in 32 bits. The others are entered in
    `faults`: (code, feature) -> (episode, words)."""
    for place, table in recording.vectors():
        values: dict[str, NDArray[np.float64]] = {}
        for key in FEATURES:
            number = int(recording.episodes[place])
            try:
                values[key] = recording.values(table, key)
            except ValueError as problem:
                faults.setdefault(("values_missing", key), []).append((number, one_line(problem)))
                continue
            if problem := _unfit(table, key, values[key]):
                faults.setdefault((problem[0], key), []).append((number, problem[1]))
                del values[key]
        if len(values) == len(FEATURES):
            yield place, values


def _unfit(table: pa.Table, key: str, values: NDArray[np.float64]) -> tuple[str, str] | None:
    """(code, words) for a value that is no number, or none that 32 bits hold."""
    if not np.isfinite(values).all():
        return "not_finite", f"{not_finite(table, key, values)}: mend it or delete the episode"
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        row, component = np.argwhere(~np.isfinite(narrow))[0]
        words = f"{not_finite(table, key, narrow)} in the 32-bit numbers that a policy reads, recorded was "
        return "too_large", f"{words}{values[row, component]:.4g}: a recording error, or another unit is needed"
    return None


class _Survey:
    """First pass: what must be known of all episodes before any can be judged."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.following = Following()
        self.places: list[int] = []
        self.faults: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self._samples = {key: Sample() for key in FEATURES}
        self._steps = {key: Sample() for key in FEATURES}
        self._of = Sample()
        """The places of the episodes of what is sampled."""
        self._rounding: dict[str, Rounding] = {}

    def add(self, place: int, values: dict[str, NDArray[np.float64]]) -> None:
        """Add an episode."""
        self.places.append(place)
        self._of.add(np.full((len(values[ACTION]), 1), float(place)))
        for key, part in values.items():
            self._samples[key].add(part)
            self._steps[key].add(np.abs(np.diff(part, axis=0)))
            rounding = Rounding.of(part)
            self._rounding[key] = self._rounding[key].joined(rounding) if key in self._rounding else rounding
        action, state = (values[key] for key in reversed(FEATURES))
        if len(state) > 3:
            self.following.add(action, state)

    def scales(self) -> dict[str, Scale]:
        """The scale of each feature."""
        names = self._recording.names
        episodes = self._of.rows()[:, 0]
        return {
            key: Scale.of(self._samples[key].rows(), self._steps[key].rows(), episodes, key, names[key])
            for key in FEATURES
        }

    def findings(self) -> list[Finding]:
        """Findings about single values and about ranges."""
        found = []
        for (code, key), those in self.faults.items():
            numbers = tuple(number for number, _ in those)
            more = f" (and in {listed(numbers[1:])})" if len(numbers) > 1 else ""
            found.append(Finding(code, "error", those[0][1] + more, numbers, (key,)))
        for key in FEATURES if self.places else ():
            names = self._recording.names[key]
            found += lost_motion(key, names, self._rounding[key])
            found += rare_findings(key, self._samples[key].rows(), names)
            found += faint_findings(key, self._samples[key].rows(), names) if key == PROPRIO else []
        return found
