"""The command line from outside: help, and errors that are one line with the nearest name."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bascule import main as cli
from policies.load import checkpoint
from vla.core.config import save_json
from vla.runtime import console

ROOT = Path(__file__).resolve().parents[2]


def vla(*args, cwd=ROOT, **environment):
    """Run the command line in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "bascule.main", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_user_error(code, err, *words):
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_help_names_every_command():
    done = vla("--help")
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: vla {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["command 'trian'", "did you mean 'train'"]),
        (["demos", "tabletop-pikc"], ["suite 'tabletop-pikc'", "did you mean 'tabletop-pick'"]),
        (["view", "tabletop-pikc"], ["suite 'tabletop-pikc'", "did you mean 'tabletop-pick'"]),
        (["eval", "expert", "--suite", "tabletop-pikc"], ["did you mean 'tabletop-pick'"]),
        (["eval", "expret"], ["checkpoint 'expret'", "did you mean 'expert'"]),
        (["train", "--dataset", "x", "--recipe", "tabletp"], ["recipe 'tabletp'", "did you mean 'tabletop'"]),
        (["rl", "tabletop-pic", "--init", "x"], ["recipe 'tabletop-pic'", "did you mean 'tabletop-pick'"]),
        (["list", "suits"], ["did you mean 'suites'"]),
        (["serve", "no/such/policy"], ["no/such/policy"]),
        (["train", "--dataset", "no/such/data"], ["no/such/data"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] in cli.COMMANDS else "",
)
def test_wrong_names_get_one_line_with_the_nearest(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = cli.main(args)
    assert_user_error(code, capsys.readouterr().err, *words)


def test_the_exit_code_leaves_the_process(tmp_path):
    done = vla("eval", "expret", cwd=tmp_path)
    assert_user_error(done.returncode, done.stderr, "did you mean 'expert'")
    assert done.stdout == ""


def test_a_traceback_on_request(tmp_path):
    done = vla("eval", "expret", cwd=tmp_path, BASCULE_TRACEBACK="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "did you mean 'expert'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_explains_every_argument_and_shows_no_none(name, capsys):
    body = ast.parse(inspect.getsource(cli.COMMANDS[name])).body[0].body
    silent = [
        node.target.id
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert silent == []
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert f"usage: vla {name}" in shown and "None" not in shown


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_help_that_nobody_reads_to_its_end_is_no_error():
    command = f"{sys.executable} -m bascule.main train --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


USAGE = [
    ("train --datast x", "unknown option '--datast'; did you mean '--dataset'?"),
    ("train --dataset x --stesp=3", "unknown option '--stesp'; did you mean '--steps'?"),
    ("train --dataset x --qqqqqqqq", "unknown option '--qqqqqqqq'"),
    ("demos --foo", "unknown option '--foo'"),
    ("train", "--dataset is required"),
    ("rl", "RECIPE and --init are required"),
    ("train --dataset", "--dataset: a value is missing"),
    ("control", "POLICY is required"),
    ("train --dataset x --steps x", "--steps: invalid int value 'x'"),
    ("control p --hz x", "--hz: invalid float value 'x'"),
    ("control p --hz", "--hz: a value is missing (FLOAT)"),
    ("control p --velocity dx", "--velocity: expected pairs, [STR FLOAT [STR FLOAT ...]]"),
    (
        "control p --join blnd",
        "--join: unknown choice 'blnd'; did you mean 'blend'? (known: switch, blend, ensemble, rtc)",
    ),
    ("eval expert extra", "unexpected argument 'extra'"),
]


@pytest.mark.parametrize(("args", "words"), USAGE, ids=[args for args, _ in USAGE])
def test_a_usage_error_is_one_line(args, words, capsys):
    code, name = cli.main(args.split()), args.split()[0]
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    assert shown.err == f"vla {name}: error: {words}; see vla {name} --help\n"


def test_a_tyro_without_the_hook_gives_one_line_too(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    for args, word in (("control p --join blnd", "'blnd'"), ("train --datast x", "--datast")):
        code = cli.main(args.split())
        assert_user_error(code, capsys.readouterr().err, f"vla {args.split()[0]}: error: ", word, "--help")


def test_checkpoint_names_the_nearest_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_json(tmp_path / "runs/first/policy/config.json", {})
    assert checkpoint("runs/first/policy") == Path("runs/first/policy")
    with pytest.raises(ValueError, match="did you mean 'runs/first/policy'"):
        checkpoint("runs/frist/policy")


@pytest.mark.parametrize(
    ("command", "rest"),
    [("lerobot", ["out"]), ("eval", []), ("serve", []), ("control", []), ("export", ["--out", "out"])],
)
def test_a_dataset_in_place_of_a_policy_is_told_what_makes_one(command, rest, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_json(tmp_path / "demos" / "meta" / "info.json", {})
    assert cli.main([command, "demos", *rest]) == 2
    line = "vla: error: demos is a data set, not a checkpoint: `vla train --dataset demos` makes a policy of it\n"
    assert capsys.readouterr().err == line


def test_ctrl_c_says_what_was_kept(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert console.run_guarded(interrupted, kept=lambda: "finished episodes stay in runs/x") == 130
    assert capsys.readouterr().err == "vla: interrupted; finished episodes stay in runs/x\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("width 7\nis not 8"), "width 7 is not 8"),
        (FileNotFoundError(2, "No such file", "runs/x"), "no such file or folder: 'runs/x'"),
        (FloatingPointError("the model's action is not finite"), "the model's action is not finite"),
        (ConnectionRefusedError("nothing listens at ws://localhost:8000"), "nothing listens at ws://localhost:8000"),
    ],
)
def test_user_errors_are_one_line(error, line, capsys):
    def fail():
        raise error

    assert console.run_guarded(fail, kept=str) == 2
    assert capsys.readouterr().err == f"vla: error: {line}\n"


def test_what_a_user_said_does_not_bury_the_remedy(capsys):
    def fail():
        raise ValueError(f"there is no task '{'reach.' * 2500}'; it has: pick")

    assert console.run_guarded(fail, kept=str) == 2
    line = capsys.readouterr().err
    assert line.startswith("vla: error: there is no task 'reach.") and line.endswith("'; it has: pick\n")
    assert "..." in line and len(line) < 300


@pytest.mark.parametrize("out", [("--out", ""), ("--out=",), ("--out", " ")])
def test_an_output_without_a_name_is_not_this_folder(out, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demos", "tabletop-pick", "--episodes", "1", *out]) == 2
    assert_user_error(2, capsys.readouterr().err, "--out is empty: name what is to be written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--dataset", "--init", "--teacher", "--talk", "--known", "--backbone"])
def test_a_folder_without_a_name_is_not_this_folder(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "x", ""] if flag == "--dataset" else ["--dataset", "x", flag, ""]
    assert cli.main(["train", *given]) == 2
    assert_user_error(2, capsys.readouterr().err, f"{flag} is empty: name a file or folder")


def test_defects_of_ours_keep_their_traceback():
    def defect():
        raise KeyError("x")

    with pytest.raises(KeyError):
        console.run_guarded(defect, kept=str)


def test_list_shows_what_exists(capsys):
    there = {"suites": "tabletop-pick", "tasks": "pick", "recipes": "vla rl", "backbones": "retired"}
    for what, expected in there.items():
        assert cli.main(["list", what]) == 0
        assert expected in capsys.readouterr().out


def test_progress_and_tables_survive_markup_in_names(capsys):
    with console.progress("demos", 3) as update:
        update(2, "[red]x")
    console.stdout().print(console.table("t", ("a", "b"), [("[bold]x", 1), ("y", 2.5)]))
    assert "[bold]x" in capsys.readouterr().out


def test_the_interpreter_ends_without_a_last_collection_of_garbage():
    """It takes a second of CPU after torch, ten on a busy machine, in which a server does not end."""
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"  # runs last
        "from bascule import main as cli; cli.main(['list', 'recipes']); cli.main(['list', 'recipes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("True\n"), done.stderr
