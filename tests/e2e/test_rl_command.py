"""`vla rl`, whole: from a checkpoint through the worlds to a better one, with its books and its retention report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from bascule.main import main
from envs.backends.cpu_worlds import PROPRIO_NAMES
from envs.tabletop.control import action_spec
from vla.core.checkpoint import read_config
from vla.model.config import VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Stats


def untrained(folder: Path, members: tuple[str, ...] = ()) -> str:
    spec = action_spec(20.0)
    rng = np.random.default_rng(0)
    proprio = rng.normal(size=(50, len(PROPRIO_NAMES)))
    stats = Stats.from_arrays(proprio, rng.uniform(spec.low, spec.high, (50, spec.dim)))
    vla = VLA.build(VLAConfig(backbone="tiny"), stats=stats, action_spec=spec, cameras=("front", "wrist"))
    vla.members = {name: vla.processor for name in members}
    vla.save(folder)
    return str(folder)


def test_the_command_refines_keeps_books_and_reports(tmp_path, capsys):
    """`vla rl smoke` on the real worlds, from an untrained policy for two robots, for one of them."""
    out, init = tmp_path / "rl", untrained(tmp_path / "init", ("arm", "hand"))
    arguments = ["rl", "smoke", "--init", init, "--embodiment", "hand", "--out", str(out), "--workers", "1"]
    extra = ["--suite", "tabletop-mixed", "--curriculum", "vla-rl", "--track", "tensorboard"]
    extra += ["--retain", "tabletop-pick", "--retain-episodes", "3"]
    assert main([*arguments, *extra, "--resume"]) == 0  # there is nothing to resume: it begins
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and "share/pick" in rows[0]
    assert read_config(out / "best")["members"] == {}, "a policy for the one robot"
    assert list((out / "tensorboard").iterdir()) and (out / "best" / "config.json").is_file()
    kept = json.loads((out / "retention.json").read_text())
    assert kept["tasks"][0]["before"]["episodes"] == 3
    assert main(arguments) == 2
    assert "already holds a run: resume it (--resume), or choose another folder (--out)" in capsys.readouterr().err


def test_a_limit_of_time_that_ends_the_updates_early_is_told(tmp_path, capsys):
    arguments = ["rl", "smoke", "--init", untrained(tmp_path / "init"), "--out", str(tmp_path / "rl"), "--workers", "1"]
    assert main([*arguments, "--updates", "300", "--minutes", "0.01"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "warning: RL was cut short by the time limit of 0.6 s after" in error and "of 300 updates" in error
    assert "continue with --resume --updates 300 --minutes" in error
    assert main([*arguments, "--resume", "--updates", "2"]) == 0
    assert "of 2) in" in (error := capsys.readouterr().err) and "cut short" not in error


def test_several_processes_are_started_and_learn_as_one(tmp_path, capsys):
    arguments = ["rl", "smoke", "--init", untrained(tmp_path / "init"), "--out", str(tmp_path / "rl")]
    command = [sys.executable, "-m", "bascule.main", *arguments, "--workers", "1", "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4], "one of them keeps the books"
    assert rows[0]["control_steps"] > 2 * 3 * 4, "of the worlds of both"
    assert done.stderr.count("best policy") == 1 and (tmp_path / "rl" / "best" / "config.json").is_file()
    assert main([*arguments, "--out", str(tmp_path / "other"), "--processes", "3"]) == 2
    assert "--num-envs 4 does not divide among 3 processes" in capsys.readouterr().err
