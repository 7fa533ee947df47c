"""`vla experiment NAME`: every experiment is a command with flags of its own."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from itertools import pairwise

import pytest

from bascule.commands.measuring.experiment import Experiment, command_of
from bascule.experiments.registry import EXPERIMENTS
from bascule.main import main


def told(capsys, *args):
    """(exit code, what was printed to both streams)"""
    try:
        code = main(["experiment", *args])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_the_list_names_each(capsys):
    code, shown = told(capsys, "--help")
    assert code == 0
    for name, entry in EXPERIMENTS.items():
        assert f"  {name} " in shown and entry.about in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_help_has_its_own_flags_and_explains_each(name, capsys):
    code, shown = told(capsys, name, "--help")
    assert code == 0 and f"usage: vla experiment {name}" in shown and "None" not in shown
    own = {field.name for field in fields(EXPERIMENTS[name].config)}
    every = {field.name for entry in EXPERIMENTS.values() for field in fields(entry.config)}
    for flag in ("out", "json", *own):
        assert f"--{flag.replace('_', '-')} " in shown
    for flag in every - own - {"config"}:
        assert f"--{flag.replace('_', '-')} " not in shown
    body = ast.parse(inspect.getsource(EXPERIMENTS[name].config)).body[0].body
    silent = [
        node.target.id
        for node, after in pairwise([*body, None])
        if isinstance(node, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "vla experiment: error: NAME is required"),
        (["ablatoin"], "did you mean 'ablation'"),
        (["--out", "x", "rl"], "NAME comes first"),
        (["rl", "--polciy", "x"], "vla experiment rl: error: unknown option '--polciy'"),
        (["xyz", "--axes", "light"], "unknown option '--axes'"),
        (["rl", "--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown = told(capsys, *args)
    assert code == 2 and words in shown and len(shown.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_become_the_configuration():
    command = command_of("words")
    assert issubclass(command, Experiment) and command.name == "words"
    assert command().config == EXPERIMENTS["words"].config()
