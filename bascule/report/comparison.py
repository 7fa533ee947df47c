"""`vla report compare`: the evaluations of several policies in the same scenes, compared scene by scene.

Read are the files of `vla eval --json`. An arm is one policy, or those of one recipe's training seeds. One policy on
either side: exact McNemar test and Newcombe's interval. Several: a bootstrap over training seeds and scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vla.core.config import load_json
from vla.core.statistics import (
    Pairs,
    Resampled,
    bootstrap,
    holm,
    iqm,
    mcnemar,
    middle95,
    newcombe95,
    rates_by_task,
    verdict,
    wilson95,
)

if TYPE_CHECKING:
    from rich.table import Table

MUST_AGREE = {
    "suite": "suite",
    "perturb": "--perturb",
    "phrasings": "--phrasings",
    "initial_states": "source of initial states",
}
"""Fields of a result that say which scenes were played, and what they are called in a message."""
SHOULD_AGREE = {
    "mujoco": "MuJoCo version",
    "horizon": "horizon",
    "n_action_steps": "number of actions executed of a chunk",
    "backend": "backend",
    "deterministic": "mean action",
    "cameras": "--cameras",
}
"""Fields that may change success in the same scene: where they differ, a warning says so."""
MANY_TASKS = 4
"""Tasks from which on the interquartile mean is reported: of fewer scores it leaves nothing out."""


@dataclass(frozen=True)
class Evaluation:
    """One file of `vla eval --json`."""

    file: Path
    data: Mapping[str, Any]
    scenes: Mapping[int, tuple[str, str]]
    """Task and phrasing by seed."""
    solved: Mapping[int, bool]
    """By seed."""


@dataclass(frozen=True)
class Arm:
    """The evaluations of one policy, or of one recipe's training seeds, in the scenes that all arms have."""

    name: str
    evaluations: Sequence[Evaluation]
    success_RN: NDArray[np.bool_]
    """Policies, scenes."""

    @property
    def rate(self) -> float:
        """Success rate over all policies and scenes."""
        return float(self.success_RN.mean())


def load(file: Path) -> Evaluation:
    """Read a result. ValueError for another file, and for a result that does not tell its episodes."""
    data = load_json(file)
    if not isinstance(data, Mapping) or not {"suite", "episodes", "successes"} <= data.keys():
        raise ValueError(f"{file} is no result of `vla eval --json`")
    if "by_seed" not in data:
        raise ValueError(
            f"{file} does not tell how each episode ended, as results of earlier versions: run `vla eval --json` again"
        )
    try:
        columns = data["by_seed"]
        seeds = columns["seed"]
        words = zip(columns["task"], columns["phrasing"], strict=True)
        scenes = dict(zip(seeds, words, strict=True))
        solved = dict(zip(seeds, (outcome == "success" for outcome in columns["outcome"]), strict=True))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is damaged: the columns of by_seed do not fit together") from None
    if (len(scenes), sum(solved.values())) != (data["episodes"], data["successes"]):
        raise ValueError(f"{file} is damaged: by_seed has not the {data['successes']} of {data['episodes']} it counts")
    return Evaluation(file, data, scenes, solved)


def compare(files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Compare every arm with the first one; `files` are the results of each arm's policies.

    JSON-ready: "scenes", "tasks", "left_out", "warnings", "arms" by name, and "comparisons", each with its sentence.
    ValueError, naming the two files, for evaluations that do not have the same scenes.
    """
    if len(files) < 2:
        raise ValueError("a comparison needs two arms or more: ARM=FILE ARM=FILE")
    paths = [file for group in files.values() for file in group]
    for k, file in enumerate(paths):
        if file.resolve() in {other.resolve() for other in paths[:k]}:
            raise ValueError(f"{file} is given twice: it would count as two policies")
    loaded = {name: [load(file) for file in group] for name, group in files.items()}
    for group in loaded.values():
        _refuse_same(group)
    everyone = [one for group in loaded.values() for one in group]
    seeds, warnings = _paired(everyone)
    tasks = sorted({everyone[0].scenes[seed][0] for seed in seeds})
    tasks_N = np.array([tasks.index(everyone[0].scenes[seed][0]) for seed in seeds])
    arms = [
        Arm(name, group, np.array([[one.solved[seed] for seed in seeds] for one in group]))
        for name, group in loaded.items()
    ]
    drawn = bootstrap([arm.success_RN for arm in arms], tasks_N)
    comparisons = [
        _compared(arms[0], arm, tasks, tasks_N, (drawn[0], resampled))
        for arm, resampled in zip(arms[1:], drawn[1:], strict=True)
    ]
    tested = [one for one in comparisons if "mcnemar_p" in one]
    if len(tested) > 1:
        for one, p in zip(tested, holm([one["mcnemar_p"] for one in tested]), strict=True):
            one["mcnemar_p_holm"] = p
    if any(len(arm.evaluations) > 1 for arm in arms):
        warnings += [
            f"{arm.name} has one training seed: intervals lack how much its training varies"
            for arm in arms
            if len(arm.evaluations) == 1
        ]
    return {
        "suite": everyone[0].data["suite"],
        "scenes": len(seeds),
        "tasks": tasks,
        "seeds": [seeds[0], seeds[-1]],
        "left_out": {str(one.file): len(one.scenes) - len(seeds) for one in everyone if len(one.scenes) > len(seeds)},
        "warnings": warnings,
        "arms": {
            arm.name: _summary(arm, resampled, tasks_N, len(tasks)) for arm, resampled in zip(arms, drawn, strict=True)
        },
        "comparisons": comparisons,
    }


def _refuse_same(group: Sequence[Evaluation]) -> None:
    """ValueError for two results of one policy among the training seeds of an arm: copies, or the same weights."""
    for k, one in enumerate(group):
        for other in group[:k]:
            if one.data == other.data:
                raise ValueError(f"{one.file} is a copy of {other.file}: it would count as two policies")
            if "weights" in one.data and one.data["weights"] == other.data.get("weights"):
                raise ValueError(
                    f"{one.file} and {other.file} are of the same weights: they would count as two training seeds"
                )


def _paired(everyone: Sequence[Evaluation]) -> tuple[list[int], list[str]]:
    """The seeds that all evaluations have, and warnings. ValueError where these are not the same scenes."""
    first, warnings = everyone[0], []
    for other in everyone[1:]:
        beside = f"{other.file} cannot be paired with {first.file}"
        for name, what in MUST_AGREE.items():
            here, there = other.data.get(name), first.data.get(name)
            if here != there:
                raise ValueError(f"{beside}: another {what}, {_told(here)} instead of {_told(there)}")
        if len({one.data.get("suite_file") for one in (first, other)} - {None}) > 1:
            raise ValueError(f"{beside}: {first.data['suite']} described other scenes when it was played")
        shared = [seed for seed in first.scenes if seed in other.scenes]
        if not shared:
            raise ValueError(f"{beside}: other seeds, {_span(other)} instead of {_span(first)}")
        for seed in shared:
            if (here := other.scenes[seed]) != (there := first.scenes[seed]):
                differing = [f"'{a}' instead of '{b}'" for a, b in zip(here, there, strict=True) if a != b]
                raise ValueError(f"{beside}: seed {seed} is another scene, {' and '.join(differing)}")
        for name, what in SHOULD_AGREE.items():
            here, there = other.data.get(name), first.data.get(name)
            if here != there:
                warnings.append(
                    f"{other.file}: another {what} than {first.file}, {_told(here)} instead of {_told(there)}"
                )
        if ("held" in other.data) != ("held" in first.data):
            warnings.append(f"only one of {other.file} and {first.file} was played with --hold-ungrounded")
    seeds = [seed for seed in first.scenes if all(seed in other.scenes for other in everyone)]
    if not seeds:
        raise ValueError("there is no seed that all of the files have")
    if most := max(len(one.scenes) - len(seeds) for one in everyone):
        warnings.append(
            f"compared are the {len(seeds)} scenes that all files have; up to {most} of a file are left out"
        )
    return seeds, warnings


def _told(value: Any) -> str:
    """A field's value in a message; of a perturbation what is not 0."""
    if isinstance(value, Mapping):
        return " ".join(f"{axis}={severity}" for axis, severity in value.items() if severity not in (0, 0.0, "test"))
    return "none" if value in (None, "") else str(value)


def _span(one: Evaluation) -> str:
    return f"{min(one.scenes)} to {max(one.scenes)}"


def _summary(arm: Arm, drawn: Resampled, tasks_N: NDArray[np.int64], tasks: int) -> dict[str, Any]:
    """An arm's own figures."""
    successes, episodes = int(arm.success_RN.sum()), arm.success_RN.size
    found: dict[str, Any] = {
        "files": [str(one.file) for one in arm.evaluations],
        "policies": [one.data.get("policy", "") for one in arm.evaluations],
        "successes": successes,
        "episodes": episodes,
        "success_rate": arm.rate,
        "wilson95": list(wilson95(successes, episodes)),
    }
    if len(arm.evaluations) > 1:
        found["per_training_seed"] = [[int(row.sum()), row.size] for row in arm.success_RN]
        found["bootstrap95"] = list(middle95(drawn.mean()))
    if tasks >= MANY_TASKS:
        found["iqm"] = _iqm(arm, tasks_N)
        found["iqm95"] = list(middle95(drawn.iqm()))
    return found


def _iqm(arm: Arm, tasks_N: NDArray[np.int64]) -> float:
    return float(iqm(rates_by_task(arm.success_RN, tasks_N).ravel()))


def _compared(
    first: Arm, second: Arm, tasks: Sequence[str], tasks_N: NDArray[np.int64], drawn: tuple[Resampled, Resampled]
) -> dict[str, Any]:
    """The second arm beside the first."""
    found: dict[str, Any] = {"baseline": first.name, "arm": second.name, "difference": second.rate - first.rate}
    alone = len(first.evaluations) == len(second.evaluations) == 1
    before, after = drawn
    if alone:
        pairs = Pairs.of(first.success_RN[0], second.success_RN[0])
        interval = newcombe95(pairs)
        found |= {
            "both": pairs.both, "only_baseline": pairs.only_first, "only_arm": pairs.only_second,
            "neither": pairs.neither, "interval95": list(interval), "method": "Newcombe 1998, method 10, paired",
            "mcnemar_p": mcnemar(pairs),
        }  # fmt: skip
    else:
        interval = _percentiles(after.mean() - before.mean(), first.success_RN, second.success_RN)
        found |= {"interval95": list(interval), "method": "bootstrap over training seeds and scenes, by task"}
    if len(tasks) >= MANY_TASKS:
        found["iqm_difference"] = _iqm(second, tasks_N) - _iqm(first, tasks_N)
        found["iqm_interval95"] = list(middle95(after.iqm() - before.iqm()))
    found["sentence"] = verdict(first.name, second.name, found["difference"], interval, p=found.get("mcnemar_p"))
    if len(tasks) > 1:
        found["per_task"] = {}
        for number, task in enumerate(tasks):
            here = tasks_N == number
            mine, theirs = second.success_RN[:, here], first.success_RN[:, here]
            ends = (
                newcombe95(Pairs.of(theirs[0], mine[0]))
                if alone
                else _percentiles(after.of_task(number) - before.of_task(number), theirs, mine)
            )
            found["per_task"][task] = {
                "baseline": [int(theirs.sum()), theirs.size], "arm": [int(mine.sum()), mine.size],
                "difference": float(mine.mean() - theirs.mean()), "interval95": list(ends),
            }  # fmt: skip
    return found


def _percentiles(
    differences_B: NDArray[np.float64], first_RN: NDArray[np.bool_], second_RN: NDArray[np.bool_]
) -> tuple[float, float]:
    """The bootstrap's interval. Where no scene and no policy differs from another it has no width, as if there were
    nothing that more scenes could show; then Newcombe's, of these scenes."""
    low, high = middle95(differences_B)
    return (low, high) if high > low else newcombe95(Pairs.of(first_RN[0], second_RN[0]))


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The comparison for a terminal: the arms, what each has over the first, and the tasks where there are several."""
    from vla.runtime.console import format_rate, table

    shown = []
    rows = []
    for name, arm in result["arms"].items():
        seeds = " ".join(f"{k}/{n}" for k, n in arm.get("per_training_seed", ()))
        over_seeds = _interval(arm["bootstrap95"]) if seeds else ""
        middle = f"{100 * arm['iqm']:.1f} {_interval(arm['iqm95'])}" if "iqm" in arm else ""
        rows.append((name, format_rate(arm), seeds, over_seeds, middle))
    title = f"{result['suite']}, {result['scenes']} scenes"
    columns = ("arm", "success, Wilson 95%", "by training seed", "95% over seeds and scenes", "IQM over tasks")
    shown.append(_without_empty(title, columns, rows))
    rows = []
    for one in result["comparisons"]:
        only = f"{one['only_arm']} : {one['only_baseline']}" if "only_arm" in one else ""
        p = f"{one['mcnemar_p']:.2g}" if "mcnemar_p" in one else ""
        adjusted = f"{one['mcnemar_p_holm']:.2g}" if "mcnemar_p_holm" in one else ""
        middle = _difference(one["iqm_difference"], one["iqm_interval95"]) if "iqm_difference" in one else ""
        rows.append((one["arm"], _difference(one["difference"], one["interval95"]), only, p, adjusted, middle))
    columns = (
        f"beside {result['comparisons'][0]['baseline']}", "points, 95%", "solved by one only, arm : baseline",
        "McNemar p, exact", "p, Holm", "IQM, points, 95%",
    )  # fmt: skip
    shown.append(_without_empty("paired differences", columns, rows))
    for one in result["comparisons"]:
        rows = [
            (task, _of(part["baseline"]), _of(part["arm"]), _difference(part["difference"], part["interval95"]))
            for task, part in one.get("per_task", {}).items()
        ]
        if rows:
            shown.append(table("by task", ("task", one["baseline"], one["arm"], "points, 95%"), rows))
    return shown


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    from vla.runtime.console import table

    kept = [k for k in range(len(columns)) if any(row[k] != "" for row in rows)]
    return table(title, [columns[k] for k in kept], [[row[k] for k in kept] for row in rows])


def _interval(ends: Sequence[float]) -> str:
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _difference(value: float, ends: Sequence[float]) -> str:
    return f"{100 * value:+.1f} {_interval(ends)}"


def _of(counts: Sequence[int]) -> str:
    return f"{counts[0]}/{counts[1]}"
