"""`vla experiment robustness`: success of trained policies along every axis of `envs.perturb.perturbation`, at growing
severity.

May import every package. Every cell uses the same evaluation scenes, and is kept in OUT.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bascule.experiments.arms import Report, Row, evaluation_scenes, in_turn, kept
from vla.core.config import lookup, write_atomic

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation

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
    """Checkpoints, or expert, zero, random, blind."""
    suite: str = "tabletop-pick"
    arms: tuple[str, ...] = ()
    """Axes of `envs.perturb.perturbation.Perturbation`; all of them by default."""
    conditions: tuple[str, ...] = ("0.25", "0.5", "1")
    """Severities, besides 0."""
    episodes: int = 100
    num_envs: int = 48
    workers: int = 2


def robustness(config: RobustnessConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """k/n with its interval of every policy, axis and severity; OUT/robustness.svg plots them, OUT/severities.png shows
    the scenes. ValueError without a policy, for an unknown axis or a severity outside 0..1."""
    from envs.perturb.perturbation import AXES, Perturbation, parse

    if not config.policy:
        raise ValueError("vla experiment robustness needs a policy: --policy CHECKPOINT (or expert, zero, random)")
    axes = config.arms or AXES
    for axis in axes:
        lookup(axis, dict.fromkeys(AXES), "axis")
    try:
        severities = sorted({float(text) for text in config.conditions} - {0.0})
    except ValueError:
        raise ValueError(f"--conditions are severities from 0 to 1, got {' '.join(config.conditions)}") from None
    plain = Perturbation()
    settings = {(axis, s): parse([f"{axis}={s}"]) for axis in axes for s in severities}
    cells = [(str(folder), *cell) for folder in config.policy for cell in [("plain", 0.0), *settings]]
    started, rows = time.monotonic(), {}
    for cell in in_turn(cells, lambda cell: f"{Path(cell[0]).name}, {cell[1]} {cell[2]:g}", on_progress):
        asked = {"suite": config.suite, "episodes": config.episodes, "policy": cell[0]}
        file = _file(config, out, *cell)
        rows[cell] = kept(file, asked, partial(_measured, config, file, *cell, settings.get(cell[1:], plain)))
    _draw(config, axes, severities, rows, out)
    _show(config, axes, severities, out)
    arms = {}
    for (folder, axis, severity), row in rows.items():
        plain_rate = rows[folder, "plain", 0.0]["success_rate"]
        name = axis if axis == "plain" else f"{axis} {severity:g}"
        name = f"{Path(folder).name}: {name}" if len(config.policy) > 1 else name
        arms[name] = row | {"kept": round(row["success_rate"] / max(plain_rate, 1e-9), 3)}
    controls = {name: row for name, row in arms.items() if name.endswith("plain")}
    seconds = round(time.monotonic() - started, 1)
    return {
        "experiment": "robustness",
        "seeds": [0],
        "arms": arms,
        "controls": controls,
        "columns": ["kept", "wrong_object", *(["refused"] if any("refused" in row for row in arms.values()) else [])],
        "seconds": seconds,
    }


def _measured(
    config: RobustnessConfig, file: Path, policy: str, axis: str, severity: float, perturb: Perturbation
) -> Row:
    """One cell's counts; its first frame is written beside `file`, with the instruction."""
    from bascule.agents import resolve_policy
    from envs.evaluation.evaluate import Count, evaluate

    few = replace(config, num_envs=min(config.num_envs, config.episodes))
    try:
        with evaluation_scenes(few, perturb=perturb) as (env, seeds):
            agent = resolve_policy(policy, env, config.suite)
            report = evaluate(agent, env, seeds, name=policy, suite=config.suite, num_films=1)
    except ValueError as error:
        if axis != "instruction":
            raise
        # A policy never reads half a sentence; one with little room for text may be unable to read these.
        return Count(0, 0).to_dict() | {"axis": axis, "severity": severity, "wrong_object": 0, "refused": str(error)}
    shown = PngInfo()
    shown.add_text("instruction", report.films[0].caption)
    picture = io.BytesIO()
    Image.fromarray(report.films[0].frames[0]).save(picture, "PNG", pnginfo=shown)
    write_atomic(file.with_suffix(".png"), picture.getvalue())
    counts = Count(report.successes, report.episodes).to_dict()
    return counts | {"axis": axis, "severity": severity, "wrong_object": report.wrong_object}


def _draw(
    config: RobustnessConfig, axes: tuple[str, ...], severities: list[float], rows: dict[Any, Any], out: Path
) -> None:
    """OUT/robustness.svg: a chart per axis, a line per policy."""
    from bascule.report.charts import Series, lines

    width, height, columns = 560, 290, 2
    parts = []
    for number, axis in enumerate(axes):
        series = []
        for k, folder in enumerate(map(str, config.policy)):
            points = [rows[folder, "plain", 0.0], *(rows[folder, axis, s] for s in severities)]
            series.append(
                Series(
                    Path(folder).name, [0.0, *severities], [row["success_rate"] for row in points],
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


def _show(config: RobustnessConfig, axes: tuple[str, ...], severities: list[float], out: Path) -> None:
    """OUT/severities.png: the first evaluation scene, an axis a row, a severity a column."""
    from vla.runtime.scene_pictures import contact_sheet

    scenes, captions = [], []
    for axis in axes:
        for name, severity in [("plain", 0.0), *((axis, s) for s in severities)]:
            picture = _file(config, out, str(config.policy[0]), name, severity).with_suffix(".png")
            if not picture.is_file():  # refused
                picture = _file(config, out, str(config.policy[0]), "plain", 0.0).with_suffix(".png")
            with Image.open(picture) as image:
                scenes.append(np.asarray(image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)))
                said = f": {image.text['instruction']}" if axis == "instruction" else ""
            captions.append(f"{axis} {severity:g}{said}")
    contact_sheet([np.stack(scenes)], captions, out / "severities.png", columns=len(severities) + 1)


def _file(config: RobustnessConfig, out: Path, policy: str, axis: str, severity: float) -> Path:
    return out / f"{Path(policy).name}-{axis}-{severity:g}.json"
