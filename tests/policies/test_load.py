"""Paths that are given for a checkpoint and are none: one line that says what is there instead."""

import pytest

from policies.load import checkpoint

OTHERS = ("expert", "zero")


def refusal(path, others=()):
    with pytest.raises(ValueError) as problem:
        checkpoint(path, others)
    return str(problem.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "runs" / "policy"
    good.mkdir(parents=True)
    (good / "config.json").write_text("{}")
    return tmp_path


def test_a_folder_that_exists_is_not_called_unknown(here):
    (here / "runs" / "policy" / "trainer").mkdir()
    (here / "empty").mkdir()
    for others in ((), OTHERS):
        told = "runs/policy/trainer is a folder without config.json, no checkpoint; did you mean 'runs/policy'?"
        assert refusal("runs/policy/trainer", others) == told
        assert refusal("empty", others) == "empty is a folder without config.json, no checkpoint"


def test_a_link_that_leads_nowhere_is_told(here):
    (here / "link").symlink_to("gone")
    assert refusal("link", OTHERS).startswith("there is no checkpoint 'link' (the link leads nowhere); ")
    (here / "runs" / "policy" / "config.json").unlink()
    assert "'link' (the link leads nowhere); `vla train` makes one" in refusal("link")


def test_a_folder_that_is_missing_is_told_with_what_there_is(here):
    told = refusal("runs/polcy", OTHERS)
    likely = "did you mean 'runs/policy'? (known: expert, runs/policy, zero)"
    assert told == f"there is no checkpoint 'runs/polcy'; {likely}"
