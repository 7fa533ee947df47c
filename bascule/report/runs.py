"""A claim from the JSON that commands write: nothing is typed again.

Read are the files of `vla eval --json`, `vla bench --json`, `vla experiment --json`, `bascule.experiments.sb3_parity
--json` and the quickstart's `report.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from bascule.report.claims import (
    CONTENTS,
    RESULTS,
    Claim,
    Contents,
    Count,
    Figure,
    Section,
    load_claim,
    save_claim,
    save_contents,
)
from vla.core.config import decode, load_json

MUST_FAIL = ("swapped_instruction", "shuffled_labels", "zero", "random", "blind", "no-language", "shuffled")
Rows = tuple[list[Count], list[Figure]]


@dataclass(frozen=True)
class Wording:
    """The texts of a claim that a run does not record. None: keep the old text; an error for a new claim."""

    title: str | None = None
    command: str | None = None
    section: str | None = None
    note: str | None = None


def add(name: str, files: Sequence[Path], wording: Wording, folder: Path = RESULTS) -> Claim:
    """Write the claim `name` with the rows of `files`; of one that exists, only rows and provenance are replaced.

    ValueError for a file that is none of the above, a commit that is not known, and a new claim without its words.
    """
    if not files:
        raise ValueError("vla report add needs the JSON files of a run")
    path = folder / f"{name}.json"
    old = load_claim(path) if path.is_file() else None
    loaded = [(file, load_json(file)) for file in files]
    counts: list[Count] = []
    figures: list[Figure] = []
    for file, data in loaded:
        more_counts, more_figures = rows_of(file, data)
        counts += more_counts
        figures += more_figures
    title = wording.title or (old.title if old else None)
    commands = [data["command"] for _, data in loaded if "command" in data]
    command = wording.command or (old.command if old else None) or (commands[0] if commands else None)
    if title is None or command is None:
        raise ValueError(f"the claim '{name}' is new: say what it is with --claim, and how it was run with --command")
    contents = _placed(name, wording.section, decode(Contents, load_json(folder / CONTENTS)))
    claim = replace(
        old or Claim(title, command, "", "", ""),
        title=title,
        command=command,
        commit="; ".join(dict.fromkeys(str(data.get("commit", "unknown")) for _, data in loaded)),
        date=max(date.fromtimestamp(file.stat().st_mtime) for file, _ in loaded).isoformat(),
        machine="; ".join(dict.fromkeys(str(data.get("machine", "")) for _, data in loaded)),
        backbone="; ".join(dict.fromkeys(data["backbone"] for _, data in loaded if data.get("backbone"))),
        seeds=tuple(sorted({row.seed for row in (*counts, *figures) if row.seed is not None})),
        counts=tuple(counts),
        figures=tuple(figures),
        note=wording.note if wording.note is not None else (old.note if old else ""),
    )
    save_claim(path, claim)
    save_contents(folder / CONTENTS, contents)
    return claim


def _placed(name: str, section: str | None, contents: Contents) -> Contents:
    shown = [claim for one in contents.sections for claim in (*one.claims, *one.briefly)]
    if section is None:
        if name not in shown:
            titles = "; ".join(one.title for one in contents.sections)
            raise ValueError(
                f"the claim '{name}' is in no section: choose one with --section, or name a new one ({titles})"
            )
        return contents
    others = [
        replace(
            one,
            claims=tuple(c for c in one.claims if c != name) + ((name,) if one.title == section else ()),
            briefly=tuple(c for c in one.briefly if c != name),
        )
        for one in contents.sections
    ]
    if all(one.title != section for one in others):
        others.append(Section(section, (name,)))
    return replace(contents, sections=tuple(others))


def rows_of(file: Path, data: Any) -> Rows:
    """Counts and figures of one file. ValueError if no command of ours writes such files."""
    if isinstance(data, Mapping):
        if "stages" in data and "imitation" in data:
            return _quickstart(data)
        if "arms" in data and "experiment" in data:
            return _experiment(data)
        if data.get("bench") == "parity":
            return _parity(data)
        if "bench" in data and "results" in data:
            return [], [_timing(row) for row in data["results"]]
        if "successes" in data and "suite" in data:
            # FOLDER/SEED/ARM.json is how benchmarks/rl_*.sh lay out what they write.
            seed = int(file.parent.name) if file.parent.name.isdigit() else None
            return _evaluation(file.stem, seed, data), []
    raise ValueError(f"{file} is no JSON of vla eval, bench, experiment or quickstart")


def _evaluation(arm: str, seed: int | None, data: Mapping[str, Any]) -> list[Count]:
    tasks = data.get("per_task", {})
    if len(tasks) > 1:
        rows = [Count(arm, part["successes"], part["episodes"], seed, task) for task, part in tasks.items()]
    else:
        rows = [Count(arm, data["successes"], data["episodes"], seed)]
    for cell in data.get("robustness", {}).get("cells", ()):
        if cell["severity"] and cell["episodes"]:
            name = f"{arm}, severity {cell['severity']:g}"
            rows.append(Count(name, cell["successes"], cell["episodes"], seed, cell["axis"]))
    return rows + _controls(data.get("controls", {}), f"{arm}, ", seed)


def _controls(controls: Mapping[str, Any], prefix: str, seed: int | None) -> list[Count]:
    return [
        Count(f"{prefix}{name.replace('_', ' ')}", part["successes"], part["episodes"], seed, control=name in MUST_FAIL)
        for name, part in controls.items()
    ]


def _quickstart(report: Mapping[str, Any]) -> Rows:
    seed = report["seed"]
    counts = [
        Count(arm, report[part]["successes"], report[part]["episodes"], seed)
        for arm, part in (("imitation", "imitation"), ("after RL", "rl"))
    ]
    minutes = sum(stage["seconds"] for stage in report["stages"]) / 60
    figures = [Figure("minutes in all", round(minutes, 1), "", "after RL", seed)]
    for name in ("p50", "p99"):
        figures.append(Figure("a decision", round(report["latency_ms"][name], 1), "ms", name, seed))
    return counts + _controls(report["controls"], "", seed), figures


def _experiment(result: Mapping[str, Any]) -> Rows:
    counts: list[Count] = []
    figures: list[Figure] = []
    for arm, row in result["arms"].items():
        seeds, case, must_fail = row.get("per_seed"), None, arm.replace(" ", "_") in MUST_FAIL
        if row.get("severity"):  # a cell of a robustness table
            case = row["axis"]
            arm = arm.removesuffix(f"{case} {row['severity']:g}") + f"severity {row['severity']:g}"
        if seeds:
            counts += [Count(arm, k, n, int(seed), case, must_fail) for seed, (k, n) in seeds.items()]
        elif row["episodes"]:
            counts.append(Count(arm, row["successes"], row["episodes"], None, case, must_fail))
        if row.get("sampled"):
            counts.append(Count(f"{arm}, sampled", *row["sampled"]))
        for name, value in row.items() if case is None else ():
            name = name.replace("_", " ")
            if name in ("successes", "episodes", "sampled", "severity", "kept") or name.endswith(" rate"):
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                figures.append(Figure(name, _digits(value), "", arm))
            elif seeds and isinstance(value, list) and name in ("control steps", "seconds"):
                figures += [Figure(name, _digits(v), "", arm, int(seed)) for seed, v in zip(seeds, value, strict=True)]
    return counts, figures


def _parity(report: Mapping[str, Any]) -> Rows:
    figures = []
    for task, found in report["tasks"].items():
        for arm in found["mean"]:
            half = _digits(found["half_interval95"][arm])
            figures.append(Figure(task, _digits(found["mean"][arm]), "", arm, plus_minus=half))
        gap = found["difference"]
        low, high = map(_digits, gap["interval95"])
        figures.append(Figure(task, _digits(gap["mean"]), "", "difference", interval=(low, high)))
    return [], figures


def _timing(row: Mapping[str, Any]) -> Figure:
    ratio = None if row.get("ratio") is None else _digits(row["ratio"])
    config = row.get("config") or ""
    return Figure(
        row["name"],
        _digits(row["value"]),
        row["unit"],
        baseline=row.get("baseline"),
        ratio=ratio,
        config=config if isinstance(config, str) else str(config),
    )


def _digits(value: float) -> float:
    """Four digits that count; whole numbers whole."""
    return value if isinstance(value, int) else float(f"{value:.4g}")
