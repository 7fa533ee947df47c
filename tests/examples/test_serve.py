"""examples/serve: the container file and the unit of systemd name files, options and addresses that are there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bascule import main as cli
from policies.serving.server import PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, PolicySpec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "serve"


def instructions() -> dict[str, list[str]]:
    """The lines of the container file by their first word."""
    text = (FOLDER / "Containerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest)
    return found


class Still:
    spec = PolicySpec(ActionSpec(("x",), (-1.0,), (1.0,), 20.0))

    def reset(self, env_ids=None): ...

    def act(self, obs):
        return np.zeros((1, 1, 1), np.float32)


def test_the_container_holds_every_package_and_nothing_of_the_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {source for line in instructions()["COPY"] for source in line.split()[:-1]}
    assert copied >= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) | {"pyproject.toml"}
    assert all((ROOT / source).exists() for source in copied)
    allowed = {line[1:] for line in (FOLDER / "Containerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert allowed == copied
    extras = re.search(r"\.\[([\w,-]+)\]", instructions()["RUN"][0]).group(1).split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])


def test_the_health_check_passes_on_a_server_and_fails_without_one():
    arguments = json.loads(instructions()["HEALTHCHECK"][0].partition(" CMD ")[2])
    assert arguments[:2] == ["python", "-c"]

    def checked(port: int) -> int:
        code = arguments[2].replace(":8000/", f":{port}/")
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30).returncode

    with serve_in_thread(PolicyServer(Still(), port=0)) as server:
        assert checked(server.port) == 0
        port = server.port
    assert checked(port) != 0


@pytest.mark.parametrize("where", ["container", "systemd"])
def test_the_command_is_one_that_serve_takes(where, capsys, monkeypatch):
    """It gets as far as the folder, which is not there."""
    if where == "container":
        words = json.loads(instructions()["ENTRYPOINT"][0]) + json.loads(instructions()["CMD"][0])
    else:
        unit = (FOLDER / "bascule-serve.service").read_text()
        words = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.M).group(1))
        assert "BASCULE_API_KEY" in unit and "RestartPreventExitStatus=2" in unit
    assert words[0].endswith("vla") and words[1] == "serve" and words[-2:] == ["--host", "0.0.0.0"]
    monkeypatch.setenv("BASCULE_API_KEY", "SECRET")
    assert cli.main(words[1:]) == 2
    assert "vla: error: there is no checkpoint" in (told := capsys.readouterr().err) and f"'{words[2]}'" in told
