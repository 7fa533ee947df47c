"""The whole job with tiny budgets, through the command line: every stage runs, every file is there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STAGES = (
    "backbone", "demonstrations", "imitation", "evaluate imitation", "online RL", "evaluate RL", "serve",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "bascule.main", "quickstart", "--smoke", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)  # a busy machine
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_report_has_the_fields_that_programs_read(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    assert all(stage["seconds"] >= 0 and stage["state"] == "done" for stage in report["stages"])
    assert report["complete"] is True
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
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.model import VLA

    assert len(load_dataset(out / "demos").episodes) == 4
    for checkpoint in ("imitation", "rl/best"):
        assert VLA.load(out / checkpoint).chunk_size == 8


TIMINGS = {"seconds", "latency_ms", "peak_memory_gib", "steps_per_s", "command", "commit", "machine"}
"""The only parts of a report in which two runs of one seed may differ."""


def without_timings(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: without_timings(value) for name, value in part.items() if name not in TIMINGS}
    return [without_timings(value) for value in part] if isinstance(part, list) else part


def session(pid: int) -> list[str]:
    """The commands of the processes that `pid`, leader of its session, has left."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == pid:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_inside_every_stage_it_comes_to_the_report_of_an_undisturbed_run(
    out: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder, rng = tmp_path / "run", random.Random(0)
    command = [sys.executable, "-m", "bascule.main", "quickstart", "--out", str(folder), "--resume"]
    for begun, stage in enumerate(STAGES):
        run = subprocess.Popen([*command, *(() if begun else ("--smoke",))], start_new_session=True)
        before = STAGES[begun - 1].replace(" ", "-") if begun else ""
        first = folder / "stages" / f"{before}.json" if begun else folder / "quickstart.json"
        limit = time.monotonic() + 900
        while not first.exists():
            assert run.poll() is None and time.monotonic() < limit, f"it never came to {stage}"
            time.sleep(0.1)
        time.sleep(rng.uniform(0.0, 10.0) if begun else 0.0)
        run.send_signal(how)
        assert run.wait(timeout=120) != 1, "a stage failed"
        while session(run.pid):
            assert time.monotonic() < limit, f"left behind: {session(run.pid)}"
            time.sleep(0.1)
    assert subprocess.run(command, timeout=900, check=False).returncode == 0
    found, expected = (json.loads((f / "report.json").read_text()) for f in (folder, out))
    assert without_timings(found) == without_timings(expected)


def test_a_suite_is_refined_as_far_as_it_tells_its_state() -> None:
    from bascule.quickstart.config import QuickstartConfig
    from bascule.quickstart.recipes import rl_recipe
    from rl.recipes import RECIPES

    pick, ten = (RECIPES[rl_recipe(QuickstartConfig(suite=suite))]() for suite in ("tabletop-pick", "tabletop-ten"))
    assert pick.guide is not None and pick.guide.teacher.turns > 1 and pick.guide.practice is not None
    assert ten.guide is not None and ten.guide.teacher.turns == 1 and ten.curriculum is not None
    assert ten.guide.teacher.origin == "hand" and ten.guide.practice is not None, "few demonstrations of every task"
