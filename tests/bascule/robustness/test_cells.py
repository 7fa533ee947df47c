"""Which cells a robustness table has, and how it says that one cannot be played."""

import pytest

from bascule.experiments.robustness.cells import PLAIN, SWAPPED, Cell, Setting, Table, plan
from bascule.experiments.robustness.report import console_table
from bascule.report.page import render


@pytest.mark.parametrize(
    ("suite", "backend", "axis", "reason"),
    [
        ("tabletop-pick", "warp", "shadows", "MuJoCo Warp draws no shadows"),
        ("robosuite-lift", "cpu", "texture", "suite 'robosuite-lift' has no perturbations"),
    ],
)
def test_an_axis_that_cannot_be_played_says_so(suite, backend, axis, reason, tmp_path):
    with Table(Setting("zero", suite, backend=backend), tmp_path) as table:
        row = table.row(Cell(axis, 1.0))
    assert row["episodes"] == 0 and reason in row["refused"] and not list(tmp_path.iterdir())
    plain = {"axis": "plain", "severity": 0.0, "successes": 1, "episodes": 2, "wilson95": [0.1, 0.9]}
    means = [{"severity": 1.0, "mean": None, "mean_of_eight": None, "lowest": None, "lowest_rate": None}]
    found = {"axes": [axis], "severities": [1.0], "cells": [plain, row], "means": means, "failures": []}
    report = plain | {"policy": "zero", "suite": suite, "seeds": [0, 1], "robustness": found}
    (cell,) = [cell for cell in console_table(report).columns[1].cells if "not measured" in str(cell)]
    assert reason in str(cell) and f"not measured: {reason}".replace("'", "&#39;") in render(report)


def test_the_plain_cell_is_played_once():
    cells = plan(("light", "noise"), (1.0, 0.0, 0.5, 1.0), swapped=True)
    graded = [Cell(axis, severity) for axis in ("light", "noise") for severity in (0.5, 1.0)]
    assert cells == [PLAIN, SWAPPED, *graded]
    assert plan(("light",), (0.5,), swapped=False) == [PLAIN, Cell("light", 0.5)]
