"""Lists and the user's errors come before anything heavy is imported. `vla bench startup` has the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from vla.backbones.hub import MADE, REMOTE, SHIPPED
from vla.model.config import BACKBONE_NAMES, HEAD_NAMES
from vla.model.heads.registry import HEADS

ROOT = Path(__file__).resolve().parents[1]
LIGHT = (
    "--help",
    "--version",
    "list suites",
    "list tasks",
    "list recipes",
    "list backbones",
    "evall",
    "list nope",
    "eval nosuch",
    "eval expert --suite nosuch",
    "eval expert --episodes 0",
    "train --dataset nosuch",
    "train --dataset x --recipe nope",
    "train --dataset x --lr -1",
    "train --dataset x --n-action-steps 99",
    "train --dataset x --head nope",
    "train --dataset x --backbone nope",
    "train --nope",
    "rl nosuch --init x",
    "rl smoke --init nosuch",
    "serve nosuch",
    "serve policy --host 0.0.0.0",
    "serve policy --n-action-steps 99",
    "rl smoke --init policy --suite nosuch",
    "rl smoke --init policy --demos nosuch",
    "export nosuch --out x",
    "export policy --out policy",
    "train --dataset set --cameras nope",
    "convert policy --backbone nope",
    "control nosuch",
    "demos nosuch",
    "demos tabletop-pick --episodes 0",
    "view nosuch",
    "bench nosuch",
    "experiment nosuch",
    "experiment latency --policy nosuch",
    "report results x",
    "convert nosuch --backbone tiny",
    "pretrain --data nosuch",
    "lerobot nosuch x",
    "quickstart --demos 0",
    "doctor --nope",
)

# One process for all: a module that one of them imports is blamed on it, and stays out of the next one's account.
PROGRAM = """
import contextlib, io, json, sys
from bascule.main import main
heavy, seen, found = {'torch', 'transformers', 'mujoco', 'lerobot'}, set(), {}
for line in json.loads(sys.argv[1]):
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    found[line] = [code, sorted(heavy & set(sys.modules) - seen)]
    seen |= set(sys.modules)
print(json.dumps(found))
"""


def test_lists_and_errors_import_nothing_heavy(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps({"model": {"chunk_size": 8}, "checkpoint": 1}))
    (tmp_path / "set" / "meta").mkdir(parents=True)
    picture = {"dtype": "image", "shape": [84, 84, 3], "names": ["height", "width", "channels"]}
    info = {"codebase_version": "v3.0", "fps": 20, "total_frames": 1, "features": {"observation.images.front": picture}}
    (tmp_path / "set" / "meta" / "info.json").write_text(json.dumps(info))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(LIGHT)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {line: heavy for line, (_, heavy) in found.items() if heavy} == {}
    expected = {line: 0 if line.startswith(("--", "list ")) and line != "list nope" else 2 for line in LIGHT}
    assert {line: code for line, (code, _) in found.items()} == expected


def test_the_heads_named_in_the_configuration_are_those_there_are():
    assert set(HEAD_NAMES) <= set(HEADS)


def test_the_backbones_named_in_the_configuration_are_those_there_are():
    assert set(BACKBONE_NAMES) == {*SHIPPED, *MADE, *REMOTE}
