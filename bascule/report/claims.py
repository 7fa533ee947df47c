"""Results as data: `benchmarks/results/*.json`, one file a claim, read and written here.

A claim is one reproducible command, where and when it was run, and what came out: counts (k of n episodes) and
figures (a value, its unit and, of timings, its ratio to a baseline of the same run). Intervals, percentages, totals and
whether a bar is reached are not in the files: they are computed when a claim is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from vla.core.config import decode, encode, load_json, unknown, write_atomic
from vla.core.paths import ROOT
from vla.core.statistics import wilson95

RESULTS = ROOT / "benchmarks" / "results"
CONTENTS = "contents.json"
_COMMIT = re.compile(r"[0-9a-f]{7,40}\b")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Count:
    """k of n episodes (or requests, ticks, ...). Rows of one arm are added up over seeds and cases."""

    arm: str
    """The variant: "imitation", "after RL"."""
    k: int
    n: int
    seed: int | None = None
    """Seed of the training, not of the evaluation scenes."""
    case: str | None = None
    """A task or a condition of the arm, shown in a column of its own."""
    control: bool = False
    """True for a control that must fail: swapped instruction, zero or random actions, blind replay."""


@dataclass(frozen=True)
class Figure:
    """A measured value with its unit; a timing has the ratio to `baseline`, measured in the same run, too."""

    name: str
    value: float
    unit: str = ""
    arm: str | None = None
    """An arm of the counts, in whose row the figure is then shown; otherwise a column of the table of figures."""
    seed: int | None = None
    baseline: str | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    """95%, as the command printed it."""
    plus_minus: float | None = None
    """Half of a 95% interval over seeds, as the command printed it."""
    config: str = ""


@dataclass(frozen=True)
class Bar:
    """A target for a claim. `of` names an arm, whose success rate counts, or a figure ("name" or "name, arm")."""

    of: str
    at_least: float | None = None
    at_most: float | None = None
    ratio: bool = False
    """The target applies to the ratio of a figure instead of its value."""
    compared_with: str | None = None
    """Another arm: the quotient of the two success rates is meant; with `within`, their difference."""
    within: float | None = None
    """At most so much below `compared_with`."""


@dataclass(frozen=True)
class Claim:
    """One result: a command, where it ran, and the counts and figures that came out."""

    title: str
    command: str
    """The command that reproduces the result at `commit`; CKPT, FOLDER and FILE are placeholders."""
    commit: str
    """Its hash first; words after it say what else there is to know, such as a seed that was run at another one."""
    date: str
    """YYYY-MM-DD."""
    machine: str
    seeds: tuple[int, ...] = ()
    """Seeds of training; empty if nothing was trained."""
    counts: tuple[Count, ...] = ()
    figures: tuple[Figure, ...] = ()
    bars: tuple[Bar, ...] = ()
    pool_cases: bool = True
    """True if the cases are drawn from one distribution, so that their sum is meaningful."""
    backbone: str = ""
    """Backbone of its policies; empty where there is none, and where the arms differ in it."""
    note: str = ""
    """One sentence on how to read it."""

    def arms(self) -> list[str]:
        """The arms of the counts, in the order of the file."""
        return list(dict.fromkeys(row.arm for row in self.counts))

    def cases(self) -> list[str]:
        """The cases of the counts, in the order of the file."""
        return list(dict.fromkeys(row.case for row in self.counts if row.case is not None))

    def pooled(self, arm: str, *, case: str | None = None, seed: int | None = None) -> tuple[int, int]:
        """(k, n) of an arm, summed over all cases or seeds if None; (0, 0) when it has no such rows."""
        rows = [
            row
            for row in self.counts
            if row.arm == arm and case in (None, row.case) and (seed is None or seed == row.seed)
        ]
        return sum(row.k for row in rows), sum(row.n for row in rows)

    def figure(self, name: str) -> Figure:
        """The figure called "name" or "name, arm". KeyError if there is none."""
        for row in self.figures:
            if name in (row.name, f"{row.name}, {row.arm}"):
                return row
        raise KeyError(name)


@dataclass(frozen=True)
class Section:
    """A heading of BENCHMARKS.md, and the claims (names of files without .json) under it."""

    title: str
    claims: tuple[str, ...]
    """In one table, as far as their columns agree."""
    briefly: tuple[str, ...] = ()
    """In a line each."""


@dataclass(frozen=True)
class Headline:
    """A row of the README's table: `arm` of `claim`, and what it is compared with."""

    what: str
    claim: str
    before: str
    after: str


@dataclass(frozen=True)
class Contents:
    """`contents.json`: in which order claims are shown, and which of them the README shows."""

    sections: tuple[Section, ...]
    headlines: tuple[Headline, ...] = ()


@dataclass(frozen=True)
class Results:
    """All claims by name, and the order in which they are shown."""

    claims: dict[str, Claim]
    contents: Contents


def measured(claim: Claim, bar: Bar) -> float:
    """The value that is compared with a bar. KeyError for a name that the claim does not have."""
    if bar.of in claim.arms():
        k, n = claim.pooled(bar.of)
        if bar.compared_with is None:
            return k / n
        k0, n0 = claim.pooled(bar.compared_with)
        if n0 == 0:
            raise KeyError(bar.compared_with)
        return k0 / n0 - k / n if bar.within is not None else k / n / (k0 / n0)
    row = claim.figure(bar.of)
    if not bar.ratio:
        return row.value
    if row.ratio is None:
        raise KeyError(f"ratio of {bar.of}")
    return row.ratio


def reached(claim: Claim, bar: Bar) -> bool:
    """True if the claim reaches the bar."""
    value = measured(claim, bar)
    if bar.within is not None:
        return value <= bar.within
    return (bar.at_least is None or value >= bar.at_least) and (bar.at_most is None or value <= bar.at_most)


def load_claim(path: Path) -> Claim:
    """The claim in a file. ValueError naming the file for anything that is missing, unknown or cannot be."""
    data = load_json(path)
    try:
        claim = decode(Claim, data)
        for problem in problems(claim):
            raise ValueError(problem)
    except ValueError as problem:
        raise ValueError(f"{path.name}: {problem}") from None
    return claim


def problems(claim: Claim) -> Iterable[str]:
    """The inconsistencies of a claim, one sentence each."""
    for name in ("title", "command", "machine"):
        if not getattr(claim, name).strip():
            yield f"'{name}' is empty"
    if not _COMMIT.match(claim.commit):
        yield f"'commit' must begin with a commit's hash, not {claim.commit!r}"
    if not _DATE.fullmatch(claim.date):
        yield f"'date' must be YYYY-MM-DD, not {claim.date!r}"
    if not claim.counts and not claim.figures:
        yield "there is neither a count nor a figure"
    for row in claim.counts:
        if not 0 <= row.k <= row.n or row.n == 0:
            yield f"arm '{row.arm}': {row.k} of {row.n} cannot be"
    rows = [(row.arm, row.seed, row.case) for row in claim.counts]
    rows += [(row.name, row.seed, row.arm, row.config) for row in claim.figures]
    for row in rows:
        if rows.count(row) > 1:
            yield f"{row[0]!r} is there twice for the same seed and case"
    seeds = {row.seed for row in (*claim.counts, *claim.figures) if row.seed is not None}
    if strange := sorted(seeds - set(claim.seeds)):
        yield f"rows of seed {strange[0]}, which 'seeds' does not name"
    for bar in claim.bars:
        if sum(limit is not None for limit in (bar.at_least, bar.at_most, bar.within)) != 1:
            yield f"the bar of '{bar.of}' needs one of at_least, at_most and within"
        try:
            measured(claim, bar)
        except KeyError as missing:
            yield f"a bar is of {missing}, which the claim has not"


def load_results(folder: Path = RESULTS) -> Results:
    """All claims in a folder. ValueError for a wrong file, and for a claim that no section shows, or two."""
    if not (folder / CONTENTS).is_file():
        raise ValueError(f"there are no results in {folder}: this needs a checkout of Bascule")
    claims = {path.stem: load_claim(path) for path in sorted(folder.glob("*.json")) if path.name != CONTENTS}
    contents = decode(Contents, load_json(folder / CONTENTS))
    shown = [name for section in contents.sections for name in (*section.claims, *section.briefly)]
    for name in [*shown, *(line.claim for line in contents.headlines)]:
        if name not in claims:
            raise ValueError(f"{CONTENTS}: {unknown(name, claims, 'claim')}")
    for name in claims:
        if shown.count(name) != 1:
            raise ValueError(f"{CONTENTS} must show the claim '{name}' in one section, not in {shown.count(name)}")
    for line in contents.headlines:
        for arm in (line.before, line.after):
            if arm not in claims[line.claim].arms():
                raise ValueError(f"{CONTENTS}: {unknown(arm, claims[line.claim].arms(), f'arm of {line.claim}')}")
    return Results(claims, contents)


def save_claim(path: Path, claim: Claim) -> None:
    """Write a claim: a line a row, and nothing that is as it would be anyway. ValueError as of `load_claim`."""
    for problem in problems(claim):
        raise ValueError(f"{path.name}: {problem}")
    write_atomic(path, one_row_a_line(_brief(claim)).encode())


def save_contents(path: Path, contents: Contents) -> None:
    """Write `contents.json`."""
    write_atomic(path, one_row_a_line(encode(contents)).encode())


def one_row_a_line(data: dict[str, Any]) -> str:
    """JSON in which every entry of a list of tables has a line of its own: what changes is what a diff shows."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n    " + ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n  ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _brief(row: Any) -> dict[str, Any]:
    """A dataclass as JSON values, without the fields that have their defaults; whole numbers without a point."""
    out = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        if isinstance(value, tuple):
            value = [_brief(item) if hasattr(item, "__dataclass_fields__") else _whole(item) for item in value]
        out[field.name] = _whole(value)
    return out


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def rate(k: int, n: int) -> str:
    """ "398/400 = 99.5% [98.2, 99.9]": percent and Wilson's 95% interval; more digits of what was counted often."""
    digits = 1 if n < 10_000 else 3
    low, high = wilson95(k, n)
    return f"{k}/{n} = {100 * k / n:.{digits}f}% [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
