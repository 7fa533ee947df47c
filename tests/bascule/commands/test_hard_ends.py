"""Commands that are ended from outside, or called where and with what no command can work."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bascule import main as cli
from bascule.commands.control import Control
from bascule.commands.data import Demos
from bascule.commands.learning.pretrain import Pretrain
from bascule.commands.learning.quickstart import Quickstart
from bascule.commands.learning.rl import RL
from bascule.commands.learning.train import Train
from bascule.commands.measuring.evaluate import Eval
from bascule.commands.measuring.experiment import command_of
from vla.core.config import save_json
from vla.runtime import console

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "bascule.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

posix = pytest.mark.skipif(os.name != "posix", reason="signals and closed streams of POSIX")


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_command_ends_in_order_when_it_is_told_to(number, capsys):
    let_go = []

    def drive():
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal was lost")
        finally:
            os.kill(os.getpid(), number)  # a second one must not cut the end short
            let_go.append("robot")

    before = signal.signal(number, signal.SIG_DFL)  # tests that nohup started ignore SIGHUP
    try:
        assert console.run_guarded(drive, kept=lambda: "the robot was let go") == console.EXIT_INTERRUPTED
        assert let_go == ["robot"] and capsys.readouterr().err == "vla: interrupted; the robot was let go\n"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


@posix
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert console.run_guarded(lambda: os.kill(os.getpid(), signal.SIGHUP), kept=str) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_a_forked_child_ends_by_the_signal_itself():
    def body():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        return os.WTERMSIG(os.waitpid(child, 0)[1])

    assert console.run_guarded(body, kept=str) == signal.SIGTERM


@posix
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed, tmp_path):
    """The JSON holds the result alone: it has not become standard output."""
    words = shlex.join([*COMMAND, "report", "add", "x", "--claim", "c", "nothing.json"])
    done = subprocess.run(
        f"{words} {closed}", shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    listed = subprocess.run(f"{shlex.join([*COMMAND, 'list', 'recipes'])} {closed}", shell=True, cwd=tmp_path,
                            env=ENVIRONMENT, capture_output=True, text=True)  # fmt: skip
    assert (listed.returncode, listed.stderr) == (0, "")


@posix
def test_a_folder_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    words = f"mkdir {gone} && cd {gone} && rmdir {gone} && {shlex.join(COMMAND)} eval zero"
    done = subprocess.run(words, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "vla: error: the present folder no longer exists: cd to one that does\n"


@posix
def test_a_name_that_is_no_utf8_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demos", "tabletop-pick", "--out", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err == (
        "vla: error: the argument caf\\xe9 is no UTF-8 text: rename it, or call the command with LC_ALL=C.UTF-8\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_finds_no_room_is_out_of_memory(capsys):
    def load():
        raise ImportError("libtorch_python.so: failed to map segment from shared object")

    assert console.run_guarded(load, kept=str) == 2
    line = capsys.readouterr().err
    assert line.startswith("vla: error: out of memory: libtorch_python.so") and len(line.splitlines()) == 1
    with pytest.raises(ImportError):  # any other one is a defect of ours
        console.run_guarded(lambda: __import__("no_such_module_at_all"), kept=str)


KEPT = {
    "rl": (RL, {"recipe": "tabletop-pick", "init": Path("p")}, "last/config.json", "the last evaluated checkpoint"),
    "train": (Train, {"dataset": (Path("d"),)}, "config.json", "the last checkpoint stays"),
    "quickstart": (Quickstart, {}, "quickstart.json", "what finished stays"),
    "pretrain": (Pretrain, {}, "data/x", "finished sets of scenes"),
    "demos": (Demos, {"suite": "tabletop-pick"}, "recording/0.parquet", "finished episodes stay"),
    "experiment": (command_of("rl"), {}, "cell.json", "finished runs stay"),
    "eval": (Eval, {"policy": "p", "robustness": True}, "cell.json", "finished cells stay"),
}


@pytest.mark.parametrize("name", KEPT)
def test_only_what_is_there_is_said_to_be_kept(name, tmp_path):
    make, arguments, file, words = KEPT[name]
    command = make(**arguments, out=tmp_path / "run")
    assert command.kept() == "nothing is kept, it had only begun"
    (tmp_path / "run" / file).parent.mkdir(parents=True)
    (tmp_path / "run" / file).write_text("x")
    assert words in command.kept() and str(tmp_path / "run") in command.kept()


def test_a_log_that_was_not_begun_is_not_promised(tmp_path):
    command = Control("p", log=tmp_path / "log.jsonl")
    assert command.kept() == "the robot was let go"
    command.log.touch()
    assert command.kept() == f"the robot was let go; its log is in {command.log}"


def test_commands_that_a_message_recommends_can_be_pasted(tmp_path, capsys, monkeypatch):
    name = 'my "run"=1 ä; x'
    monkeypatch.chdir(tmp_path)
    save_json(tmp_path / name / "meta" / "info.json", {})
    said = Quickstart(out=Path(name)).kept()
    assert shlex.split(said.partition("; vla ")[2])[:4] == ["quickstart", "--resume", "--out", name]
    assert cli.main(["eval", name]) == 2
    recommended = capsys.readouterr().err.split("`")[1]
    assert shlex.split(recommended) == ["vla", "train", "--dataset", name]
