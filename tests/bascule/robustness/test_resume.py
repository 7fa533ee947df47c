"""A robustness report whose run is killed goes on."""

import json
import subprocess
import sys
import time

from bascule.main import main

WORDS = ["eval", "expert", "--robustness", "--axes", "layout", "light", "--severities", "1"]
SMALL = ["--episodes", "2", "--num-envs", "2", "--workers", "1"]


def table_of(out):
    """The report's cells, without their times."""
    cells = json.loads((out / "report.json").read_text())["robustness"]["cells"]
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]


def test_a_killed_run_goes_on_to_the_same_table(tmp_path):
    words = [*WORDS, *SMALL, "--out", str(tmp_path / "killed")]
    cells = tmp_path / "killed" / "robustness"
    run = subprocess.Popen([sys.executable, "-m", "bascule", *words], stderr=subprocess.PIPE)
    try:
        while not (cells / "plain-0.json").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
    finally:
        run.kill()
        run.communicate()
    written = (cells / "plain-0.json").stat().st_mtime_ns
    assert not (tmp_path / "killed" / "report.json").exists()
    assert main(words) == 2, "without --resume"
    assert main([*words, "--resume"]) == 0
    assert (cells / "plain-0.json").stat().st_mtime_ns == written, "a finished cell is not played again"
    assert main([*WORDS, *SMALL, "--out", str(tmp_path / "whole")]) == 0
    whole = table_of(tmp_path / "whole")
    assert table_of(tmp_path / "killed") == whole
    assert [cell["episodes"] for cell in whole] == [2, 2, 2] and whole[0]["mean_steps"] > 0
