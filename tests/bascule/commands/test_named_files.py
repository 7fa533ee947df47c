"""Files that a command is given: an input that the output would replace, and one that cannot be read."""

import json

import pytest

from bascule.main import main
from vla.runtime.console import one_line


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps({"kept": name}))
    (tmp_path / "link.json").symlink_to("a.json")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("report compare a.json b.json --json a.json", "--json a.json"),
        ("report compare one=a.json two=b.json --json=a.json", "--json a.json"),
        ("report compare a.json b.json --json ./here/../a.json", "--json ./here/../a.json"),
        ("report compare a.json b.json --json link.json", "--json link.json"),
        ("check here --json new.html --page new.html", "--json new.html"),
        ("control a.json --replay --log a.json", "--log a.json"),
    ],
)
def test_what_is_read_is_not_written_over(results, capsys, words, flag):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"vla: error: {flag} is named twice in this command: write it to another file"
    assert (results / "a.json").read_text() == json.dumps({"kept": "a.json"}) and not (results / "new.html").exists()


def test_other_files_are_taken(results, capsys):
    """Past the check of names: the files are no evaluations, which is the next thing to be told."""
    assert main(["report", "compare", "a.json", "b.json", "--json", "c.json"]) == 2
    assert "is no result of `vla eval --json`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("demos tabletop-pick --out {}", "disk"),
        ("demos tabletop-pick --out {}", "disk/a/b"),
        ("train --dataset here --out {}", "disk"),
        ("quickstart --smoke --out {}", "disk/run"),
        ("report compare a.json b.json --json {}", "disk/new.json"),
    ],
)
def test_a_link_to_a_disk_that_is_unplugged_is_named(results, capsys, words, place):
    """Nothing is made where the disk was mounted: it would lie below it, unseen, when it is back."""
    (results / "disk").symlink_to(results / "mounts" / "gone")
    assert main(words.format(place).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"vla: error: {place} cannot be written: disk is a link to {results}/mounts/gone, which is not there: is its "
        "disk unplugged? Bring it back, or choose another place"
    )
    assert not (results / "mounts").exists()


def test_a_folder_in_place_of_a_file_is_told_without_numbers_of_the_system(results, capsys):
    assert main(["report", "compare", "here", "a.json"]) == 2
    assert capsys.readouterr().err.splitlines() == ["vla: error: 'here' is a folder, not a file"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError, "'x/y' may not be read or written by this user: change its permissions (chmod, chown)"),
        (IsADirectoryError, "'x/y' is a folder, not a file"),
        (FileExistsError, "'x/y' is there already: choose another place"),
        (NotADirectoryError, "'x/y' lies below a file, not in a folder"),
        (FileNotFoundError, "no such file or folder: 'x/y'"),
    ],
)
def test_errors_of_the_system_are_told_in_words(error, words):
    assert one_line(error(1, "as the system says", "x/y")) == words
    assert one_line(error("our own words")) == "our own words"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["eval", "zero", "--device", "cpu"], "--device changes nothing without --backend warp"),
        (["ask", "ws://127.0.0.1:9", "what?", "--embodiment", "left"], "--embodiment changes nothing with a server"),
        (["ask", "x", "what?", "--api-key", "k"], "--api-key changes nothing with x, which is no server"),
        (["report", "results", "--note", "fine"], "--note changes nothing of `report results`"),
    ],
)
def test_flags_that_would_not_be_heeded_are_refused(args, words, capsys):
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and line.endswith(": leave it out")
