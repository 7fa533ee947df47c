"""The quickstart's stages: kept one by one, killed after and inside each, failed, resumed, and shown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bascule import main as cli
from bascule.quickstart import job as quickstart
from bascule.quickstart.config import QuickstartConfig
from bascule.quickstart.serve import policy_server
from bascule.quickstart.stages import Outcome, Result, Stage, merged_parts, read_outcome, run_stages, write_outcome
from vla.core.checkpoint import weights_digest
from vla.core.config import save_json

NAMES = ("one", "two", "three", "four")


class Job:
    """Four stages; `breaks` maps a stage to what it raises, before or after its work."""

    def __init__(self, out):
        self.out, self.breaks, self.ran, self.reports = out, {}, [], []

    def run(self):
        self.ran = []
        return run_stages(
            [
                Stage("one", lambda: self.work("one")),
                Stage("two", lambda: self.work("two"), needs=("one",)),
                Stage("three", lambda: self.work("three"), needs=("one",)),
                Stage("four", lambda: self.work("four"), needs=("two",)),
            ],
            self.out,
            on_end=lambda outcomes: self.reports.append({o.name: o.state for o in outcomes}),
        )

    def work(self, name):
        self.ran.append(name)
        if name in self.breaks:
            raise self.breaks[name]
        number = NAMES.index(name)
        film = {"caption": name, "success": True, "frames": np.full((2, 4, 4, 3), number, np.uint8)}
        return Result({"count": number}, {"curves": {name: [0.1 * number]}, name: number}, [film])


def shown(outcomes):
    films = [(film["caption"], film["frames"].tolist()) for o in outcomes for film in o.result.films]
    rows = [{k: v for k, v in o.row().items() if k != "seconds"} for o in outcomes]
    return json.loads(json.dumps([rows, merged_parts(outcomes), films]))


@pytest.mark.parametrize("stopped", NAMES)
def test_a_run_stopped_inside_any_stage_comes_to_the_same(tmp_path, stopped):
    whole = shown(Job(tmp_path / "whole").run())
    job = Job(tmp_path / "cut")
    job.breaks = {stopped: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        job.run()
    done = NAMES[: NAMES.index(stopped)]
    assert [name for name in NAMES if read_outcome(tmp_path / "cut", name).state == "done"] == list(done)
    job.breaks = {}
    assert shown(job.run()) == whole and job.ran == list(NAMES[len(done) :])
    assert shown(job.run()) == whole and job.ran == []  # nothing left to do, and nothing changed


def test_a_failed_stage_is_told_takes_nothing_with_it_and_is_tried_again(tmp_path, capsys):
    job = Job(tmp_path)
    job.breaks = {"two": ValueError("no such\nthing"), "three": ZeroDivisionError("by zero")}
    outcomes = job.run()
    assert [o.state for o in outcomes] == ["done", "failed", "failed", "not run"]
    assert [o.reason for o in outcomes] == ["", "no such thing", "ZeroDivisionError: by zero", "it needs two"]
    assert job.reports[0] == dict.fromkeys(NAMES, "not run") | {"one": "done"}  # after every stage
    assert len(job.reports) == 4 and outcomes[0].result.parts["one"] == 0
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "Traceback" in error  # a defect of ours keeps its traceback
    assert "no such" in (tmp_path / "stages/two.error.txt").read_text()
    job.breaks = {}
    assert [o.state for o in job.run()] == ["done"] * 4 and job.ran == ["two", "three", "four"]


def test_what_a_stage_hands_on_is_made_again_while_somebody_needs_it(tmp_path):
    ran, demos = [], tmp_path / "demos"

    def run(breaks):
        def imitate():
            ran.append("imitate")
            if breaks:
                raise KeyboardInterrupt
            return Result()

        record = Stage("record", lambda: ran.append("record") or demos.mkdir() or Result(), hands_on=demos)
        run_stages([record, Stage("imitate", imitate, needs=("record",))], tmp_path, on_end=lambda outcomes: None)

    with pytest.raises(KeyboardInterrupt):
        run(breaks=True)
    demos.rmdir()
    run(breaks=False)
    demos.rmdir()
    run(breaks=False)  # nobody needs it any more
    assert ran == ["record", "imitate"] * 2


def test_a_stage_counts_from_its_json_file_on(tmp_path, monkeypatch):
    def cut(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bascule.quickstart.stages.save_json", cut)
    with pytest.raises(OSError, match="No space"):
        Job(tmp_path).run()
    assert (tmp_path / "stages/one.npz").exists() and read_outcome(tmp_path, "one").state == "not run"


def test_what_a_stage_found_is_read_back_exactly(tmp_path):
    film = {
        "caption": "a",
        "success": False,
        "wrong_object": True,
        "stage": "rl",
        "frames": np.ones((3, 2, 2, 3), np.uint8),
    }
    kept = Outcome("evaluate RL", "done", 2.5, "", 1.25, Result({"x": 1}, {"rl": {"rate": 0.1 + 0.2}}, [film]))
    write_outcome(tmp_path, kept)
    found = read_outcome(tmp_path, "evaluate RL")
    assert (found.result.films[0].pop("frames") == film.pop("frames")).all() and found == kept


# ---------------------------------------------------------------------- the quickstart with stages that cost nothing
@pytest.fixture
def tiny(monkeypatch):
    """The real quickstart, its stages replaced; the dict says which of them breaks how."""
    breaks, names = {}, ("backbone", "demonstrations", "imitation", "serve")

    def work(config, name):
        if name in breaks:
            raise breaks[name]
        return Result({"demos": config.demos})

    def stages(config, out, worlds):
        return [Stage(name, lambda name=name: work(config, name)) for name in names]

    monkeypatch.setattr(quickstart, "_stages", stages)
    monkeypatch.setattr(quickstart, "_settle", lambda config, threads: None)
    return breaks


def command(capsys, *args):
    code = cli.main(["quickstart", *args])
    return code, capsys.readouterr().err


def test_resume_goes_on_as_the_run_began(tiny, tmp_path, capsys):
    out = str(tmp_path / "run")
    tiny["imitation"] = ValueError("the disk is full")
    code, error = command(capsys, "--out", out, "--demos", "7", "--resume")  # nothing to resume: it begins
    assert code == 1 and "imitation: the disk is full; vla quickstart --resume" in error
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [s["state"] for s in report["stages"]] == ["done", "done", "failed", "done"] and not report["complete"]
    assert "the disk is full" in (tmp_path / "run/report.html").read_text()

    code, error = command(capsys, "--out", out)
    assert code == 2 and len(error.splitlines()) == 1 and "--resume" in error and "--out" in error
    code, error = command(capsys, "--out", out, "--resume", "--demos", "20")  # the default, but asked for
    assert code == 2 and "was begun with --demos 7, not 20" in error and len(error.splitlines()) == 1
    code, error = command(capsys, "--out", out, "--resume", "--smoke")
    assert code == 2 and "was begun with" in error

    tiny.clear()
    assert command(capsys, "--out", out, "--resume", "--workers", "1")[0] == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["complete"] and [s["demos"] for s in report["stages"]] == [7] * 4
    before = (tmp_path / "run/report.json").read_text()
    assert command(capsys, "--out", out, "--resume")[0] == 0
    assert json.loads(before) == json.loads((tmp_path / "run/report.json").read_text())


@pytest.mark.parametrize(("recipe", "before"), [("tabletop", "tiny-goals"), ("tabletop-robust", "small")])
def test_a_run_keeps_the_backbone_that_it_was_begun_on(tiny, tmp_path, capsys, recipe, before):
    """Runs name it since the default is another one; an earlier run has what was its recipe's then."""
    out, told = tmp_path / "run", ("--out", str(tmp_path / "run"), "--recipe", recipe)
    assert command(capsys, *told)[0] == 0
    stored = json.loads((out / "quickstart.json").read_text())
    assert stored["config"]["backbone"] == json.loads((out / "report.json").read_text())["backbone"] == "small"
    stored["config"]["backbone"] = None
    (out / "quickstart.json").write_text(json.dumps(stored))
    assert command(capsys, *told, "--resume")[0] == 0
    assert quickstart.quickstart(QuickstartConfig(out=str(out), recipe=recipe), resume=True)["backbone"] == before
    code, error = command(capsys, *told, "--resume", "--backbone", "smollm2-135m")
    assert code == 2 and f"was begun with --backbone {before}, not smollm2-135m" in error


def test_a_suite_file_that_was_edited_is_not_gone_on_with(tiny, tmp_path, capsys):
    file, out = tmp_path / "k.toml", ("--out", str(tmp_path / "run"))
    text = 'description = "lift"\nscene = "counter"\ntasks = ["lift"]\nobjects_per_episode = {}\n'
    file.write_text(text.format(2) + "plates_per_episode = 1\nhorizon = 60\neval_seed0 = 5_000_000\n")
    assert command(capsys, *out, "--suite", str(file))[0] == 0
    assert command(capsys, *out, "--resume")[0] == 0
    file.write_text(file.read_text().replace("objects_per_episode = 2", "objects_per_episode = 3"))
    code, error = command(capsys, *out, "--resume")
    assert code == 2 and "begun in other scenes than its suite file describes now" in error


def test_a_backbone_that_is_retired_is_used_and_told(tiny, tmp_path, capsys):
    code, error = command(capsys, "--out", str(tmp_path / "run"), "--backbone", "tiny")
    assert code == 0 and "note: the backbone tiny is retired" in error and "use small, the default" in error
    assert "retired" not in command(capsys, "--out", str(tmp_path / "run"), "--resume")[1]


def test_what_is_asked_for_beside_smoke_is_done(tiny, tmp_path, capsys):
    assert command(capsys, "--out", str(tmp_path / "a"), "--smoke", "--demos", "5")[0] == 0
    config = json.loads((tmp_path / "a/quickstart.json").read_text())["config"]
    assert (config["demos"], config["imitation_steps"], config["rl_seconds"]) == (5, 10, None)
    assert command(capsys, "--out", str(tmp_path / "a"), "--resume", "--smoke")[0] == 0


def test_a_folder_of_an_older_quickstart_and_a_wrong_suite_are_refused(tiny, tmp_path, capsys):
    (tmp_path / "old/imitation").mkdir(parents=True)
    for more in ((), ("--resume",)):
        code, error = command(capsys, "--out", str(tmp_path / "old"), *more)
        assert code == 2 and "cannot be resumed (imitation): choose another --out" in error
    code, error = command(capsys, "--out", str(tmp_path / "new"), "--suite", "tabletop-pikc")
    assert code == 2 and "did you mean 'tabletop-pick'" in error and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "args",
    [("--eval-episodes", "0"), ("--served-episodes", "-1"), ("--workers", "0"), ("--seed", "50"), ("--seed", "-1"),
     ("--rl-seconds", "0"), ("--rl-seconds", "nan"), ("--rl-updates", "0"), ("--demos", "0"),
     ("--workers", "1000000"), ("--eval-episodes", "1000000000000"), ("--rl-seconds", "inf")],
    ids=" ".join,
)  # fmt: skip
def test_budgets_that_cannot_be_are_told_before_the_first_stage(tiny, tmp_path, capsys, args):
    code, error = command(capsys, "--out", str(tmp_path / "x"), *args)
    assert code == 2 and " ".join(args) in error and "give" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_ctrl_c_and_sigterm_end_in_good_order_and_are_resumed(tiny, tmp_path, capsys, monkeypatch):
    tiny["imitation"] = KeyboardInterrupt()
    code, error = command(capsys, "--out", str(tmp_path))
    assert code == 130 and "--resume" in error
    assert json.loads((tmp_path / "report.json").read_text())["stages"][2]["state"] == "not run"
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(quickstart, "_settle", lambda config, threads: os.kill(os.getpid(), signal.SIGTERM))
    assert command(capsys, "--out", str(tmp_path), "--resume")[0] == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_threads_follow_the_idle_cores_and_a_resumed_stage_keeps_its_count(tiny, tmp_path, monkeypatch):
    idle, used = iter([2.0, 0.1, 1.7, 0.4, 3.9]), []
    monkeypatch.setattr(quickstart, "idle_cores", lambda: next(idle))
    monkeypatch.setattr(quickstart, "_settle", lambda config, threads: used.append(threads))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tiny["imitation"] = ValueError("the disk is full")
    config = QuickstartConfig(out=str(tmp_path / "run"))
    quickstart.quickstart(config)
    assert used == [2, 1, 2, 1]
    del tiny["imitation"], used[:]
    quickstart.quickstart(config, resume=True)
    assert used == [2]  # imitation again, as it began, though there are four idle cores by now
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    used.clear()
    quickstart.quickstart(QuickstartConfig(out=str(tmp_path / "other")))
    assert used == [1, 1, 1, 1]


def test_library_calls_resume_too(tiny, tmp_path):
    config = QuickstartConfig(out=str(tmp_path), smoke=True)
    assert quickstart.quickstart(config)["complete"] and quickstart.quickstart(config, resume=True)["complete"]
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        quickstart.quickstart(QuickstartConfig(out=str(tmp_path), smoke=True, seed=1), resume=True)


# ---------------------------------------------------------------------- the policy server
SERVER = "import signal, sys, time\n"
LISTENS = "print('serving x at ws://127.0.0.1:1 (Ctrl-C ends)', flush=True)\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def program(code):
    return [sys.executable, "-c", SERVER + code]


def test_a_server_that_dies_says_its_last_line(tmp_path):
    def serve(code, timeout_s=60.0):
        return policy_server(tmp_path, tmp_path / "log", command=program(code), listen_timeout_s=timeout_s)

    with pytest.raises(ConnectionError, match=r"ended before it listened \(exit code 3\): vla: error: no weights"):
        with serve("print('vla: error: no weights', file=sys.stderr); sys.exit(3)"):
            raise AssertionError("it never listened")
    with pytest.raises(TimeoutError, match=r"did not listen within 0.5 s"), serve("time.sleep(60)", 0.5):
        pass
    with pytest.raises(ConnectionError, match=r"ended \(exit code 4\): out of memory"):
        with serve(LISTENS + "print('out of memory', file=sys.stderr); sys.exit(4)") as uri:
            assert uri == "ws://127.0.0.1:1"
            time.sleep(1.0)
            raise ConnectionResetError("lost")  # as its client would say


def test_a_server_that_does_not_want_to_end_is_killed(tmp_path, monkeypatch):
    code = STUBBORN + "import os; print(os.getpid(), file=sys.stderr, flush=True)\n" + LISTENS + "time.sleep(600)"
    from bascule.quickstart import serve as quickstart_serving

    monkeypatch.setattr(quickstart_serving.end, "__kwdefaults__", {"patience_s": 0.3})
    with policy_server(tmp_path, tmp_path / "log", command=program(code)):
        pid = int((tmp_path / "log").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_ends_when_who_started_it_was_killed(tmp_path):
    root = Path(__file__).resolve().parents[2]
    child = (
        "import bascule.main, time, os\n"
        f"note = open({str(tmp_path / 'pid')!r}, 'w')\n"
        "bascule.main.main = lambda: (note.write(str(os.getpid())), note.flush(), time.sleep(600))\n"
        "from bascule.quickstart.serve import serve_until_orphaned; serve_until_orphaned()"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)\ntime.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", parent], cwd=root)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    starter.kill()
    starter.wait()
    wait_for(lambda: not alive(pid))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_result_that_is_gone_is_named_and_nothing_is_played_again(tmp_path):
    made, ran = tmp_path / "policy", []

    def work():
        ran.append(1)
        made.mkdir()
        return Result()

    stages = [Stage("learn", work, makes=made), Stage("judge", lambda: Result(), needs=("learn",))]
    for _ in range(2):
        run_stages(stages, tmp_path, on_end=lambda outcomes: None)
    made.rmdir()
    outcome = read_outcome(tmp_path, "learn")
    made.mkdir(exist_ok=True)
    save_json(made / "config.json", {"checkpoint": {"files": {"model.safetensors": "0"}}})
    outcome.made = weights_digest(made)
    write_outcome(tmp_path, outcome)
    run_stages(stages, tmp_path, on_end=lambda outcomes: None)
    save_json(made / "config.json", {"checkpoint": {"files": {"model.safetensors": "1"}}})
    with pytest.raises(ValueError, match=f"{made} is not what the finished stage 'learn' made"):
        run_stages(stages, tmp_path, on_end=lambda outcomes: None)
    shutil.rmtree(made)
    with pytest.raises(ValueError, match=f"{made} is gone, which the finished stage 'learn' made .* another --out"):
        run_stages(stages, tmp_path, on_end=lambda outcomes: None)
    assert ran == [1]


def test_a_backbone_that_is_none_is_one_line_and_leaves_no_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["quickstart", "--smoke", "--backbone", "tiny-goal", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vla: error: unknown backbone 'tiny-goal'; did you mean 'tiny-goals'?")
    assert not (out / "quickstart.json").exists()
