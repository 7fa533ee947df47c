"""Time stamps and bookkeeping beyond what `vla train` warns of: jitter, another rate in some episodes, miscounts, and
statistics that are not those of the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.checking.motion import EpisodeFacts
from vla.checking.recording import FEATURES, Recording
from vla.core.config import load_json
from vla.data.findings import Finding, listed, numbered
from vla.data.tables import parquet_files, read_parquet

_JITTER = 0.2
"""Share of the usual step by which a step must differ to count as uneven."""
_UNEVEN = 0.05
"""Share of the steps that may be uneven."""
_OTHER_RATE = 0.05
_OFF = 1e-3
"""Share of a component's range by which its kept extremes may differ from its values."""
_OTHER_COLOUR = 15.0
"""Grey levels (of 255) by which a camera's mean colour in an episode may differ from the kept one, which, as ours, is
that of some of its pictures."""
_ENOUGH = 6
"""Pictures from which the mean colour of an episode is known."""


def bookkeeping_findings(recording: Recording) -> list[Finding]:
    """All findings about time stamps and counts."""
    return [*_steps(recording), *_counts(recording), *_film_order(recording)]


def statistics_findings(recording: Recording, episodes: Sequence[EpisodeFacts]) -> list[Finding]:
    """A finding where state or actions of some episodes have other extremes or another mean than meta/episodes keeps of
    them, or all have others than meta/stats.json."""
    found = []
    for key in FEATURES:
        kept = [_kept(recording.root, f"stats/{key}/{name}") for name in ("min", "max", "mean")]
        width = len(recording.names[key])
        span = np.ptp([ends for e in episodes for ends in e.extremes[key]], axis=0) if episodes else np.zeros(width)
        odd: dict[int, tuple[int, int, float]] = {}
        for episode in episodes:
            for which, ends in enumerate(kept):
                told = _flat(ends.get(episode.number))
                if told.shape != (width,) or episode.number in odd:
                    continue
                value = (*episode.extremes[key], episode.means[key])[which]
                off = np.abs(told - value) > _OFF * span + 1e-5 * np.abs(value) + 1e-9
                if off.any():
                    i = int(np.flatnonzero(off)[0])
                    odd[episode.number] = i, which, float(told[i])
        if odd:
            number, (i, which, told_of) = next(iter(odd.items()))
            held = next((*e.extremes[key], e.means[key])[which][i] for e in episodes if e.number == number)
            text = (
                f"meta/episodes keeps {told_of:.5g} as the {('least', 'greatest', 'mean')[which]} value of '{key}' "
                f"component '{recording.names[key][i]}' in episode {number}, data/ holds {held:.5g} "
                f"({numbered(len(odd), 'such episode')}): were values changed, exchanged or rounded after the "
                "recording? If that was meant, let LeRobot compute its statistics anew, which its own tools learn by"
            )
            found.append(Finding("statistics_differ", "warning", text, tuple(odd), (key,)))
        elif episodes and len(episodes) == len(recording.episodes):
            found += _whole_statistics(recording, key, episodes, span)
    return found


def _whole_statistics(
    recording: Recording, key: str, episodes: Sequence[EpisodeFacts], span: NDArray[np.float64]
) -> list[Finding]:
    """A finding where meta/stats.json tells other extremes of state or actions than the recording has."""
    try:
        kept = load_json(recording.root / "meta" / "stats.json")[key]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    ends = np.array([episode.extremes[key] for episode in episodes])  # (episodes, 2, D)
    for name, held in (("min", ends[:, 0].min(0)), ("max", ends[:, 1].max(0))):
        told = _flat(kept.get(name) if isinstance(kept, dict) else None)
        if told.shape != held.shape:
            continue
        off = np.flatnonzero(np.abs(told - held) > _OFF * span + 1e-5 * np.abs(held) + 1e-9)
        if len(off):
            i = int(off[0])
            which = "least" if name == "min" else "greatest"
            text = (
                f"meta/stats.json tells {told[i]:.5g} as the {which} value of '{key}' "
                f"component '{recording.names[key][i]}', the episodes hold {held[i]:.5g}: of another recording, or of "
                "before it was changed? LeRobot's own tools learn by it (`vla train` does not): compute it anew"
            )
            return [Finding("statistics_differ", "warning", text, (), (key,))]
    return []


def colour_findings(
    root: Path, cameras: Mapping[str, str], colours: Mapping[str, Mapping[int, NDArray[np.floating]]]
) -> list[Finding]:
    """A finding for each camera whose pictures have another colour than meta/episodes keeps of them. `cameras`: name ->
    feature; `colours`: name -> episode -> (n, 3) mean colours, of 255, of pictures spread over it."""
    kept = {camera: _kept(root, f"stats/{key}/mean") for camera, key in cameras.items()}
    off: dict[str, dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for camera, episodes in colours.items():
        for number, shown in episodes.items():
            told = 255 * _flat(kept[camera].get(number))
            if told.shape == (3,) and len(shown) >= _ENOUGH and (told <= 256).all():
                seen = shown.mean(0, dtype=np.float64)
                if np.abs(told - seen).max() > _OTHER_COLOUR:
                    off.setdefault(camera, {})[number] = told, seen
    found = []
    for camera, odd in off.items():
        number, (told, seen) = next(iter(odd.items()))
        others = (other for other in kept if other != camera and number in kept[other])
        close = [c for c in others if np.abs(255 * _flat(kept[c][number]) - seen).max() <= _OTHER_COLOUR]
        why = f"are they those of camera '{close[0]}'?" if close else "were the pictures changed after the recording?"
        words = ["/".join(f"{value:.0f}" for value in colour) for colour in (told, seen)]
        text = (
            f"camera '{camera}' has by meta/episodes a mean colour of {words[0]} (red/green/blue) in {listed(odd)}, "
            f"its pictures have {words[1]}{' in the first of them' if len(odd) > 1 else ''}: {why}"
        )
        found.append(Finding("statistics_differ", "warning", text, tuple(odd), cameras=(camera,)))
    return found


def _flat(value: Any) -> NDArray[np.float64]:
    """Kept statistics, however they are nested, as one row; empty where there are none or they are no numbers."""
    try:
        flat = np.array(value, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return np.empty(0)
    return flat if np.isfinite(flat).all() else np.empty(0)


def _kept(root: Path, column: str) -> dict[int, Any]:
    """Episode -> its entry in a column of meta/episodes; empty where there is no such column."""
    found: dict[int, Any] = {}
    try:
        for path in parquet_files(root / "meta" / "episodes"):
            part = read_parquet(path, root, ["episode_index", column])
            names = ("episode_index", column)
            found |= dict(zip(*(part.column(name).to_pylist() for name in names), strict=True))
    except ValueError:
        return {}
    return found


def _film_order(recording: Recording) -> list[Finding]:
    """Episodes that meta/episodes lays before earlier ones in a video: written by LeRobot they follow one another."""
    found = []
    for camera, key in recording.cameras.items():
        if recording.encoded(key):
            continue
        files = [_kept(recording.root, f"videos/{key}/{name}") for name in ("chunk_index", "file_index")]
        starts = _kept(recording.root, f"videos/{key}/from_timestamp")
        last: dict[tuple[Any, ...], tuple[int, float]] = {}
        for number in sorted(n for n, start in starts.items() if isinstance(n, int) and isinstance(start, float)):
            file = tuple(part.get(number) for part in files)
            before = last.get(file)
            if before is not None and starts[number] < before[1]:
                text = (
                    f"meta/episodes lays episode {number} before episode {before[0]} in a video of camera '{camera}' "
                    f"({starts[number]:.3f} s and {before[1]:.3f} s): recorded one after the other, they follow in "
                    "that order; does each have its own pictures?"
                )
                found.append(Finding("film_order", "warning", text, (before[0], number), cameras=(camera,)))
                break
            last[file] = number, starts[number]
    return found


def _steps(recording: Recording) -> list[Finding]:
    stamps = recording.table.column("timestamp").to_numpy().astype(np.float64)
    frame = recording.table.column("frame_index").to_numpy()
    inside = np.ones(recording.frames, bool)
    inside[recording.starts[:-1]] = False
    steps = np.full(recording.frames, np.nan)
    steps[1:] = np.diff(stamps) / np.where(inside[1:], np.diff(frame), 1)
    known = steps[inside]
    usual = float(np.median(known)) if len(known) else 0.0
    if usual <= 0:
        return []
    found, other, uneven_in = [], {}, []
    uneven = np.abs(steps / usual - 1) > _JITTER
    for place, number in enumerate(recording.episodes):
        rows = recording.rows(place)
        own = steps[rows.start + 1 : rows.stop]
        if len(own) < 3:
            continue
        middle = float(np.median(own))
        if middle > 0 and abs(middle / usual - 1) > _OTHER_RATE:
            other[int(number)] = 1 / middle
        elif uneven[rows.start + 1 : rows.stop].mean() > _UNEVEN:
            uneven_in.append(int(number))
    if other:
        rates = sorted(set(np.round(list(other.values()), 1).tolist()))
        told = ", ".join(f"{rate:g}" for rate in rates[:4])
        text = (
            f"{listed(other)} {'was' if len(other) == 1 else 'were'} recorded at {told} Hz by the timestamps, the "
            f"others at {1 / usual:.3g} Hz: record at one rate, or resample"
        )
        found.append(Finding("rate_differs", "warning", text, tuple(other)))
    share = float(uneven[inside].mean())
    if uneven_in and share > _UNEVEN / 5:
        low, high = (1000 * float(np.quantile(known, q)) for q in (0.01, 0.99))
        text = (
            f"frames come unevenly in {listed(uneven_in)}: {100 * share:.0f}% of all steps differ from the usual "
            f"{1000 * usual:.0f} ms by more than {100 * _JITTER:.0f}% (98% lie in {low:.0f} to {high:.0f} ms): actions "
            "are learnt as if they came evenly; free the recording computer, or resample"
        )
        found.append(Finding("jitter", "warning", text, tuple(uneven_in)))
    return found


def _counts(recording: Recording) -> list[Finding]:
    """Where meta/ says something else than data/ holds."""
    found = []
    declared = recording.info.get("total_episodes")
    if declared is not None and declared != len(recording.episodes):
        text = (
            f"meta/info.json declares {declared} episodes, data/ holds {len(recording.episodes)}: other tools may fail"
        )
        found.append(Finding("episode_count", "warning", text))
    lengths: dict[int, int] = {}
    try:
        for path in parquet_files(recording.root / "meta" / "episodes"):
            part = read_parquet(path, recording.root, ["episode_index", "length"])
            columns = (part.column(name).to_pylist() for name in ("episode_index", "length"))
            lengths |= dict(zip(*columns, strict=True))
    except ValueError:
        return found  # older writers have no lengths; what needs the table says so
    held = dict(zip(recording.episodes.tolist(), np.diff(recording.starts).tolist(), strict=True))
    if lengths and (unlisted := sorted(held.keys() - lengths.keys())):
        text = (
            f"meta/episodes does not list {listed(unlisted)}, data/ holds the frames, which are learnt all the same: "
            "list what is to stay, and leave what is not out of a copy (--fix, --drop)"
        )
        found.append(Finding("episode_unlisted", "warning", text, tuple(unlisted)))
    if absent := sorted(lengths.keys() - held.keys()):
        text = f"meta/episodes lists {listed(absent)}, of which data/ holds no frame: was a file of data/ not copied?"
        found.append(Finding("episode_absent", "warning", text, tuple(absent)))
    wrong = [number for number, length in held.items() if lengths.get(number, length) != length]
    if wrong:
        text = (
            f"meta/episodes says {lengths[wrong[0]]} frames for episode {wrong[0]}, data/ holds {held[wrong[0]]}"
            f"{f' ({len(wrong)} such episodes)' if len(wrong) > 1 else ''}: other tools may read wrong frames"
        )
        found.append(Finding("episode_length", "warning", text, tuple(wrong)))
    return found
