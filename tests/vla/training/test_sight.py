"""The last part of pre-training: whether what is named is in sight, learnt on a backbone that stays as it is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.vla.backbones.square_scenes import write_set
from tests.vla.backbones.test_small import seen, spelling
from vla.backbones.hub import load as load_backbone
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.training.grounding.pretrain import pretrain
from vla.training.grounding.sight import Sentences, fit_sight, set_threshold
from vla.training.train_config import PretrainConfig


@pytest.fixture
def small():
    tokenizer = spelling()
    config = small_config(len(tokenizer), image_size=64, word_width=16)
    return build_small(config, tokenizer, num_queries=8, seed=0).eval()


def sentences(backbone, shift, count, seed):
    """Sentences whose pointers give no hint, and whose naming query differs by `shift`."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, 8, backbone.width, generator=generator)
    queries[:, backbone.naming[0], :20] += shift
    return Sentences(queries.half(), torch.full((count, 8, backbone.point_dim), 0.5))


def test_the_queries_tell_what_the_pointers_do_not(small):
    there, gone = sentences(small, 1.0, 600, 1), sentences(small, -1.0, 600, 2)
    assert (there.confidence(small) == 0.5).all()  # without a sight: the visibility
    fit_sight(small, there, gone, seed=0)
    figures = set_threshold(small, sentences(small, 1.0, 300, 3), sentences(small, -1.0, 300, 4))
    assert figures["absent_noticed"] > 0.95 and figures["present_missed"] <= 0.02
    assert small.grounding_threshold == figures["grounding_threshold"]


def test_only_the_sight_learns_and_it_is_saved(small, tmp_path):
    data = write_set(tmp_path / "set", 60)
    small.save(tmp_path / "untrained")
    config = PretrainConfig(
        batch_scenes=4, num_processes=1, holdout=30, paraphrase=True, only_sight=True, sight_scenes=20
    )
    done = []
    figures = pretrain(config, data, tmp_path / "out", initial=tmp_path / "untrained", on_sight=done.append)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("untrained", "out"))
    assert done == [20]
    added = {name for name in after if name.startswith("sight.")}
    stem = "vlm.model.vision_tower."  # its batch normalisation is folded at the end
    assert added and added == {name for name in after.keys() - before.keys() if not name.startswith(stem)}
    same = [name for name in before.keys() & after.keys() if not name.startswith(stem)]
    assert len(same) > 50 and all(torch.equal(before[name], after[name]) for name in same)
    loaded = load_backbone(str(tmp_path / "out"))
    assert loaded.grounding_threshold == pytest.approx(figures["grounding_threshold"])

    plain, sighted = seen(load_backbone(str(tmp_path / "untrained"))), seen(loaded)
    assert torch.allclose(plain.points_BQE, sighted.points_BQE, atol=1e-4)  # it moves no point
    queries, points = sighted.queries_BLQD[:, -1], sighted.points_BQE
    assert not torch.allclose(
        loaded.confidence(queries, points), load_backbone(str(tmp_path / "untrained")).confidence(queries, points)
    )
