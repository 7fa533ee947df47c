"""The page of `vla check`: verdict, findings, and episodes to look at. One file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule.report import charts
from bascule.report.page import fill, webp
from policies.open_loop import PHASES, OpenLoop
from vla.checking.check import Report
from vla.checking.samples import Shown
from vla.core.config import write_atomic
from vla.data.lerobot_dataset import ACTION, PROPRIO

_MOST_ROWS = 500
"""Episodes in the table."""
_MOST_COLUMNS = 1000
"""Episodes in the chart of lengths."""
_MOST_LINKS = 24
_GAP = 3
"""Pixels between the pictures of a strip."""
_BADGES = {"error": "bad", "warning": "warn", "note": "plain"}


def write_recording_page(
    report: Report, episodes: Sequence[Shown], path: Path, about: Mapping[str, Any], beside: OpenLoop | None = None
) -> None:
    """Write the page to `path`, atomically. `about`: command, commit and machine for its foot; `beside`: what a policy
    would have done."""
    write_atomic(path, render(report, episodes, about, beside).encode())


def render(report: Report, episodes: Sequence[Shown], about: Mapping[str, Any], beside: OpenLoop | None = None) -> str:
    """The page's HTML."""
    told = [finding for finding in report.findings if finding.severity != "note"]
    flagged = {number for finding in told for number in finding.episodes}
    facts = report.episodes
    idle = sum(episode.idle[2] for episode in facts) / max(sum(episode.length for episode in facts), 1)
    return fill(
        "recording.html.j2",
        report=report,
        about=about,
        badges=_BADGES,
        phases=PHASES,
        verdict=report.verdict[:1].upper() + report.verdict[1:],
        figures=[
            ("episodes", f"{len(report.recording.episodes):,}"),
            ("frames", f"{report.recording.frames:,}"),
            ("minutes", f"{report.recording.frames / report.recording.fps / 60:.1f}"),
            ("frames per second", f"{report.recording.fps:g}"),
            ("idle", f"{100 * idle:.0f}%"),
        ],
        findings=[(finding, finding.episodes[:_MOST_LINKS]) for finding in report.findings],
        linked={episode.number for episode in episodes},
        lengths=charts.columns(
            [episode.length for episode in facts[:_MOST_COLUMNS]],
            [episode.number in flagged for episode in facts[:_MOST_COLUMNS]],
            "frames of each episode, in order; those with findings in red",
        )
        if facts
        else "",
        films=[_film(report, episode, told, beside) for episode in episodes],
        beside=beside,
        errors=_errors(beside),
        rows=facts[:_MOST_ROWS],
        codes={number: [finding.code for finding in told if number in finding.episodes] for number in flagged},
    )


def _errors(beside: OpenLoop | None) -> list[tuple[str, list[float]]]:
    """(component, its error in percent of its range at each phase and on average), the largest first."""
    if beside is None:
        return []
    table = 100 * np.vstack([beside.error, beside.error.mean(0)])
    rows = [(name, table[:, i].tolist()) for i, name in enumerate(beside.names)]
    return sorted(rows, key=lambda row: -row[1][-1])


def _film(report: Report, episode: Shown, told: Sequence[Any], beside: OpenLoop | None) -> dict[str, Any]:
    """An episode as the template wants it: strips as data URIs and charts as SVG."""
    return {
        "number": episode.number,
        "task": episode.task,
        "frames": len(episode.seconds),
        "seconds": len(episode.seconds) / report.recording.fps,
        "findings": [finding for finding in told if episode.number in finding.episodes],
        "strips": [(camera, webp(_strip(pictures)[None])) for camera, pictures in episode.strips.items()],
        "charts": _charts(report, episode, None if beside is None else beside.predicted.get(episode.number)),
    }


def _strip(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (n, H, W, 3) beside one another."""
    gap = np.full((pictures.shape[1], _GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _charts(report: Report, episode: Shown, policy: NDArray[np.float32] | None) -> list[str]:
    """A small chart for each component; an absolute action, the state that follows it and the policy's share one."""
    if len(episode.seconds) < 2 or not report.scales:
        return []
    seconds = episode.seconds.tolist()
    idle = _spans(episode.idle, seconds)
    partners = {pair.action: pair.state for pair in report.pairs if pair.kind == "absolute"}
    out = []
    names = report.recording.names
    for i, name in enumerate(names[ACTION]):
        lines = [(ACTION, i, f"action {name}", "after")]
        if i in partners:
            lines.append((PROPRIO, partners[i], "state", "before"))
        extra = [] if policy is None else [charts.Trace("policy", policy[:, i].tolist(), "policy")]
        out.append(_chart(report, episode, lines, seconds, idle, extra))
    for j, name in enumerate(names[PROPRIO]):
        if j not in partners.values():
            out.append(_chart(report, episode, [(PROPRIO, j, f"state {name}", "before")], seconds, idle))
    return [chart for chart in out if chart]


def _chart(
    report: Report,
    episode: Shown,
    lines: Sequence[tuple[str, int, str, str]],
    seconds: Sequence[float],
    idle: Sequence[tuple[float, float]],
    extra: Sequence[charts.Trace] = (),
) -> str:
    drawn, lows, highs = [], [], []
    for key, i, label, kind in lines:
        if key not in episode.values:
            continue
        scale = report.scales[key]
        room = 0.25 * scale.span[i]
        lows.append(max(scale.least[i], scale.low[i] - room))
        highs.append(min(scale.most[i], scale.high[i] + room))
        drawn.append(charts.Trace(label, episode.values[key][:, i].tolist(), kind))
    return charts.traces([*drawn, *extra], seconds, (float(min(lows)), float(max(highs))), idle) if drawn else ""


def _spans(idle: NDArray[np.bool_], seconds: Sequence[float]) -> list[tuple[float, float]]:
    """(from, to) of every run of idle frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], idle.astype(int), [0]])))
    return [(seconds[start], seconds[end - 1]) for start, end in edges.reshape(-1, 2)]
