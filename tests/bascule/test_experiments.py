"""`vla experiment`: every arm and seed through the real path, kept as it goes."""

import json

import pytest

from bascule.main import main

SMALL = ["--demos", "2", "--steps", "2", "--episodes", "2", "--num-envs", "2", "--seeds", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    arguments = ["experiment", "ablation", "--out", str(out), "--arms", "bridge", "no-language", *SMALL]
    arguments += ["--backbone", "tiny"]
    assert main([*arguments, "--json", str(out / "result.json")]) == 0
    return out, arguments


def test_it_reports_every_arm(finished):
    out, _ = finished
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"] == "ablation" and result["seeds"] == [0] and "commit" in result
    assert result["backbone"] == "tiny"
    assert list(result["arms"]) == ["bridge", "no-language"]
    for arm in result["arms"].values():
        assert arm["episodes"] == 2 and len(arm["wilson95"]) == 2 and arm["per_seed"]["0"] == [arm["successes"], 2]


def test_another_backbone_is_another_experiment(finished, capsys):
    _, arguments = finished
    assert main(arguments[:-2]) == 2
    told = capsys.readouterr().err
    assert "'backbone': 'tiny'" in told and "retired" not in told
    assert main([*arguments[:-1], "tiny-goals"]) == 2
    assert "note: the backbone tiny-goals is retired" in capsys.readouterr().err


def test_finished_runs_are_not_repeated(finished):
    out, arguments = finished
    file = out / "bridge-0.json"
    kept = json.loads(file.read_text()) | {"successes": 1}
    file.write_text(json.dumps(kept))
    assert main([*arguments, "--json", str(out / "again.json")]) == 0
    assert json.loads((out / "again.json").read_text())["arms"]["bridge"]["successes"] == 1


def test_other_settings_or_unknown_arms_are_refused(finished, capsys):
    out, arguments = finished
    assert main([*arguments, "--episodes", "3"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert main(["experiment", "ablation", "--arms", "brige", "--out", str(out)]) == 2
    assert "bridge" in capsys.readouterr().err
    assert main(["experiment", "ablatoin"]) == 2
    assert "ablation" in capsys.readouterr().err
