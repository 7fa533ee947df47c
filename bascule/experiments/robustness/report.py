"""`vla eval --robustness`: one policy's cells as a table with intervals, a page, and pictures of its worst failures.

May import every package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bascule.experiments.arms import Row
from bascule.experiments.robustness.cells import MAX_FAILURES, PLAIN, SWAPPED, Cell, Setting, Table, against, plan

if TYPE_CHECKING:
    from rich.table import Table as Shown

CELLS = "robustness"
"""Folder in --out of the finished cells."""
Progress = Callable[[int, int, str], None]
"""(finished episodes, all episodes, words about the cell that plays)."""
_OWN = ("axis", "severity", "seconds", "outcomes", "failures", "asked", "controls", "refused")
"""Fields of a row that are not those of an evaluation."""


def measure(
    setting: Setting,
    axes: Sequence[str],
    severities: Sequence[float],
    out: Path,
    *,
    swapped: bool = True,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Play the cells that OUT/robustness lacks, and report all of them: the evaluation in plain scenes, as `vla eval
    --json` has it, and "robustness". ValueError for an impossible severity, or where OUT holds cells of other
    settings."""
    cells = plan(axes, severities, swapped=swapped)
    rows: dict[Cell, Row] = {}
    with Table(setting, out / CELLS) as table:
        for number, cell in enumerate(cells):
            follow = _follow(on_progress, number, len(cells), setting.episodes, cell)
            follow(0, 0)
            rows[cell] = table.row(cell, follow)
    if on_progress is not None:
        on_progress(len(cells) * setting.episodes, len(cells) * setting.episodes, "")
    return _report(rows, out)


def _follow(
    on_progress: Progress | None, number: int, count: int, episodes: int, cell: Cell
) -> Callable[[int, int], None]:
    def follow(done: int, won: int) -> None:
        if on_progress is not None:
            words = f"{cell.name}: {won} succeeded" if done else cell.name
            on_progress(number * episodes + done, count * episodes, words)

    return follow


def _report(rows: Mapping[Cell, Row], out: Path) -> dict[str, Any]:
    """The rows as `report.json` has them; pictures as PNG, under "png", which no JSON holds."""
    plain = rows[PLAIN]
    graded = {cell: row for cell, row in rows.items() if cell.severity}
    severities = sorted({cell.severity for cell in graded})
    report = {name: value for name, value in plain.items() if name not in _OWN} | {"controls": {}}
    if (swapped := rows.get(SWAPPED)) and "refused" not in swapped:
        counted = ("successes", "episodes", "success_rate", "wilson95")
        report["controls"] = {"swapped_instruction": {name: swapped[name] for name in counted}}
    report["robustness"] = {
        "axes": list(dict.fromkeys(cell.axis for cell in graded)),
        "severities": severities,
        "cells": [_cell(row, plain) for row in rows.values()],
        "means": [_mean(severity, graded) for severity in severities],
        "failures": list(_worst(rows, out)),
    }
    return report


def _cell(row: Row, plain: Row) -> Row:
    """A cell as the report has it: without its suite and settings, which are all cells'."""
    named = (
        "axis", "severity", "successes", "episodes", "success_rate", "wilson95", "wrong_object", "mean_steps",
        "diverged", "per_task", "seconds", "refused",
    )  # fmt: skip
    found = {name: row[name] for name in named if name in row}
    changes = None if row is plain or "refused" in row else against(row, plain)
    return found if changes is None else found | {"lost": changes[0], "gained": changes[1]}


def _mean(severity: float, graded: Mapping[Cell, Row]) -> dict[str, Any]:
    """The mean rate of the axes measured at a severity; and of LIBERO-plus's eight, where all are; the lowest."""
    from envs.perturb.perturbation import AXES

    rates = {
        cell.axis: row["success_rate"]
        for cell, row in graded.items()
        if cell.severity == severity and "refused" not in row
    }
    eight = [rates[axis] for axis in AXES[:8] if axis in rates]
    return {
        "severity": severity,
        "axes": len(rates),
        "mean": float(np.mean(list(rates.values()))) if rates else None,
        "mean_of_eight": float(np.mean(eight)) if len(eight) == 8 else None,
        "lowest": min(rates, key=rates.__getitem__) if rates else None,
        "lowest_rate": min(rates.values(), default=None),
    }


def _worst(rows: Mapping[Cell, Row], out: Path) -> Any:
    """The worst failures of every axis, and of plain scenes: those in scenes that are solved when plain, then those at
    the least severity, in the order of their cells."""
    by_axis: dict[str, list[dict[str, Any]]] = {}
    for cell, row in rows.items():
        by_axis.setdefault(cell.axis, []).extend(
            {"axis": cell.axis, "severity": cell.severity, **failure} for failure in row.get("failures", ())
        )
    for found in by_axis.values():
        found.sort(key=lambda failure: failure["solved_plain"] is False)  # stable: by severity within
        for failure in found[:MAX_FAILURES]:
            file = Path(CELLS) / failure["picture"]
            yield {**failure, "picture": file.as_posix(), "png": (out / file).read_bytes()}


def console_table(report: Mapping[str, Any]) -> Shown:
    """The report's cells for a terminal: an axis a row, a severity a column."""
    from vla.runtime.console import format_rate, table

    found = report["robustness"]
    cells = {(cell["axis"], cell["severity"]): cell for cell in found["cells"]}
    columns = [f"severity {severity:g}" for severity in found["severities"]]

    def shown(cell: Mapping[str, Any]) -> str:
        return f"not measured: {cell['refused']}" if "refused" in cell else format_rate(cell)

    blank = [""] * (len(columns) - 1)
    rows = [[axis, shown(cell), *blank] for (axis, severity), cell in cells.items() if not severity]
    for axis in found["axes"]:
        row = [cells[axis, severity] for severity in found["severities"]]
        reasons = {cell.get("refused") for cell in row}
        alike = len(reasons) == 1 and None not in reasons
        rows.append([axis, shown(row[0]), *blank] if alike else [axis, *map(shown, row)])
    for name, label in (("mean", "mean of the axes"), ("mean_of_eight", "mean of LIBERO-plus's eight")):
        if any(mean[name] is not None for mean in found["means"]):
            rows.append([label, *("" if mean[name] is None else f"{mean[name]:.1%}" for mean in found["means"])])
    return table(f"{report['policy']} on {report['suite']}", ("axis", *columns), rows)
