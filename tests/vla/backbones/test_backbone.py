"""The embedded backbone: padding does not matter, packing is exact, pre-training learns and saves what it learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla.backbones.square_scenes import write_set
from vla.backbones.backbone import Backbone
from vla.backbones.hub import load as load_backbone
from vla.backbones.tiny import build_tiny, learn_words, train_tokenizer
from vla.training.grounding import pretrain as pretraining
from vla.training.grounding.loss import inspect, pack
from vla.training.grounding.pointing import state_hidden
from vla.training.grounding.pretrain import PretrainConfig, pretrain
from vla.training.grounding.questions import PROMPT_TOKENS, GroundingSet

PATCH = 12


def build_backbone(seed: int = 0) -> Backbone:
    tokenizer = train_tokenizer(["pick up the red cube and put it on the blue plate yes no"] * 50)
    torch.manual_seed(seed)
    return Backbone(build_tiny(len(tokenizer), seed), tokenizer, num_queries=8, num_views=2).eval()


def images(batch: int) -> torch.Tensor:
    return torch.randint(0, 255, (batch, 2, 84, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing() -> None:
    backbone = build_backbone()
    ids = torch.tensor([[9, 8, 7]])
    bare = backbone(images(1), ids, torch.ones(1, 3, dtype=torch.bool))
    for left in (0, 4):
        padded = torch.zeros(1, 7, dtype=torch.int64)
        padded[0, left : left + 3] = ids
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[0, left : left + 3] = True
        other = backbone(images(1), padded, mask)
        assert torch.allclose(bare.queries_BLQD, other.queries_BLQD, atol=1e-5)
        assert torch.allclose(bare.points_BQE, other.points_BQE, atol=1e-5)
    other_words = backbone(images(1), torch.tensor([[9, 8, 40]]), torch.ones(1, 3, dtype=torch.bool))
    assert not torch.allclose(bare.queries_BLQD, other_words.queries_BLQD, atol=1e-2)
    other_order = backbone(images(1), ids.flip(1), torch.ones(1, 3, dtype=torch.bool))
    assert not torch.allclose(bare.queries_BLQD, other_order.queries_BLQD, atol=1e-5)


@torch.no_grad()
def test_packed_questions_are_separate_questions() -> None:
    backbone = build_backbone()
    prompts = torch.zeros(2, 3, PROMPT_TOKENS, dtype=torch.int64)
    prompts[:, :, :3] = torch.randint(3, 200, (2, 3, 3), generator=torch.Generator().manual_seed(2))
    prompts[0, 1, 3] = 5
    answers = torch.zeros(2, 1, 6, dtype=torch.int64)
    answers[:, :, :4] = 11
    hidden, n = pack(backbone, backbone.embed_images(images(2)), prompts, answers)
    _, queries = state_hidden(hidden[-1], n, 3, PROMPT_TOKENS, 8)
    for k in range(3):
        alone = backbone(images(2), prompts[:, k], prompts[:, k] > 0)
        together = queries.view(2, 3, 8, -1)[:, k]
        assert torch.allclose(alone.queries_BLQD[:, -1], together, atol=1e-5)


@torch.no_grad()
def test_lean_attention_is_the_librarys_eager_attention() -> None:
    backbone = build_backbone()
    ids, mask = torch.tensor([[9, 8, 7, 0]]), torch.tensor([[True, True, True, False]])
    lean = backbone(images(1), ids, mask)
    for part in (backbone.vlm.model.language_model, backbone.vlm.model.vision_tower):
        part.config._attn_implementation = "eager"
    eager = backbone(images(1), ids, mask)
    assert torch.allclose(lean.queries_BLQD, eager.queries_BLQD, atol=1e-5)


def test_patches_are_the_convolution_they_replace() -> None:
    conv = build_tiny(300).model.vision_tower.vision_model.embeddings.patch_embedding
    pixels = torch.randn(2, 3, 84, 84)
    plain = torch.nn.functional.conv2d(pixels, conv.weight, conv.bias, stride=PATCH)
    assert torch.allclose(conv(pixels), plain, atol=1e-5)


def test_pretraining_learns_to_point_and_saves_it(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 160)
    config = PretrainConfig(
        minutes=5, max_steps=30, batch_scenes=8, lr=3e-3, warmup_steps=5, num_processes=1, holdout=32, sight_scenes=40
    )
    losses: list[float] = []
    build_backbone().save(tmp_path / "untrained")
    pretrain(
        config, data, tmp_path / "out", initial=tmp_path / "untrained",
        on_step=lambda row: losses.append(row["loss"]),
    )  # fmt: skip
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    again = load_backbone(str(tmp_path / "out"))
    figures = inspect(again, GroundingSet(data, again.tokenizer))
    assert figures["point_error_px"] < 12  # chance on these scenes is about 30


def test_two_processes_train_like_one_team(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 48)
    config = PretrainConfig(minutes=5, max_steps=2, batch_scenes=8, num_processes=2, holdout=16)
    figures = pretrain(config, data, tmp_path / "out", initial="tiny")
    assert figures["steps"] == 2 and load_backbone(str(tmp_path / "out")).num_queries == 8


def test_names_and_folders_that_are_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny"):
        load_backbone("tinny")
    with pytest.raises(ValueError, match="pretrain"):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match="ground-data"):
        GroundingSet(tmp_path, None)


def test_new_words_are_one_token_and_change_nothing_else(tmp_path: Path) -> None:
    backbone = load_backbone("tiny")
    texts = ["pick up the red cube and put it on the plate that is blue", "is the yellow can in the gripper", "zebra"]
    before = backbone.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before[0]])
    with torch.no_grad():
        points = backbone(images(1), ids, ids > 0).points_BQE
        learn_words(backbone, ["drawer", "cube", "push", "pushes"])
        assert torch.equal(backbone(images(1), ids, ids > 0).points_BQE, points)
        assert backbone.tokenizer(texts, add_special_tokens=False)["input_ids"] == before
        new = backbone.tokenizer(["drawer", "push", "pushes"], add_special_tokens=False)["input_ids"]
        assert all(len(one) == 1 for one in new)
        assert backbone.tokenizer.decode(backbone.tokenizer("push the drawer").input_ids).strip() == "push the drawer"
        lengths = backbone.vlm.model.get_input_embeddings().weight[[one[0] for one in new]].norm(dim=1)
        assert ((lengths > 0.7) & (lengths < 1.6)).all()  # as words, not as pieces that were never used
        backbone.save(tmp_path)
        again = load_backbone(str(tmp_path))
        assert again.tokenizer("push the drawer").input_ids == backbone.tokenizer("push the drawer").input_ids
        assert torch.allclose(again(images(1), ids, ids > 0).points_BQE, points, atol=1e-3)


def test_several_grounding_sets_are_drawn_by_their_weights(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / name, count) for name, count in (("a", 40), ("b", 24))]
    questions = json.loads((sets[1] / "questions.json").read_text())
    for scene in questions:
        scene[0][0] = "push the " + " ".join(["drawer"] * 18)
    (sets[1] / "questions.json").write_text(json.dumps(questions))
    both = GroundingSet(sets, load_backbone("tiny").tokenizer)
    assert len(both) == 64 and both.prompts.shape[2] > PROMPT_TOKENS
    np.testing.assert_array_equal(both.images[np.array([39, 40, 3])][1], np.load(sets[1] / "images.npy")[0])
    assert [(len(own), list(held[[0, -1]])) for own, held in both.split(8)] == [(32, [32, 39]), (16, [56, 63])]

    drawn: list[int] = []
    config = PretrainConfig(max_steps=3, batch_scenes=8, num_processes=1, holdout=8, weights=(1e-9, 1.0), sharp=False)
    real = pretraining.scene_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pretraining, "scene_loss", lambda b, r, d, rows, *rest: drawn.extend(rows) or real(b, r, d, rows, *rest)
        )
        figures = pretrain(config, sets, tmp_path / "out", initial="tiny")
    assert len(drawn) == 24 and min(drawn) >= 40 and max(drawn) < 56
    assert {name.split("/")[0] for name in figures if "/" in name} == {"a", "b"}
    assert len(load_backbone(str(tmp_path / "out")).tokenizer("push the drawer").input_ids) == 3
    with pytest.raises(ValueError, match="2 grounding sets"):
        pretrain(replace(config, weights=(1.0,)), sets, tmp_path / "out", initial="tiny")
