"""`vla pretrain`: both kinds of backbone, stopping and resuming, and what is refused."""

from __future__ import annotations

import pytest

from bascule import main as cli
from tests.vla.backbones.square_scenes import write_set
from vla.backbones.hub import load as load_backbone
from vla.backbones.small import create
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config


@pytest.fixture
def data(tmp_path):
    return write_set(tmp_path / "set", 300)  # 256 are held out


def run(capsys, *words):
    code = cli.main(["pretrain", *map(str, words)])
    return code, capsys.readouterr().err


def test_a_run_is_refused_resumed_and_finished(data, tmp_path, capsys):
    out = tmp_path / "out"
    told = ("--data", data, "--out", out, "--steps", 2)
    assert run(capsys, *told, "--resume")[0] == 0  # nothing to resume: it begins
    assert load_backbone(str(out)).num_queries == 8 and not (out / "state.pt").exists()
    code, error = run(capsys, *told)
    assert code == 2 and "already holds a backbone" in error
    code, error = run(capsys, *told, "--resume")
    assert code == 2 and "finished backbone" in error


def test_small_starts_from_words_and_eyes_of_its_own(data, tmp_path, capsys, monkeypatch):
    """With a table of words that needs no language model."""
    from tests.vla.backbones.test_small import spelling

    def new_small(folder, *, stem, image_size, seed, on_word):
        tokenizer = spelling()
        config = small_config(len(tokenizer), image_size=image_size, word_width=16)
        build_small(config, tokenizer, num_queries=8, seed=seed).save(folder)
        on_word(1, 1)

    monkeypatch.setattr(create, "new_small", new_small)
    code, error = run(
        capsys, "small", "--stem", "random", "--image-size", 64, "--data", data, "--out", tmp_path / "out", "--steps", 1
    )
    assert code == 0, error
    backbone = load_backbone(str(tmp_path / "out"))
    assert backbone.family_name == "bascule_small" and backbone.image_size == 64 and backbone.vlm.config.folded


def test_a_set_that_is_too_small_is_told(tmp_path, capsys):
    few = write_set(tmp_path / "few", 260)
    code, error = run(capsys, "--data", few, "--out", tmp_path / "out", "--steps", 1)
    assert code == 2 and "few has 4 scenes to learn from" in error and "256 held out" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("small", "--image-size", "100"), "multiple of 16"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("large",), "unknown choice"),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, capsys, words, told):
    code, error = run(capsys, *words, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and told in error
