"""`vla eval --robustness`: every cell on the same scenes, kept as it goes; a table, a page and the worst failures."""

import json

import numpy as np
import pytest
from PIL import Image

from bascule.experiments.robustness.cells import PLAIN, Setting, Table
from bascule.main import main
from bascule.report.runs import rows_of
from vla.core.types import ActionSpec
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Stats

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)
SMALL = ["--episodes", "2", "--num-envs", "2", "--workers", "1"]
CELLS = ["--axes", "texture", "instruction", "--severities", "1"]
NAMES = ["plain-0", "swapped-instruction-0", "texture-1", "instruction-1"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A checkpoint of random weights."""
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    config = VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32), chunk_size=8)
    folder = tmp_path_factory.mktemp("ckpt") / "policy"
    VLA.build(config, stats=stats, action_spec=SPEC, cameras=("front", "wrist")).save(folder)
    return folder


@pytest.fixture(scope="module")
def finished(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    words = ["eval", str(policy), "--robustness", *CELLS, *SMALL, "--out", str(out)]
    assert main([*words, "--json", str(out.parent / "result.json")]) == 0
    return out, words


def said(out, name):
    """The instruction of a cell's first scene."""
    with Image.open(out / "robustness" / f"{name}.png") as image:
        return image.text["instruction"]


def test_every_cell_is_counted_on_the_same_scenes(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads((out.parent / "result.json").read_text())
    assert {"successes", "per_task", "controls", "commit", "machine", "command"} <= report.keys()
    assert report["episodes"] == 2 and report["controls"]["swapped_instruction"]["episodes"] == 2
    found = [(cell["axis"], cell["severity"]) for cell in report["robustness"]["cells"]]
    assert found == [("plain", 0), ("swapped instruction", 0), ("texture", 1), ("instruction", 1)]
    rows = [json.loads((out / "robustness" / f"{name}.json").read_text()) for name in NAMES]
    assert all(row["seeds"] == [5_000_000, 5_000_001] and len(row["outcomes"]) == 2 for row in rows)
    # the scene is the same: another table, the same words; and other words for the same scene
    assert said(out, "texture-1") == said(out, "plain-0") != said(out, "instruction-1")
    counts = [(row.arm, row.case, row.n) for row in rows_of(out / "report.json", report)[0]]
    assert ("report, severity 1", "texture", 2) in counts and ("report", None, 2) in counts


def test_the_page_shows_the_table_and_the_worst_failures(finished):
    out, _ = finished
    html = (out / "report.html").read_text()
    failures = json.loads((out / "report.json").read_text())["robustness"]["failures"]
    assert len(failures) >= 3 and {"plain", "texture", "instruction"} >= {one["axis"] for one in failures}
    assert html.count('src="data:image/png;base64,') == len(failures)
    for shown in ("severity 1", "swapped instruction", "0/2", "mean of the axes", failures[0]["instruction"]):
        assert shown in html
    with Image.open(out / failures[0]["picture"]) as image:
        strip = np.asarray(image)
    first, last = strip[:, :168], strip[:, -168:]
    assert strip.shape == (84, 342, 3) and (first != last).any()


def test_mistakes_are_one_line(finished, policy, tmp_path, capsys):
    out, words = finished
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text("{}")
    capsys.readouterr()
    for wrong, message in (
        (words, "already holds a robustness report: resume it (--resume)"),
        ([*words, "--resume", "--episodes", "3"], "another --out"),
        ([*words[:-1], str(other)], "another report"),
        (["eval", str(policy), "--robustness", "--axes", "textre"], "did you mean 'texture'"),
        (["eval", str(policy), "--robustness", "--severities", "2"], "--severities must be at most 1"),
        (["eval", str(policy), "--robustness", "--severities", "0"], "no severity is above 0"),
        (["eval", str(policy), "--robustness", "--perturb", "light=1"], "give one of them"),
        (["eval", str(policy), "--axes", "light"], "--axes is for `vla eval --robustness`"),
        (["eval", str(policy), "--resume"], "--resume is for `vla eval --robustness`"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_another_policy_in_the_same_folder_is_noticed(policy, finished, tmp_path):
    out, _ = finished
    setting = Setting(str(policy), episodes=2)
    with Table(setting, out / "robustness") as table:
        kept = table.row(PLAIN)
    changed = policy / "config.json"
    before = changed.read_bytes()
    changed.write_bytes(before + b"\n")
    try:
        with Table(setting, out / "robustness") as table, pytest.raises(ValueError, match="other weights"):
            table.row(PLAIN)
        # a row of a version that did not look at the weights counts
        (tmp_path / "plain-0.json").write_text(json.dumps(kept | {"asked": _without_weights(kept["asked"])}))
        with Table(setting, tmp_path) as table:
            assert table.row(PLAIN)["outcomes"] == kept["outcomes"]
    finally:
        changed.write_bytes(before)


def _without_weights(asked):
    return {name: value for name, value in asked.items() if name != "weights"}
