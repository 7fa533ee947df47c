"""`vla doctor` on this machine, and on machines that something is wrong with."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import tyro

from bascule.commands import doctor
from bascule.commands.learning.train import Train
from bascule.main import COMMANDS, main
from vla.runtime import machine, rendering_backend


@pytest.fixture
def only(monkeypatch):
    """Doctor makes these checks and no others."""
    return lambda *checks: monkeypatch.setattr(doctor, "CHECKS", checks)


def test_this_machine_is_well(capsys):
    code = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert set(checks) == {
        "python", "versions", "gpu", "rendering", "lerobot plugin", "compiler", "disk", "memory", "loopback",
    }  # fmt: skip
    for name in ("python", "rendering", "lerobot plugin"):
        assert checks[name]["ok"], checks[name]
    assert "ms" in checks["loopback"]["found"]
    assert code == int(any(check["needed"] and not check["ok"] for check in checks.values()))


def test_what_is_needed_and_broken_is_named_with_a_remedy_and_fails(only, capsys, monkeypatch):
    only(doctor.disk, doctor.memory)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**28}))
    monkeypatch.setattr(machine, "free_memory", lambda: 2**29)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert said.count("BROKEN") == 2 and "0.2 GiB" in said and "runs/" in said and "--num-envs" in said


def test_a_broken_renderer_does_not_take_the_doctor_with_it(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    check = doctor.rendering()
    assert not check.ok and check.needed and "nonsense" in check.found and "leave MUJOCO_GL unset" in check.advice
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(rendering_backend, "_PROBE", "import os; os.abort()")
    check = doctor.rendering()
    assert not check.ok and "exit code" in check.found and "libegl1" in check.advice


def test_no_compiler_is_a_warning(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = doctor.compiler()
    assert not check.ok and not check.needed and "aoti" in check.advice


def test_a_plugin_that_lerobot_ignores_is_noticed(monkeypatch):
    import importlib.metadata

    def installed(*names):
        found = [type("Distribution", (), {"metadata": {"Name": name}}) for name in names]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)

    installed("numpy", "lerobot-policy-bascule")
    assert "hyphens" in doctor.plugin().found
    installed("numpy")
    check = doctor.plugin()
    assert not check.ok and not check.needed and "setup" in check.advice


def test_versions_that_do_not_fit_are_named(monkeypatch):
    import importlib.metadata

    lines = ["numpy<1.0", "no-such-thing-at-all", "rich", 'torch<1 ; extra == "dev"', 'nothing ; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = doctor.versions().found
    assert "numpy" in found and "<1.0" in found and "no-such-thing-at-all is missing" in found and "torch" in found
    assert "rich" not in found and "nothing" not in found.replace("no-such-thing", "")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["rich"])
    assert doctor.versions().ok


def test_a_check_that_fails_itself_is_a_finding(only, capsys):
    def gpu():
        raise RuntimeError("driver gone")

    only(gpu)
    assert main(["doctor"]) == 1
    assert "driver gone" in capsys.readouterr().out


def test_doctor_starts_without_torch():
    code = "import sys; import bascule.commands.doctor as _; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_the_doctor_advises_is_accepted(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**29)
    advice = doctor.memory().advice
    commands = re.findall(r"`vla ([^`]+)`", advice)
    assert commands == ["train --stream True"]
    for words in map(shlex.split, commands):
        command = tyro.cli(COMMANDS[words[0]], args=[*words[1:], "--dataset", "x"])
        assert isinstance(command, Train) and command.stream is True


def test_a_folder_that_cannot_be_trained_on_fails_the_doctor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert main(["doctor", "--dataset", str(tmp_path)]) == 1
    assert "is not a LeRobotDataset folder" in capsys.readouterr().out
