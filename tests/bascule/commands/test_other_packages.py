"""Packages of the user's own that have the names of ours, in PYTHONPATH or in the present folder."""

import os
import subprocess
import sys

import pytest

from vla.data.lerobot_dataset import load_dataset


@pytest.fixture
def workspace(tmp_path):
    """A robot's workspace with packages `envs` and `rl` and a module `policies` that are none of ours."""
    for name in ("envs/__init__.py", "rl/__init__.py", "policies.py", "vla/__init__.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("raise ImportError('the wrong package')\n")
    return tmp_path / "src"


def called(words, folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "bascule", *words.split()], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", ["list recipes", "list suites"])
def test_other_packages_in_pythonpath_are_not_taken_for_ours(workspace, words):
    done = called(words, workspace.parent, PYTHONPATH=str(workspace))
    assert (done.returncode, done.stderr) == (0, "") and "tabletop-pick" in done.stdout


def test_worker_processes_have_our_packages_too(workspace):
    """Started in the user's folder, which `python -m` searches first."""
    done = called("demos tabletop-pick --episodes 1 --workers 1 --image-size 16 --out new", workspace)
    assert done.returncode == 0, done.stderr
    assert len(load_dataset(workspace / "new").episodes) == 1
