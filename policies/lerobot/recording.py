"""The black boxes of a controller as a LeRobotDataset: an episode a run, a frame a tick, or a step of the policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from policies.control.flight_log import frames_file, picture_bytes, read, reading
from policies.control.guards import GUARDS, Reaction
from policies.control.playback import Driver
from policies.teleop.resampling import Steps, episodes_of, steps_of
from vla.core.disk import remove, temporary, writing
from vla.data.lerobot_dataset import INTERVENTION
from vla.data.lerobot_writer import new_dataset, quietly

_log = logging.getLogger(__name__)
_SAME_RATE = 0.05
"""Share by which the ticks' rate may differ from the declared one."""
_REACTIONS, _DRIVERS = get_args(Reaction), get_args(Driver)
TIMING = ("now_s", "late_s", "work_s", "observation_age_s", "action_age_s")


def logs_of(place: Path) -> list[Path]:
    """The log at `place`, or those in a folder, by name. ValueError for a folder without any."""
    if not place.is_dir():
        return [place]
    logs = sorted(place.glob("*.jsonl"))
    if not logs:
        raise ValueError(f"{place} is a folder without logs (*.jsonl): give the log of a run (vla control --log FILE)")
    return logs


def to_dataset(logs: Path | Sequence[Path], out: Path) -> Path:
    """Write logs (and their frames) to the new folder `out`, an episode each: observation, action sent, action wanted,
    guards, timing.

    Of runs in which somebody could take over it also has LeRobot's feature `intervention`, true where a person drove,
    and `driver`; a frame is then a step of the policy and not a tick (`policies.teleop.resampling`), and every scene
    of a simulated robot an episode.

    The action of a tick that sent nothing is what was in effect: the position or switch sent last, or at which the run
    began, and no displacement or speed. What was wanted, where nothing was, is the same; the age of what never was is
    -1: a dataset's statistics bear nothing that is not finite. The folder is there only when it is whole. The dataset's
    rate is that at which the ticks came; a warning tells where that is not the declared one. ValueError for a log
    without pictures or of a dry run, logs that differ in what they hold, or a folder that is there.
    """
    if out.exists():
        raise ValueError(f"{out} is already there: choose another folder")
    runs = []
    for log in [logs] if isinstance(logs, Path) else logs:
        with reading(log):
            runs.append(_Run(log))
    for run in runs[1:]:
        if (run.features, run.fps) != (runs[0].features, runs[0].fps):
            raise ValueError(
                f"{run.log} holds another robot, rate or kind of run than {runs[0].log}: give each by itself"
            )
    part = temporary(out)
    try:
        with writing(out):
            dataset = new_dataset(part, out.name, runs[0].fps, runs[0].features)
            for run in runs:
                for episode in run.episodes():
                    for frame in episode:
                        dataset.add_frame(frame)
                    with quietly():
                        dataset.save_episode()
            with quietly():
                dataset.finalize()
            part.rename(out)
    finally:
        remove(part)
    return out


class _Run:
    """The log of one run, with its pictures."""

    def __init__(self, log: Path) -> None:
        header, lines = read(log)
        self.log, self._header = log, header
        self._ticks, task = [], ""
        for line in lines:
            task = line.get("task", task)
            if "inputs" in line:
                self._ticks.append(line | {"task": task})
        self._note_effects()
        facts = [line for line in lines if "cameras" in line]
        if not self._ticks or not facts:
            raise ValueError(f"{log} holds no tick that saw anything")
        if header.get("control", {}).get("dry_run"):
            raise ValueError(
                f"{log} is the log of a --dry-run: the robot was sent none of its actions, and nothing is to be learnt "
                "of them; log a run without --dry-run"
            )
        self._cameras = {name: tuple(shape) for name, shape in facts[0]["cameras"].items()}
        size = picture_bytes(lines)
        if not frames_file(log).is_file():
            raise ValueError(f"{log} is without its pictures: put {frames_file(log).name}, written with it, beside it")
        pixels = np.memmap(frames_file(log), np.uint8, "r")
        self._frames = pixels[: len(pixels) // size * size].reshape(-1, size)
        spec = header["action_spec"]
        self._actions, self._hz, self.by_hand = spec["names"], spec["control_hz"], bool(header.get("teleop"))
        self.fps = _rate([tick["inputs"]["now_s"] for tick in self._ticks], self._hz, log)
        if self.by_hand:
            self._policy_hz = header["control"].get("policy_hz") or self._hz
            self.fps = max(1, round(self.fps * self._policy_hz / self._hz))
        proprio = header["proprio_names"] or [f"s{i}" for i in range(len(self._ticks[0]["inputs"]["proprio"]))]
        vectors = {
            "observation.state": proprio,
            "action": self._actions,
            "wanted": self._actions,
            "guards": list(GUARDS),
            "reaction": list(_REACTIONS),
            "timing": list(TIMING),
            **({"driver": list(_DRIVERS)} if self.by_hand else {}),
        }
        self.features: dict[str, Any] = {
            name: {"dtype": "float32", "shape": (len(names),), "names": list(names)} for name, names in vectors.items()
        }
        if self.by_hand:
            self.features[INTERVENTION] = {"dtype": "bool", "shape": (1,), "names": None}
        for name, shape in self._cameras.items():
            self.features[f"observation.images.{name}"] = {
                "dtype": "image", "shape": shape, "names": ["height", "width", "channels"],
            }  # fmt: skip

    def _note_effects(self) -> None:
        """Give every tick "effect", the action that was in effect after it."""
        lasts = [kind in ("position", "switch") for kind in self._header["kinds"]]
        effect = [float(value) if stays else 0.0 for value, stays in zip(self._header["rest"], lasts, strict=True)]
        for tick in self._ticks:
            # A robot that cuts commands short says what it took; of one that took none, the command before it stands.
            sent = tick.get("sent") or tick["decision"]["action"]
            effect = tick["effect"] = [
                float(now) if sent and math.isfinite(float(now)) else was if stays else 0.0
                for now, was, stays in zip(sent or effect, effect, lasts, strict=True)
            ]

    def episodes(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Each episode's frames."""
        # those of a run that was cut off have no pictures; `pictures_lost` tells
        with reading(self.log):
            seen = [tick for tick in self._ticks if 0 <= tick["frame"] < len(self._frames)]
        if not self.by_hand:
            yield self._frames_of(seen)
            return
        for ticks in episodes_of(seen):
            steps = steps_of([tick["driver"] for tick in ticks], self._hz, self._policy_hz)
            if steps.count:
                yield self._steps(ticks, steps)

    def _frames_of(self, ticks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for tick in ticks:
            with reading(self.log):
                frame = self._frame(tick, self._vectors(tick))
            yield frame

    def _steps(self, ticks: Sequence[dict[str, Any]], steps: Steps) -> Iterator[dict[str, Any]]:
        rows = [self._vectors(tick) for tick in ticks]
        kinds = self._header["kinds"]
        moved = {
            name: steps.actions(np.array([_finite(row[name]) for row in rows], np.float64), kinds)
            for name in ("action", "wanted")
        }
        for step, (first, last, driver) in enumerate(zip(steps.first, steps.last, steps.driver, strict=True)):
            row = rows[first] | {name: values[step] for name, values in moved.items()}
            row["guards"] = np.any([rows[tick]["guards"] for tick in range(first, last + 1)], axis=0)
            row["driver"] = [driver == one for one in _DRIVERS]
            yield self._frame(ticks[first], row) | {INTERVENTION: np.array([driver == "human"])}

    def _vectors(self, tick: dict[str, Any]) -> dict[str, Any]:
        said, decided = tick["inputs"], tick["decision"]
        return {
            "observation.state": said["proprio"],
            "action": tick["effect"],
            "wanted": said["wanted"] or tick["effect"],
            "guards": [guard in decided["guards"] for guard in GUARDS],
            "reaction": [decided["reaction"] == reaction for reaction in _REACTIONS],
            "timing": [float(said.get(name, tick.get(name, -1.0))) for name in TIMING],
        }

    def _frame(self, tick: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        frame: dict[str, Any] = {name: _finite(values) for name, values in row.items()}
        start, raw = 0, self._frames[tick["frame"]]
        for name, shape in self._cameras.items():
            end = start + int(np.prod(shape))
            frame[f"observation.images.{name}"] = np.array(raw[start:end]).reshape(shape)
            start = end
        return frame | {"task": tick["task"]}


def _rate(times_s: list[float], declared_hz: float, log: Path) -> int:
    """Frames per second of ticks at these times: not the declared rate where the ticks missed their deadlines."""
    steps = np.diff(times_s)
    real = 1.0 / float(np.median(steps)) if len(steps) and np.median(steps) > 0 else declared_hz
    if abs(real - declared_hz) <= _SAME_RATE * declared_hz:
        return round(declared_hz)
    told = "%s: the ticks came at %.1f Hz, not at the %g Hz declared; the dataset has the rate at which they came"
    _log.warning(told, log, real, declared_hz)
    return max(1, round(real))


def _finite(values: Any) -> np.ndarray:
    return np.nan_to_num(np.array([float(x) for x in values], np.float32), nan=0.0, posinf=-1.0, neginf=-1.0)
