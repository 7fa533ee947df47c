"""`vla experiment robustness` and `vla eval --perturb`, through the command line."""

import json
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from bascule.main import main
from bascule.report.runs import rows_of

CELLS = ["--axes", "layout", "instruction", "--conditions", "1"]
SMALL = ["--episodes", "2", "--num-envs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("robustness")
    arguments = ["experiment", "robustness", "--policy", "expert", *CELLS, *SMALL, "--out", str(out)]
    assert main([*arguments, "--json", str(out / "result.json")]) == 0
    return out, arguments


def test_every_axis_and_severity_is_measured(finished):
    out, _ = finished
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"] == "robustness" and "commit" in result
    names = ["plain", "layout 1", "instruction 1"]
    assert list(result["arms"]) == names and list(result["controls"]) == ["plain"]
    for row in result["arms"].values():
        assert row["episodes"] == 2 and row["successes"] == 2 and len(row["wilson95"]) == 2 and row["kept"] == 1.0


def test_it_draws_a_chart_per_axis_and_the_worlds(finished):
    out, _ = finished
    root = ET.parse(out / "robustness.svg").getroot()
    text = "".join(root.itertext())
    assert "success under layout" in text and "success under instruction" in text
    charts = [child for child in root if child.tag.endswith("svg")]
    assert len(charts) == 2 and len(list(charts[0].iter("{http://www.w3.org/2000/svg}circle"))) == 2
    assert Image.open(out / "severities.png").size[0] == 2 * (4 * 84 + 8) + 8


def test_cells_are_kept_and_guarded(finished, capsys):
    out, arguments = finished
    file = out / "expert-layout-1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"successes": 1, "success_rate": 0.5}))
    assert main([*arguments, "--json", str(out / "again.json")]) == 0
    assert json.loads((out / "again.json").read_text())["arms"]["layout 1"]["successes"] == 1
    capsys.readouterr()
    for wrong, message in (
        ([*arguments, "--episodes", "4"], "another --out"),
        (["experiment", "robustness"], "--policy"),
        (["experiment", "robustness", "--policy", "expert", "--axes", "layuot"], "layout"),
        (["experiment", "robustness", "--policy", "expert", "--conditions", "3"], "0..1"),
        (["eval", "expert", "--perturb", "camra=1"], "camera"),
        (["eval", "expert", "--perturb", "camera=x"], "SEVERITY"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_evaluation_says_how_its_worlds_were_perturbed(tmp_path):
    file = tmp_path / "r.json"
    arguments = ["eval", "zero", "--perturb", "camera=0.5", "robot=0:1", "--episodes", "2", "--num-envs", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["perturb"]["camera"] == 0.5 and result["perturb"]["robot"] == [0.0, 1.0]
    assert result["perturb"]["light"] == 0.0 and result["episodes"] == 2


def test_arms_are_compared_over_their_seeds(tmp_path, capsys):
    words = ["experiment", "robustness", "--axes", "layout", "--conditions", "1", *SMALL, "--out", str(tmp_path)]
    policies = ["--policy", "good=expert", "good=zero", "bad=zero"]
    assert main([*words, *policies, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seeds"] == [0, 1]
    assert list(result["arms"]) == ["good: plain", "good: layout 1", "bad: plain", "bad: layout 1"]
    row = result["arms"]["good: layout 1"]
    assert row["per_seed"] == {"0": [2, 2], "1": [0, 2]} and (row["successes"], row["episodes"]) == (2, 4)
    counts, _ = rows_of(tmp_path / "result.json", result)
    claimed = [(one.arm, one.case, one.k, one.seed) for one in counts if one.arm.startswith("good")]
    assert claimed == [
        ("good: plain", None, 2, 0), ("good: plain", None, 0, 1),
        ("good: severity 1", "layout", 2, 0), ("good: severity 1", "layout", 0, 1),
    ]  # fmt: skip
    capsys.readouterr()
    assert main([*words, "--policy", "runs/a/best", "runs/b/best"]) == 2
    assert "two policies are called 'best': give them names, ARM=runs/a/best ARM=runs/b/best" in capsys.readouterr().err
