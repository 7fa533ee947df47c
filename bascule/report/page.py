"""A run's report: `report.json` for programs, and `report.html` for people, one file that needs no other.

It is the quickstart's or that of `vla eval --robustness`.

`report` holds what DESIGN.md lists ("stages", "imitation", "rl", "controls", "latency_ms") and, added to it:
"suite", "seed", "command", "commit", "machine" (strings or numbers);
"curves": {"imitation_loss": {"step": [...], "loss": [...]},
           "rl_train": {"control_steps": [...], "success_rate": [...]},
           "rl_eval": {"control_steps": [...], "success_rate": [...], "wilson95": [[lo, hi], ...]}};
"filmstrips": [{"caption", "frames" (F, H, W, 3) uint8, "success", "stage"?, "wrong_object"?}, ...] (no frames in JSON);
"robustness": {"axes", "severities", "cells", "means", "failures": [{..., "png" (bytes, not in JSON)}, ...]} as
`bascule.experiments.robustness.report` makes it, beside the evaluation in plain scenes at the top level.
Every part may be missing; the page then leaves it out. A stage has a "state" ("done", "failed" or "not run") and a
"reason" where it is not done; "complete" says whether all are. A "warning" of a stage is a sentence about its result.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray

from bascule.report import charts
from vla.core.config import save_json, write_atomic

Eval = Mapping[str, Any]

POLICY_LABELS = {"imitation": "imitation", "rl": "after online RL"}
CONTROL_LABELS = {
    "expert": "scripted expert",
    "heldout_phrasing": "held-out phrasing",
    "swapped_instruction": "swapped instruction",
    "blind": "blind replay",
    "zero": "zero actions",
    "random": "random actions",
}
"""In the order of the page. Other controls follow under their own names."""
_PERTURBED = "perturbed: "
"""Beginning of the names of controls in perturbed scenes, "perturbed: texture=0.5"."""
SHOULD_SUCCEED = ("expert", "heldout_phrasing", _PERTURBED)
"""Beginnings of the names of controls in which a good policy succeeds."""
CONTROL_NOTES = {
    "heldout_phrasing": "instructions phrased as in no demonstration; should stay close to the policy",
    "swapped_instruction": "instruction names another object than the one counted; should fail",
    "blind": "one demonstration replayed open-loop; should fail",
    "zero": "never moves; should fail",
    "random": "should fail",
    "expert": "reads the simulator's state",
}
_STAGE_FIELDS = ("name", "seconds", "state", "reason", "warning")
_STILLS = 6
_FILM_FPS = 5


def write_report(report: Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write `report.json` and `report.html` into `out_dir`, atomically; the path of the page."""
    out = Path(out_dir)
    save_json(out / "report.json", data_of(report))
    page = out / "report.html"
    write_atomic(page, render(report).encode())
    return page


def data_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without its pictures, as JSON holds it."""
    found = dict(report)
    if "robustness" in found:
        found["robustness"] = {**found["robustness"], "failures": _without("png", found["robustness"]["failures"])}
    else:
        found["filmstrips"] = _without("frames", found.get("filmstrips", ()))
    return found


def _without(pictures: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != pictures} for row in rows]


def render(report: Mapping[str, Any]) -> str:
    """The page's HTML: `report.html.j2` with `report`, and what has to be computed from it."""
    before, after = report.get("imitation"), report.get("rl")
    controls = _controls(report)
    seconds = [stage["seconds"] for stage in report.get("stages", ())]
    return fill(
        "report.html.j2",
        report=report,
        before=before,
        after=after,
        suite=(after or before or {}).get("suite", report.get("suite", "")),
        verdict=_verdict(before, after),
        robustness=_robustness(report),
        total_seconds=sum(seconds),
        longest_seconds=max(seconds, default=0) or 1.0,
        bars=_bars(before, after, controls) if before or after or "robustness" not in report else "",
        control_notes=_control_notes(controls),
        curves=_curves(report),
        films=[_film(film) for film in report.get("filmstrips", ()) if len(film.get("frames", ()))],
        latency=_latency(report.get("latency_ms") or {}),
        breakdown={"task": _breakdown("per_task", report), "phrasing": _breakdown("per_phrasing", report)},
    )


def fill(template: str, **values: Any) -> str:
    """The HTML of a template in this folder; texts are escaped."""
    return _PAGES.get_template(template).render(**values)


def _verdict(before: Eval | None, after: Eval | None) -> str:
    """One sentence on the result, no stronger than the intervals allow."""
    if not before or not after:
        return "The run is not complete."
    if after["wilson95"][0] > before["wilson95"][1]:
        return "Online RL made the policy better."
    if after["wilson95"][1] < before["wilson95"][0]:
        return "Online RL made the policy worse."
    return "No clear difference: the intervals overlap."


def _controls(report: Mapping[str, Any]) -> dict[str, Eval]:
    """The report's controls and those of the RL evaluation, in the page's order."""
    found = {**report.get("rl", {}).get("controls", {}), **report.get("controls", {})}
    ordered = dict.fromkeys([*CONTROL_LABELS, *found])
    return {name: found[name] for name in ordered if found.get(name, {}).get("episodes")}


def _bars(before: Eval | None, after: Eval | None, controls: Mapping[str, Eval]) -> str:
    """The chart of all success rates; empty without any."""
    shown = [(POLICY_LABELS["imitation"], "before", before), (POLICY_LABELS["rl"], "after", after)]
    for name, result in controls.items():
        shown.append((_control_label(name), "plain" if name.startswith(SHOULD_SUCCEED) else "fail", result))
    rows = [
        charts.Bar(label, _rate(result), tuple(result["wilson95"]), _count(result), kind)
        for label, kind, result in shown
        if result
    ]
    return charts.bars(rows) if rows else ""


def _robustness(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table and the contact sheet of a robustness report: "ungraded" (cells that have no severity) and "rows" of
    (axis, its cells by severity), "sheet" of (axis, its worst failures); and the "verdict"."""
    found = report.get("robustness")
    if found is None:
        return None
    cells = {(cell["axis"], cell["severity"]): cell for cell in found["cells"]}
    lowest = min(
        (mean for mean in found["means"] if mean["lowest"] is not None), key=lambda m: m["lowest_rate"], default=None
    )
    verdict = f"{_percent(report)} in plain scenes"
    if lowest is not None:
        worst = f"{100 * lowest['lowest_rate']:.1f}% at worst ({lowest['lowest']} at severity {lowest['severity']:g})"
        verdict += f", {worst}"
    failures: dict[str, list[dict[str, Any]]] = {}
    for failure in found["failures"]:
        source = "data:image/png;base64," + base64.b64encode(failure["png"]).decode()
        failures.setdefault(failure["axis"], []).append({**failure, "source": source})
    return {
        "severities": found["severities"],
        "rows": [(axis, [cells[axis, severity] for severity in found["severities"]]) for axis in found["axes"]],
        "ungraded": [cell for cell in found["cells"] if not cell["severity"]],
        "means": found["means"],
        "sheet": failures,
        "verdict": verdict,
    }


def _curves(report: Mapping[str, Any]) -> list[str]:
    """The charts of imitation and RL, as far as there is something to draw."""
    curves = report.get("curves", {})
    parts = []
    if loss := curves.get("imitation_loss"):
        line = charts.Series("loss", loss["step"], loss["loss"], "before")
        parts.append(charts.lines([line], x_label="gradient steps", y_label="imitation loss (log scale)", log_y=True))
    rl = []
    if train := curves.get("rl_train"):
        rl.append(charts.Series("while exploring", train["control_steps"], train["success_rate"], "faint"))
    if held := curves.get("rl_eval"):
        xs, ys = held["control_steps"], held["success_rate"]
        rl.append(charts.Series("mean action", xs, ys, "after", held.get("wilson95"), markers=True))
    if rl:
        reference = ("imitation", _rate(report["imitation"])) if report.get("imitation") else None
        options = {"x_label": "control steps in simulation", "y_label": "success during RL", "percent": True}
        parts.append(charts.lines(rl, reference=reference, **options))
    return [part for part in parts if part]


def _film(film: Mapping[str, Any]) -> dict[str, Any]:
    """An episode with its pictures: "moving", and "stills" in time order; and the "policy" that acted."""
    frames = np.asarray(film["frames"], dtype=np.uint8)
    shown = np.linspace(0, len(frames) - 1, min(_STILLS, len(frames))).round().astype(int)
    policy = POLICY_LABELS.get(film.get("stage", ""), film.get("stage"))
    return {**film, "policy": policy, "moving": webp(frames), "stills": [webp(frames[i : i + 1]) for i in shown]}


def webp(frames: NDArray[np.uint8]) -> str:
    """(F, H, W, 3) -> a data URI; an endless animation when F > 1, with a pause on its last frame."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "WEBP", quality=88, method=4)
    else:
        durations_ms = [1000 // _FILM_FPS] * (len(images) - 1) + [1500]
        images[0].save(
            buffer, "WEBP", save_all=True, append_images=images[1:], duration=durations_ms, loop=0, quality=80, method=4
        )
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _latency(latency: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The rows of the table of latencies: the round trip, then those that have a name."""
    groups = {"round trip": {key: value for key, value in latency.items() if not isinstance(value, Mapping)}}
    groups |= {name: value for name, value in latency.items() if isinstance(value, Mapping)}
    return {name: group for name, group in groups.items() if group}


def _breakdown(part: str, report: Mapping[str, Any]) -> list[tuple[str, Eval | None, Eval | None]]:
    """(name, before, after) of every task or phrasing."""
    before, after = ((report.get(key) or {}).get(part, {}) for key in ("imitation", "rl"))
    return [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*after, *before])]


def _rate(result: Eval) -> float:
    return result["successes"] / max(result["episodes"], 1)


def _percent(result: Eval) -> str:
    return f"{100 * _rate(result):.1f}%"


def _count(result: Eval) -> str:
    return f"{result['successes']}/{result['episodes']}"


def _interval(result: Eval) -> str:
    lo, hi = result["wilson95"]
    return f"{100 * lo:.1f}\u2013{100 * hi:.1f}%"


def _control_label(name: str) -> str:
    if name.startswith(_PERTURBED):  # the chart has no room for more
        return name.removeprefix(_PERTURBED).replace("=", " ")
    return CONTROL_LABELS.get(name, _words(name))


def _control_notes(controls: Iterable[str]) -> list[tuple[str, str]]:
    """(label, what it shows) of the controls that have a note; one for all perturbed scenes."""
    found = [(_control_label(name), CONTROL_NOTES[name]) for name in controls if name in CONTROL_NOTES]
    if perturbed := [_control_label(name) for name in controls if name.startswith(_PERTURBED)]:
        note = "scenes changed along this axis, from 0, not at all, to 1; should stay close to the policy"
        found.append((", ".join(perturbed), note))
    return found


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _facts(stage: Mapping[str, Any]) -> list[str]:
    """Words about a stage: its state, unless it is done, and its counts and figures."""
    facts = [f"{_words(key)} {_value(value)}" for key, value in stage.items() if key not in _STAGE_FIELDS]
    return facts if _finished(stage) else [stage["state"], *facts]


def _finished(stage: Mapping[str, Any]) -> bool:
    return stage.get("state", "done") == "done"


def _practice(teacher: Mapping[str, Any]) -> str:
    """How a privileged teacher became good enough."""
    steps = int(teacher.get("control_steps", 0))
    return f"practised for {steps:,} control steps (counted above)" if steps else "needed no practice"


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_PAGES.filters |= {
    "percent": _percent, "count": _count, "interval": _interval, "words": _words,
    "value": _value, "duration": _duration, "facts": _facts, "practice": _practice,
}  # fmt: skip
_PAGES.tests["finished"] = _finished
_PAGES.globals |= {"policy_labels": POLICY_LABELS}
