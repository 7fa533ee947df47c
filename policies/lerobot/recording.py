"""A controller's black box as a LeRobotDataset: one episode, one frame per tick."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import numpy as np

from policies.control.flight_log import frames_file, picture_bytes, read
from policies.control.guards import GUARDS, Reaction
from vla.core.disk import remove, temporary, writing
from vla.data.lerobot_writer import new_dataset, quietly

_log = logging.getLogger(__name__)
_SAME_RATE = 0.05
"""Share by which the ticks' rate may differ from the declared one."""
TIMING = ("now_s", "late_s", "work_s", "observation_age_s", "action_age_s")


def to_dataset(log: Path, out: Path) -> Path:
    """Write `log` (and its frames) to the new folder `out`: observation, action sent, action wanted, guards, timing.

    The action of a tick that sent or wanted nothing is 0, the age of what never was -1: a dataset's statistics bear
    nothing that is not finite. The folder is there only when it is whole. The dataset's rate is that at which
    the ticks came; a warning tells where that is not the declared one. ValueError for a log without pictures or of a
    dry run, or a folder that is there.
    """
    if out.exists():
        raise ValueError(f"{out} is already there: choose another folder")
    part = temporary(out)
    try:
        with writing(out):
            _write(log, part, out.name)
            part.rename(out)
    finally:
        remove(part)
    return out


def _write(log: Path, out: Path, name: str) -> None:
    header, lines = read(log)
    ticks = [line for line in lines if "inputs" in line]
    facts = [line for line in lines if "cameras" in line]
    if not ticks or not facts:
        raise ValueError(f"{log} holds no tick that saw anything")
    if header.get("control", {}).get("dry_run"):
        raise ValueError(
            f"{log} is the log of a --dry-run: the robot was sent none of its actions, and nothing is to be learnt of "
            "them; log a run without --dry-run"
        )
    cameras = {name: tuple(shape) for name, shape in facts[0]["cameras"].items()}
    size = picture_bytes(lines)
    if not frames_file(log).is_file():
        raise ValueError(f"{log} is without its pictures: put {frames_file(log).name}, written with it, beside it")
    pixels = np.memmap(frames_file(log), np.uint8, "r")
    frames = pixels[: len(pixels) // size * size].reshape(-1, size)

    spec, reactions = header["action_spec"], get_args(Reaction)
    proprio = header["proprio_names"] or [f"s{i}" for i in range(len(ticks[0]["inputs"]["proprio"]))]
    vectors = {
        "observation.state": proprio,
        "action": spec["names"],
        "wanted": spec["names"],
        "guards": list(GUARDS),
        "reaction": list(reactions),
        "timing": list(TIMING),
    }
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": (len(names),), "names": list(names)} for name, names in vectors.items()
    }
    for name, shape in cameras.items():
        features[f"observation.images.{name}"] = {
            "dtype": "image", "shape": shape, "names": ["height", "width", "channels"],
        }  # fmt: skip
    fps = _rate([tick["inputs"]["now_s"] for tick in ticks], spec["control_hz"], log)
    dataset = new_dataset(out, name, fps, features)
    task = ""
    for line in lines:
        task = line.get("task", task)
        if "inputs" not in line or not 0 <= line["frame"] < len(frames):
            continue  # of a run that was cut off; `pictures_lost` tells
        said, decided = line["inputs"], line["decision"]
        row = {
            "observation.state": said["proprio"],
            # A robot that cuts commands short says what it took; of one that took none, the command before it stands.
            "action": line.get("sent") or decided["action"] or [0.0] * len(spec["names"]),
            "wanted": said["wanted"] or [0.0] * len(spec["names"]),
            "guards": [guard in decided["guards"] for guard in GUARDS],
            "reaction": [decided["reaction"] == reaction for reaction in reactions],
            "timing": [float(said.get(name, line.get(name, -1.0))) for name in TIMING],
        }
        frame = {name: _finite(values) for name, values in row.items()}
        start, raw = 0, frames[line["frame"]]
        for name, shape in cameras.items():
            end = start + int(np.prod(shape))
            frame[f"observation.images.{name}"] = np.array(raw[start:end]).reshape(shape)
            start = end
        dataset.add_frame({**frame, "task": task})
    with quietly():
        dataset.save_episode()
        dataset.finalize()


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
