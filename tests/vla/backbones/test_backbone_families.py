"""Backbones of every Hugging Face family, from folders as their makers write them. Random weights, no network.

The strongest check is `test_hidden_states_are_the_models_own`: the library's own forward pass, on placeholder tokens
and with its own image processor, must give the hidden states that we read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.vla.backbones.tiny_families import LAYERS, MODELS, PROCESSORS, WORDS, own_pixels, write_checkpoint
from vla.backbones.backbone import Backbone
from vla.backbones.features import Features
from vla.backbones.hub import load as load_backbone

FAMILIES = tuple(name for name in MODELS if name not in ("llava-siglip", "idefics3", "paligemma"))
"""One of each kind; the others share their code, and stand in the comparison with the library."""
QUERIES = 4
SIZES = {"qwen2_5_vl": 84, "qwen3_vl": 84}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> checkpoint folder, each written once."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return written[family]

    return folder


@pytest.fixture(scope="module")
def backbone_of(folders):
    loaded: dict[tuple, Backbone] = {}

    def backbone(family: str, views: int = 2) -> Backbone:
        if (family, views) not in loaded:
            loaded[family, views] = load_backbone(
                str(folders(family)), num_queries=QUERIES, num_views=views, image_size=SIZES.get(family)
            )
        return loaded[family, views]

    return backbone


def pictures(backbone: Backbone, batch: int, seed: int = 0) -> torch.Tensor:
    size, generator = backbone.image_size, torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, backbone.num_views, size, size, 3), dtype=torch.uint8, generator=generator)


def words(backbone: Backbone, *texts: str, length: int | None = None, left: int = 0):
    """Ids and mask (B, length), `left` of the padding in front."""
    rows = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows)) if length is None else length
    ids = torch.full((len(rows), length), 7)  # padding is told by the mask, not by the id
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = min(left, length - len(row))
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return ids, mask


def assert_same(a: Features, b: Features, rows=slice(None), atol=1e-5) -> None:
    for name in ("raw_BLND", "queries_BLQD"):
        one, other = getattr(a, name), getattr(b, name)[rows]
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(one / scale, other / scale, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", PROCESSORS)  # all but our own composition: test_backbone_hub has that
@torch.no_grad()
def test_hidden_states_are_the_models_own(family, backbone_of, folders):
    backbone = backbone_of(family)
    vlm, layout = backbone.vlm, backbone.layout
    images = pictures(backbone, 1)
    ids, mask = words(backbone, WORDS)
    asked = torch.tensor([11, 12, 13, 14])
    kept = backbone.queries.data.clone()
    backbone.queries.data.copy_(
        vlm.model.get_input_embeddings()(asked)
    )  # queries that the library can be given as words
    try:
        ours = backbone(images, ids, mask)
    finally:
        backbone.queries.data.copy_(kept)

    patch = [getattr(vlm.config, "image_token_id", None) or vlm.config.image_token_index] * backbone.side**2
    view = [*layout.opens, *patch, *layout.closes]
    row = [*layout.before, *view, *view, *layout.between, *ids[0].tolist(), *layout.after, *asked.tolist()]
    input_ids = torch.tensor([row])
    is_patch = input_ids == patch[0]
    inputs = own_pixels(family, images[0].numpy(), folders(family))
    if family.startswith("paligemma"):
        kinds = torch.zeros_like(input_ids)
        kinds[:, -QUERIES:] = 1  # the suffix, as in its training
        inputs["token_type_ids"] = kinds
    if family == "gemma3":
        inputs["token_type_ids"] = is_patch.long()
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_patch.int()
    theirs = vlm(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), output_hidden_states=True, **inputs
    ).hidden_states[1:]

    assert len(theirs) == LAYERS
    for layer, hidden in enumerate(theirs):
        scale = hidden.abs().max()
        assert (ours.raw_BLND[0, layer] - hidden[is_patch]).abs().max() < 1e-5 * scale, layer
        assert (ours.queries_BLQD[0, layer] - hidden[0, -QUERIES:]).abs().max() < 1e-5 * scale, layer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shapes_and_places(family, backbone_of):
    backbone = backbone_of(family)
    images, (ids, mask) = pictures(backbone, 1), words(backbone, WORDS)
    features = backbone(images, ids, mask)
    tokens = 2 * backbone.side**2
    assert features.raw_BLND.shape == (1, LAYERS, tokens, 32) and backbone.num_layers == LAYERS
    assert features.queries_BLQD.shape == (1, LAYERS, QUERIES, 32)
    assert features.points_BQE is None and backbone.point_dim == 0 and features.raw_mask_BN is None
    assert features.coords_NE.shape == (tokens, 3)
    # A spot in the second view, off the diagonal: the token that stands there changes most.
    place = tokens - backbone.side
    x, y, view = features.coords_NE[place].tolist()
    assert view == 1 and x < 0 < y
    cell = backbone.image_size // backbone.side
    column, line = ((round((one + 1) / 2 * backbone.image_size) // cell) * cell for one in (x, y))
    spotted = images.clone()
    spot = spotted[:, 1, line : line + cell, column : column + cell]
    spot.copy_(255 - spot)
    change = (backbone.embed_images(spotted) - backbone.embed_images(images)).norm(dim=-1)[0]
    assert change.argmax() == place


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_batching_change_nothing(family, backbone_of):
    backbone = backbone_of(family)
    images = pictures(backbone, 2)
    ids, mask = words(backbone, "pick up the red cube", WORDS, length=30, left=0)
    together = backbone(images, ids, mask)
    for row, text in enumerate(("pick up the red cube", WORDS)):
        bare = words(backbone, text)
        for left in (0, 3, 30):
            padded = words(backbone, text, length=30, left=left)
            assert_same(backbone(images[row : row + 1], *bare), backbone(images[row : row + 1], *padded))
        assert_same(backbone(images[row : row + 1], *bare), together, rows=slice(row, row + 1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_queries_see_both_views_and_the_words(family, backbone_of):
    backbone = backbone_of(family)
    images, text = pictures(backbone, 1), words(backbone, WORDS)
    before = backbone(images, *text).queries_BLQD[:, -1]
    for view in (0, 1):
        other = images.clone()
        other[:, view] = pictures(backbone, 1, seed=9)[:, view]
        assert not torch.allclose(backbone(other, *text).queries_BLQD[:, -1], before, atol=1e-3), view
    said = words(backbone, WORDS.replace("red", "blue"))
    assert not torch.allclose(backbone(images, *said).queries_BLQD[:, -1], before, atol=1e-3)
    swapped = words(backbone, WORDS.replace("red", "x").replace("blue", "red").replace("x", "blue"))
    assert not torch.allclose(backbone(images, *swapped).queries_BLQD[:, -1], before, atol=1e-3)
    assert not torch.allclose(backbone(images.flip(1), *text).queries_BLQD[:, -1], before, atol=1e-3)
    # Queries come last: nothing of the observation may depend on them.
    kept = backbone.queries.data.clone()
    raw = backbone(images, *text).raw_BLND
    backbone.queries.data.mul_(-3)
    try:
        assert torch.equal(backbone(images, *text).raw_BLND, raw)
    finally:
        backbone.queries.data.copy_(kept)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_first_layers_are_the_same_layers(family, folders, backbone_of):
    whole = backbone_of(family)
    short = load_backbone(
        str(folders(family)), num_queries=QUERIES, num_views=2, image_size=SIZES.get(family), num_layers=2
    )
    images, text = pictures(whole, 1), words(whole, WORDS)
    many, few = whole(images, *text), short(images, *text)
    assert short.num_layers == few.raw_BLND.shape[1] == 2
    assert torch.equal(few.raw_BLND[:, 0], many.raw_BLND[:, 0])
    assert torch.equal(few.queries_BLQD[:, 0], many.queries_BLQD[:, 0])
    assert not torch.allclose(few.raw_BLND[:, 1], many.raw_BLND[:, 1])  # the last one is normalised
    weights = sum(p.numel() for p in short.parameters())
    assert weights < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_and_three_cameras_of_any_size(family, backbone_of):
    for views in (1, 3):
        backbone = backbone_of(family, views)
        assert backbone.num_patches == views * backbone.side**2
        text = words(backbone, WORDS)
        small = torch.randint(0, 256, (1, views, 30, 40, 3), dtype=torch.uint8)
        features = backbone(small, *text)
        assert features.raw_BLND.isfinite().all() and features.coords_NE[-1, 2] == views - 1
    with pytest.raises(ValueError, match="made for 3 camera views, got 1"):
        backbone(small[:, :1], *text)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_again(family, backbone_of, tmp_path):
    backbone = backbone_of(family)
    images, text = pictures(backbone, 1), words(backbone, WORDS)
    backbone.save(tmp_path / "bb")
    again = load_backbone(str(tmp_path / "bb"))
    assert again.to_spec() == backbone.to_spec()
    assert again.tokenizer(WORDS)["input_ids"] == backbone.tokenizer(WORDS)["input_ids"]
    halved = {name: weight.half().float() for name, weight in backbone.state_dict().items()}
    assert all(torch.equal(weight, halved[name]) for name, weight in again.state_dict().items())
    assert str(tmp_path.parent) not in (tmp_path / "bb" / "bascule.json").read_text()
    assert_same(backbone(images, *text), again(images, *text), atol=2e-2)
