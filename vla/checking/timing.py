"""Time stamps and bookkeeping beyond what `vla train` warns of: jitter, another rate in some episodes, miscounts."""

from __future__ import annotations

import numpy as np

from vla.checking.recording import Recording
from vla.data.findings import Finding, listed
from vla.data.tables import parquet_files, read_parquet

_JITTER = 0.2
"""Share of the usual step by which a step must differ to count as uneven."""
_UNEVEN = 0.05
"""Share of the steps that may be uneven."""
_OTHER_RATE = 0.05


def bookkeeping_findings(recording: Recording) -> list[Finding]:
    """All findings about time stamps and counts."""
    return [*_steps(recording), *_counts(recording)]


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
