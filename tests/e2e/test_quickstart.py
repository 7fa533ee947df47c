"""The whole job with tiny budgets, through the command line: every stage runs, every file is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = (
    "backbone", "demonstrations", "imitation", "evaluate imitation", "online RL", "evaluate RL", "serve",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "vla.cli", "quickstart", "--smoke", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_report_has_the_fields_that_programs_read(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    assert all(stage["seconds"] >= 0 for stage in report["stages"])
    for part in (report["imitation"], report["rl"]):
        lo, hi = part["wilson95"]
        assert 0 <= lo <= part["success_rate"] <= hi <= 1 and part["seeds"][0] >= 5_000_000
        assert part["successes"] <= part["episodes"] == 8
    assert {"zero", "random", "blind", "swapped_instruction", "heldout_phrasing"} <= report["controls"].keys()
    assert report["controls"]["zero"]["successes"] == 0
    refined = next(stage for stage in report["stages"] if stage["name"] == "online RL")
    assert refined["updates"] == 4 and refined["practice_steps"] > 0 and refined["teacher_alone"].endswith("/96")
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p99"]


def test_the_page_needs_no_other_file(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "<html" in page and "data:image" in page and "a teacher of the same demonstrations" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_what_it_leaves_can_be_used_again(out: Path) -> None:
    from vla.data import load_dataset
    from vla.model import VLA

    assert len(load_dataset(out / "demos").episodes) == 4
    for checkpoint in ("imitation", "rl/best"):
        assert VLA.load(out / checkpoint).chunk_size == 8


def test_a_suite_is_refined_as_far_as_it_tells_its_state() -> None:
    from vla.quickstart_rl import suite_recipe

    pick, ten = suite_recipe("tabletop-pick"), suite_recipe("tabletop-ten")
    assert pick.guide is not None and pick.guide.teacher.turns > 1 and pick.guide.practice is not None
    assert ten.guide is not None and ten.guide.teacher.turns == 1 and ten.curriculum is not None
    assert ten.guide.teacher.origin == "hand" and ten.guide.practice is not None, "few demonstrations of every task"
