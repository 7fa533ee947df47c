"""`vla experiment robustness`: success of several policies along every axis of `envs.perturb.perturbation`, at growing
severity.

May import every package. An arm is a policy, or the policies of one recipe's training seeds. Every cell has the same
evaluation scenes, and is kept in OUT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bascule.agents import AGENTS
from bascule.experiments.arms import Report, Row, arms_of, in_turn, over_seeds, share_kept
from bascule.experiments.robustness.cells import PLAIN, SWAPPED, Cell, Setting, Table, chosen_axes, plan
from vla.core.config import write_atomic

_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#555}.strong{font-weight:600;fill:#111}.grid{stroke:#ddd}"
    ".line{fill:none;stroke-width:2}.before{stroke:#2563eb}circle.before{fill:#2563eb}.after{stroke:#d97706}"
    "circle.after{fill:#d97706}.plain{stroke:#059669}circle.plain{fill:#059669}.fail{stroke:#dc2626}"
    "circle.fail{fill:#dc2626}tspan{stroke:none}tspan.before{fill:#2563eb}tspan.after{fill:#d97706}"
    "tspan.plain{fill:#059669}tspan.fail{fill:#dc2626}.whisker{stroke:#555;stroke-width:1.2}"
)
_KINDS = ("before", "after", "plain", "fail")


@dataclass(frozen=True)
class RobustnessConfig:
    """Success under perturbations of the evaluation environments."""

    policy: tuple[Path, ...] = ()
    """Checkpoints, or expert, zero, random, blind. ARM=CHECKPOINT gives an arm's name: several of one name are its
    training seeds, in this order."""
    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    axes: tuple[str, ...] = ()
    """Axes of `envs.perturb.perturbation.Perturbation`; all of them by default."""
    conditions: tuple[str, ...] = ("0.25", "0.5", "1")
    """Severities, besides 0."""
    episodes: int = 100
    """Evaluation scenes, the same for every arm."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def robustness(config: RobustnessConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """k/n with its interval of every arm, axis and severity; OUT/robustness.svg plots them, OUT/severities.png shows
    the scenes. ValueError without a policy, for an unknown axis or a severity outside 0..1."""
    if not config.policy:
        raise ValueError("vla experiment robustness needs a policy: --policy CHECKPOINT (or expert, zero, random)")
    axes = chosen_axes(config.axes)
    try:
        severities = sorted({float(text) for text in config.conditions} - {0.0})
    except ValueError:
        raise ValueError(f"--conditions are severities from 0 to 1, got {' '.join(config.conditions)}") from None
    arms = arms_of(config.policy)
    runs = [
        (arm, seed, cell)
        for arm, policies in arms.items()
        for seed, policy in enumerate(policies)
        for cell in plan(axes, severities, swapped=policy not in AGENTS)
    ]
    started, found = time.monotonic(), dict[str, dict[Cell, list[Row]]]()
    with ExitStack() as stack:
        opened: tuple[str, int] | None = None
        table: Any = None
        for arm, seed, cell in in_turn(runs, lambda run: f"{run[0]}, seed {run[1]}, {run[2].name}", on_progress):
            if opened != (arm, seed):
                stack.close()  # one policy in memory
                table, opened = stack.enter_context(_table(config, out, arm, arms[arm], seed)), (arm, seed)
            found.setdefault(arm, {}).setdefault(cell, []).append(table.row(cell) | {"seed": seed})
    pooled = {arm: {cell: _pooled(rows) for cell, rows in by_cell.items()} for arm, by_cell in found.items()}
    _draw(pooled, axes, severities, out)
    first = next(iter(arms))
    _show(_table(config, out, first, arms[first], 0), axes, severities, out)
    return _result(pooled, max(map(len, arms.values()))) | {"seconds": round(time.monotonic() - started, 1)}


def _table(config: RobustnessConfig, out: Path, arm: str, policies: Sequence[str], seed: int) -> Table:
    setting = Setting(
        policies[seed], config.suite, config.episodes, num_envs=config.num_envs, workers=config.workers
    )  # fmt: skip
    return Table(setting, out, f"{arm}-{seed}" if seed else arm)


def _pooled(rows: list[Row]) -> Row:
    """A cell's counts over its arm's training seeds; where one seed refuses it, that seed counts no episodes."""
    refused = [{"refused": row["refused"]} for row in rows if "refused" in row][:1]
    return over_seeds(rows) | {"axis": rows[0]["axis"], "severity": rows[0]["severity"]} | dict(*refused)


def _result(pooled: Mapping[str, Mapping[Cell, Row]], seeds: int) -> dict[str, Any]:
    """The experiment as `vla experiment --json` writes it."""
    arms = {}
    for arm, cells in pooled.items():
        for cell, counts in cells.items():
            row = dict(counts)
            if seeds == 1:
                del row["per_seed"]
            name = f"{arm}: {cell.name}" if len(pooled) > 1 else cell.name
            arms[name] = row | {"kept": share_kept(row, cells[PLAIN])}
    more = ("per_seed", "refused")
    return {
        "experiment": "robustness",
        "seeds": list(range(seeds)),
        "arms": arms,
        "controls": {name: row for name, row in arms.items() if name.endswith((PLAIN.name, SWAPPED.name))},
        "columns": ["kept", "wrong_object", *(name for name in more if any(name in row for row in arms.values()))],
    }


def _draw(
    pooled: Mapping[str, Mapping[Cell, Row]], axes: Sequence[str], severities: Sequence[float], out: Path
) -> None:
    """OUT/robustness.svg: a chart per axis, a line per arm."""
    from bascule.report.charts import Series, lines

    width, height, columns = 560, 290, 2
    parts = []
    for number, axis in enumerate(axes):
        series = []
        for k, (arm, cells) in enumerate(pooled.items()):
            points = [cells[PLAIN], *(cells[Cell(axis, s)] for s in severities)]
            series.append(
                Series(
                    arm, [0.0, *severities], [row["success_rate"] if row["episodes"] else math.nan for row in points],
                    _KINDS[k % len(_KINDS)], [row["wilson95"] for row in points], markers=True,
                )
            )  # fmt: skip
        chart = lines(series, x_label="severity", y_label=f"success under {axis}", percent=True)
        x, y = number % columns * width, number // columns * height
        parts.append(chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height - 20}" ', 1))
    total = -(-len(axes) // columns) * height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {total}"><style>{_STYLE}</style>'
    page = f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    write_atomic(out / "robustness.svg", page.encode())


def _show(table: Table, axes: Sequence[str], severities: Sequence[float], out: Path) -> None:
    """OUT/severities.png: the first evaluation scene, an axis a row, a severity a column."""
    from vla.runtime.scene_pictures import contact_sheet

    scenes, captions = [], []
    for axis in axes:
        for cell in (PLAIN, *(Cell(axis, s) for s in severities)):
            picture = table.file(cell, ".png")
            refused = "" if picture.is_file() else " not measured, shown plain"
            if refused:
                picture = table.file(PLAIN, ".png")
            with Image.open(picture) as image:
                scenes.append(np.asarray(image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)))
                said = f": {image.text['instruction']}" if axis == "instruction" else ""
            captions.append(f"{axis} {cell.severity:g}{refused}{said}")
    contact_sheet([np.stack(scenes)], captions, out / "severities.png", columns=len(severities) + 1)
