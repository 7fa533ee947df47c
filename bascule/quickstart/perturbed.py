"""The quickstart's last measurement with a recipe that randomises: the refined policy in perturbed environments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.quickstart.stages import Result
from vla.runtime import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bascule.quickstart.config import QuickstartConfig

PREFIX = "perturbed: "


def judge_perturbed(config: QuickstartConfig, out: Path, cells: Sequence[str], seeds: Sequence[int]) -> Result:
    """Success in the scenes of consecutive `seeds` under each of the perturbations `cells` ("texture=0.5"), as
    controls: cells of the robustness table, whose pictures stay in `out`/robustness."""
    from bascule.experiments.robustness.cells import Cell, Setting, Table

    folder = out / "robustness"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier policy in this place
    policy = str(out / "rl" / "best")
    setting = Setting(policy, config.suite, episodes=len(seeds), seed0=seeds[0], workers=config.workers)
    found: dict[str, dict[str, Any]] = {}
    with console.progress("perturbed environments", len(cells)) as update, Table(setting, folder) as table:
        for number, cell in enumerate(cells, start=1):
            axis, _, severity = cell.partition("=")
            row = table.row(Cell(axis, float(severity)))
            counts = {name: row[name] for name in ("successes", "episodes", "success_rate", "wilson95")}
            found[PREFIX + cell] = counts | {"wrong_object": row["wrong_object"]}
            update(number, note=f"{cell}: {console.format_rate(counts)}")
    return Result({}, {"controls": found})
