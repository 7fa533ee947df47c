"""`vla check` from the command line: exit codes, JSON, and a page that needs no other file."""

import json
import re

import numpy as np
import pytest

from bascule.main import main
from tests.vla.checking.recordings import FRONT, NAMES, Arm
from tests.vla.data.odd_recordings import train_arguments


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return Arm(episodes=4).write(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def black(tmp_path_factory):
    arm = Arm(episodes=4)
    arm.pictures[2][FRONT][:] = 0
    arm.texts = ["pick up <the> cube", "lift it"]
    return arm.write(tmp_path_factory.mktemp("black"))


def test_a_clean_recording_ends_with_0_and_a_verdict(clean, tmp_path, capsys):
    assert main(["check", str(clean), "--json", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith(f"{clean}: ready to train on: no fault found")
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["clean"] and report["episodes"] == 4 and len(report["per_episode"]) == 4
    assert all(finding["severity"] == "note" for finding in report["findings"])


def test_a_faulty_recording_ends_with_1_and_its_page_shows_the_episode(black, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["check", str(black), "--page", str(page), "--shown", "1"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^warning  camera_black: camera 'front' is black in episode 2 \(mean grey level 0", out, re.M)
    assert out.splitlines()[-1].endswith("look at it before training: 1 warning, 2 notes")
    html = page.read_text()
    assert 'id="episode-2"' in html and 'href="#episode-2"' in html and 'id="episode-1"' not in html
    assert "Look at it before training: 1 warning" in html and "pick up &lt;the&gt; cube" in html
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", html) and "<script" not in html
    assert html.count("data:image/webp") == 4, "two cameras of two episodes"
    assert html.count('aria-label="action joint_1, state"') == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/folder"], "no/such/folder does not exist"),
        (["{clean}", "--page", "page.txt"], "--page page.txt must end in .html"),
        (["{clean}", "--page", "{clean}/meta/check.html"], "is a part of the dataset"),
        (["{clean}", "--pictures", "-1"], "--pictures must be at least 0, got -1"),
        (["{clean}", "--backbone", "tny"], "did you mean 'tiny'"),
        (["{clean}", "--page="], "--page is empty"),
        (["{clean}", "--policy", "no/policy"], "there is no checkpoint at 'no/policy'"),
        (["{clean}", "--policy", "a", "--server", "b"], "give one of them"),
        (["{clean}", "--embodiment", "left"], "--embodiment left says which robot of --policy: name that"),
        (["{clean}", "--embodiment", "left", "--server", "b"], "--embodiment left goes to `vla serve`"),
        (["{clean}", "--shown", "3"], "--shown changes nothing without --page"),
        (["{clean}", "--compared", "3"], "--compared 3 counts episodes to play a policy beside: name --policy"),
    ],
)
def test_misuse_is_one_line(clean, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *(part.format(clean=clean) for part in arguments)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_training_warns_and_names_the_check(black, tmp_path, capsys):
    arm = Arm(episodes=2)
    for part in arm.pictures:
        part[FRONT][:] = 0
    level = np.quantile(np.concatenate(arm.action)[:, 2], 0.7)
    for action in arm.action:
        action[:, 2] = np.maximum(action[:, 2], level)
    root = arm.write(tmp_path / "data")
    assert main(["check", str(root)]) == 1
    told = re.search(r"camera_still: (.+)", capsys.readouterr().out)[1]
    assert main(train_arguments(tmp_path / "out", root)) == 0
    shown = capsys.readouterr()
    err = " ".join(shown.err.split())
    sentence = re.sub(r"all of \d+ frames", "all of N frames", told)
    assert sentence in re.sub(r"all of \d+ frames", "all of N frames", err), "in the same words"
    assert f"`vla check {root}` shows more" in err and err.count(sentence.split(" in all")[0]) == 1
    assert "warning: data: action component 'joint_3' is exactly" in err, "what only the check knows"
    # And the policy beside the recording: two steps have taught it nothing.
    page, data = tmp_path / "page.html", tmp_path / "check.json"
    command = ["check", str(root), "--policy", str(tmp_path / "out"), "--compared", "1"]
    assert main([*command, "--page", str(page), "--json", str(data), "--shown", "2"]) == 1
    assert re.search(r"policy_(lost|error): \S+ differs from the recorded actions by \S+% ", capsys.readouterr().out)
    told = json.loads(data.read_text())["open_loop"]
    assert told["episodes"] == [0] and told["per_phase"]["start"].keys() == set(NAMES)
    assert page.read_text().count('aria-label="action joint_1, state, policy"') == 1
