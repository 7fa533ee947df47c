"""The quickstart's report: `report.json` for programs, and `report.html` for people, one file that needs no other.

`report` holds what DESIGN.md lists ("stages", "imitation", "rl", "controls", "latency_ms") and, added to it:
"suite", "seed", "command", "commit", "machine" (strings or numbers);
"curves": {"imitation_loss": {"step": [...], "loss": [...]},
           "rl_train": {"control_steps": [...], "success_rate": [...]},
           "rl_eval": {"control_steps": [...], "success_rate": [...], "wilson95": [[lo, hi], ...]}};
"filmstrips": [{"caption", "frames" (F, H, W, 3) uint8, "success", "stage"?, "wrong_object"?}, ...] (no frames in JSON).
Every part may be missing; the page then leaves it out. A stage has a "state" ("done", "failed" or "not run") and a
"reason" where it is not done; "complete" says whether all are.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule.report import charts
from vla.core.config import save_json, write_atomic

Eval = Mapping[str, Any]

CONTROL_LABELS = {
    "expert": "scripted expert",
    "heldout_phrasing": "held-out phrasing",
    "swapped_instruction": "swapped instruction",
    "blind": "blind replay",
    "zero": "zero actions",
    "random": "random actions",
}
"""In the order of the page. Other controls follow under their own names."""
SHOULD_SUCCEED = ("expert", "heldout_phrasing")
CONTROL_NOTES = {
    "heldout_phrasing": "instructions phrased as in no demonstration; should stay close to the policy",
    "swapped_instruction": "instruction names another object than the one counted; should fail",
    "blind": "one demonstration replayed open-loop; should fail",
    "zero": "never moves; should fail",
    "random": "should fail",
    "expert": "reads the simulator's state",
}
_STAGE_FIELDS = ("name", "seconds", "state", "reason")
_STILLS = 6
_FILM_FPS = 5


def write_report(report: Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write `report.json` and `report.html` into `out_dir`, atomically; the path of the page."""
    out = Path(out_dir)
    films = [{key: value for key, value in film.items() if key != "frames"} for film in report.get("filmstrips", ())]
    save_json(out / "report.json", {**report, "filmstrips": films})
    page = out / "report.html"
    write_atomic(page, render(report).encode())
    return page


def render(report: Mapping[str, Any]) -> str:
    """The page's HTML."""
    suite = escape(str(report.get("suite", report.get("rl", {}).get("suite", ""))))
    title = f"Bascule: {suite}" if suite else "Bascule"
    sections = (_headline, _unfinished, _bars_section, _curves, _films, _stages, _latency, _breakdown, _footer)
    body = "\n".join(part for part in (section(report) for section in sections) if part)
    css = Path(__file__).with_name("report.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{css}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _headline(report: Mapping[str, Any]) -> str:
    before, after = report.get("imitation"), report.get("rl")
    if not before and not after:
        return "<header><h1>Bascule</h1></header>"
    known = after or before
    verdict = _verdict(before, after) if before and after else "The run is not complete."
    seconds = sum(stage["seconds"] for stage in report.get("stages", ()))
    facts = [f"suite <b>{escape(str(known.get('suite', report.get('suite', ''))))}</b>"]
    if "seed" in report:
        facts.append(f"seed {escape(str(report['seed']))}")
    if seconds:
        facts.append(f"{_duration(seconds)} in all")
    if "seeds" in known:
        facts.append(f"evaluated on scenes {known['seeds'][0]}&ndash;{known['seeds'][1]}, never trained on")
    return (
        f'<header><p class="eyebrow">Bascule &middot; {" &middot; ".join(facts)}</p><h1>{verdict}</h1>'
        f'<div class="duo">{_figure("imitation", "before", before)}<div class="arrow" aria-hidden="true">&rarr;</div>'
        f"{_figure('after online RL', 'after', after)}</div></header>"
    )


def _unfinished(report: Mapping[str, Any]) -> str:
    """The stages that failed, with the reason, and those that did not run."""
    left = [stage for stage in report.get("stages", ()) if stage.get("state", "done") != "done"]
    if not left:
        return ""
    items = "".join(
        f'<li><span class="badge bad">{escape(stage["state"])}</span> <b>{escape(_words(stage["name"]))}</b>'
        f"{': ' + escape(stage['reason']) if stage.get('reason') else ''}</li>"
        for stage in left
    )
    return (
        f'<section><h2>Not complete</h2><ul class="notes">{items}</ul><p class="small">What finished is kept: '
        "<code>vla quickstart --resume</code> with the same --out continues.</p></section>"
    )


def _verdict(before: Eval, after: Eval) -> str:
    """One sentence on the result, no stronger than the intervals allow."""
    if after["wilson95"][0] > before["wilson95"][1]:
        return "Online RL made the policy better."
    if after["wilson95"][1] < before["wilson95"][0]:
        return "Online RL made the policy worse."
    return "No clear difference: the intervals overlap."


def _figure(label: str, kind: str, result: Eval | None) -> str:
    if not result:
        return f'<div class="figure {kind}"><span class="what">{label}</span><span class="big">&ndash;</span></div>'
    return (
        f'<div class="figure {kind}"><span class="what">{label}</span>'
        f'<span class="big">{100 * _rate(result):.1f}%</span>'
        f'<span class="small">{_count(result)} episodes, 95% interval {_interval(result)}</span></div>'
    )


def _bars_section(report: Mapping[str, Any]) -> str:
    rows = [
        _bar(label, kind, report[key])
        for key, label, kind in (("imitation", "imitation", "before"), ("rl", "after online RL", "after"))
        if report.get(key)
    ]
    controls = _controls(report)
    for name, result in controls.items():
        rows.append(_bar(_control_label(name), "plain" if name in SHOULD_SUCCEED else "fail", result))
    if not rows:
        return ""
    notes = "".join(
        f"<li><b>{escape(_control_label(name))}</b>: {CONTROL_NOTES[name]}</li>"
        for name in controls
        if name in CONTROL_NOTES
    )
    return (
        "<section><h2>Success, and what must not succeed</h2>"
        f'<div class="split"><div class="chart">{charts.bars(rows)}</div>'
        f'<ul class="notes"><li>Whiskers are Wilson 95% intervals.</li>{notes}</ul></div></section>'
    )


def _controls(report: Mapping[str, Any]) -> dict[str, Eval]:
    """The report's controls and those of the RL evaluation, in the page's order."""
    found = {**report.get("rl", {}).get("controls", {}), **report.get("controls", {})}
    ordered = dict.fromkeys([*CONTROL_LABELS, *found])
    return {name: found[name] for name in ordered if found.get(name, {}).get("episodes")}


def _control_label(name: str) -> str:
    return CONTROL_LABELS.get(name, name.replace("_", " "))


def _bar(label: str, kind: str, result: Eval) -> charts.Bar:
    lo, hi = result["wilson95"]
    return charts.Bar(label, _rate(result), (lo, hi), _count(result), kind)


def _curves(report: Mapping[str, Any]) -> str:
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
    parts = [f'<div class="chart card">{part}</div>' for part in parts if part]
    if not parts:
        return ""
    note = f'<p class="small">{_teacher_note(report["teacher"])}</p>' if report.get("teacher") else ""
    return f'<section><h2>Learning curves</h2><div class="pair">{"".join(parts)}</div>{note}</section>'


def _teacher_note(teacher: Mapping[str, Any]) -> str:
    """A note that the policy also learnt from a privileged teacher, which needs a simulator."""
    practised = int(teacher.get("control_steps", 0))
    how = f"practised for {practised:,} control steps (counted above)" if practised else "needed no practice"
    return (
        "Beside the reward the policy learnt from a teacher of the same demonstrations, which reads the "
        f"simulator&rsquo;s state and {how}. Alone it succeeds in {teacher['successes']} of {teacher['episodes']} "
        "training scenes. The policy itself sees pictures, the instruction and the robot&rsquo;s own pose."
    )


def _films(report: Mapping[str, Any]) -> str:
    cards = [_film(film) for film in report.get("filmstrips", ()) if len(film.get("frames", ()))]
    return f'<section><h2>Episodes</h2><div class="films">{"".join(cards)}</div></section>' if cards else ""


def _film(film: Mapping[str, Any]) -> str:
    """An episode: a moving picture, stills in time order, the instruction as caption."""
    frames = np.asarray(film["frames"], dtype=np.uint8)
    stills = np.linspace(0, len(frames) - 1, min(_STILLS, len(frames))).round().astype(int)
    outcome = "success" if film.get("success") else "wrong object" if film.get("wrong_object") else "failure"
    badge = "good" if outcome == "success" else "bad"
    stage = f'<span class="stage">{escape(str(film["stage"]))}</span>' if film.get("stage") else ""
    strip = "".join(f'<img src="{_webp(frames[i : i + 1])}" alt="">' for i in stills)
    caption = escape(str(film["caption"]))
    return (
        f'<figure><figcaption><q>{caption}</q>{stage}<span class="badge {badge}">{outcome}</span></figcaption>'
        f'<div class="strip"><img class="moving" src="{_webp(frames)}" alt="{caption}">{strip}</div></figure>'
    )


def _webp(frames: NDArray[np.uint8]) -> str:
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


def _stages(report: Mapping[str, Any]) -> str:
    stages = report.get("stages", ())
    if not stages:
        return ""
    total = sum(stage["seconds"] for stage in stages)
    longest = max(stage["seconds"] for stage in stages) or 1.0
    rows = []
    for stage in stages:
        share = 100 * stage["seconds"] / longest
        facts = [f"{_words(key)} {_value(value)}" for key, value in stage.items() if key not in _STAGE_FIELDS]
        if stage.get("state", "done") != "done":
            facts.insert(0, stage["state"])
        rows.append(
            f'<tr><th scope="row">{escape(_words(stage["name"]))}</th>'
            f'<td class="number">{_duration(stage["seconds"])}</td>'
            f'<td class="share"><span style="width:{share:.1f}%"></span></td>'
            f'<td class="extra">{escape(", ".join(facts))}</td></tr>'
        )
    total_cells = f'<td class="number">{_duration(total)}</td><td></td><td></td>'
    rows.append(f'<tr class="total"><th scope="row">total</th>{total_cells}</tr>')
    return f"<section><h2>Where the time went</h2><table><tbody>{''.join(rows)}</tbody></table></section>"


def _latency(report: Mapping[str, Any]) -> str:
    latency = report.get("latency_ms")
    if not latency:
        return ""
    groups = {"round trip": {key: value for key, value in latency.items() if not isinstance(value, Mapping)}}
    groups |= {name: value for name, value in latency.items() if isinstance(value, Mapping)}
    columns = list(dict.fromkeys(key for group in groups.values() for key in group))
    head = "".join(f'<th scope="col" class="number">{escape(_words(column))}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(_words(name))}</th>'
        + "".join(f'<td class="number">{_value(group[column]) if column in group else ""}</td>' for column in columns)
        + "</tr>"
        for name, group in groups.items()
        if group
    )
    return (
        "<section><h2>Served over a websocket</h2><table class='narrow'><thead><tr><th scope='col'>milliseconds</th>"
        f"{head}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _breakdown(report: Mapping[str, Any]) -> str:
    """Success per task and per phrasing, before and after."""
    before, after = report.get("imitation") or {}, report.get("rl") or {}
    tables = []
    for key, title in (("per_task", "task"), ("per_phrasing", "phrasing")):
        names = list(dict.fromkeys([*after.get(key, {}), *before.get(key, {})]))
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(_breakdown_cells(result.get(key, {}).get(name)) for result in (before, after))
            + "</tr>"
            for name in names
        )
        if rows:
            tables.append(
                f"<table><thead><tr><th scope='col'>{title}</th><th scope='col' colspan='2'>imitation</th>"
                f"<th scope='col' colspan='2'>after online RL</th></tr></thead><tbody>{rows}</tbody></table>"
            )
    if not tables:
        return ""
    return f"<details><summary>Per task and per phrasing</summary>{''.join(tables)}</details>"


def _breakdown_cells(result: Eval | None) -> str:
    if not result:
        return "<td></td><td></td>"
    detail = f"{_count(result)}, {_interval(result)}"
    return f'<td class="number">{100 * _rate(result):.1f}%</td><td class="extra">{detail}</td>'


def _footer(report: Mapping[str, Any]) -> str:
    keys = [key for key in ("command", "commit", "machine") if report.get(key)]
    rows = "".join(f"<dt>{key}</dt><dd>{escape(str(report[key]))}</dd>" for key in keys)
    return f"<footer><dl>{rows}</dl></footer>" if rows else ""


def _rate(result: Eval) -> float:
    return result["successes"] / max(result["episodes"], 1)


def _count(result: Eval) -> str:
    return f"{result['successes']}/{result['episodes']}"


def _interval(result: Eval) -> str:
    lo, hi = result["wilson95"]
    return f"{100 * lo:.1f}&ndash;{100 * hi:.1f}%"


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
