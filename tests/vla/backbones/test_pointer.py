"""Pointing twice: the second look is sharp, starts where the first was, and travels with the backbone."""

import numpy as np
import pytest
import torch

from vla.backbones.hub import load as load_backbone
from vla.backbones.pointer import Pointer, SharpPointer, _weights


def picture(at, size=84):
    """A grey picture with a red square of 5 pixels around `at` = (x, y) in pixels: (1, 1, 3, H, W) in [-1, 1]."""
    pixels = torch.zeros(1, 1, 3, size, size)
    x, y = (round(v) for v in at)
    pixels[..., 0, y - 2 : y + 3, x - 2 : x + 3] = 1.0
    return pixels


def test_it_learns_to_point_to_a_fraction_of_its_cells():
    torch.manual_seed(0)
    pointer = SharpPointer(8, image_size=84, side=7)
    optimiser = torch.optim.Adam(pointer.parameters(), lr=3e-3)
    rng, query, coarse = np.random.default_rng(0), torch.ones(8, 1, 8), torch.zeros(8, 1, 1, 49)
    errors = []
    for _ in range(60):
        at = rng.integers(8, 76, (8, 2))
        goal = torch.tensor((at + 0.5) / 84 * 2 - 1, dtype=torch.float32)
        points, logits = pointer(torch.cat([picture(xy) for xy in at]), query, coarse)
        near = (-((pointer.grid_P2 - goal[:, None]) ** 2).sum(-1) / (2 * (1.3 / 21) ** 2)).softmax(-1)
        distance = (points[:, 0, 0, :2] - goal).norm(dim=-1)
        loss = distance.mean() - (near * logits[:, 0, 0].log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(distance.mean().detach()) * 42)
    assert errors[0] > 15 and np.mean(errors[-5:]) < 2.0, "pixels; a cell has 4"


def test_it_starts_where_the_first_look_was():
    torch.manual_seed(0)
    pointer = SharpPointer(8, image_size=84, side=7)
    coarse = torch.zeros(1, 1, 1, 49)
    coarse[..., 7 * 1 + 5] = 60.0  # second row, sixth column of the coarse grid
    points, logits = pointer(picture((20, 60)), torch.randn(1, 1, 8), coarse)
    row, column = divmod(int(logits.argmax()), 21)
    assert (row // 3, column // 3) == (1, 5)
    assert (
        abs(float(points[..., 0].detach()) - (5.5 / 7 * 2 - 1)) < 0.2
        and abs(float(points[..., 1].detach()) - (1.5 / 7 * 2 - 1)) < 0.2
    )


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        SharpPointer(8, image_size=84, side=14)


@pytest.fixture(scope="module")
def sharp():
    torch.manual_seed(0)
    backbone = load_backbone("tiny")
    backbone.sharp = None
    backbone.add_sharp()
    return backbone.eval()


def features(backbone, images):
    ids = backbone.tokenizer("pick up the red cube", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([ids]).expand(len(images), -1)
    with torch.no_grad():
        return backbone(images, ids, ids > -1)


def images(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 2, 84, 84, 3), dtype=torch.uint8, generator=generator)


def test_only_the_naming_queries_look_twice(sharp):
    with_it = features(sharp, images(0)).points_BQE
    kept, sharp.sharp = sharp.sharp, None
    without = features(sharp, images(0)).points_BQE
    sharp.sharp = kept
    differs = (with_it != without).any(-1).all(0)
    assert differs.nonzero().flatten().tolist() == list(sharp.naming) == [0, 4]
    assert with_it.shape == without.shape and (with_it[..., 2::3] >= 0).all() and (with_it[..., 2::3] <= 1).all()


def test_questions_about_one_picture_share_it_but_not_each_other(sharp):
    pixels = sharp.normalise(images(1))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 8, sharp.width, generator=generator)
    points, coarse = torch.randn(6, 8, 2, 3, generator=generator), torch.randn(6, 8, 2, 49, generator=generator)
    hidden = torch.randn(6, sharp.num_patches, sharp.width, generator=generator)
    with torch.no_grad():
        together, logits = sharp.sharpen(pixels, hidden, queries, points, coarse)
        assert logits.shape == (6, 2, 2, 441)
        for question in range(6):
            scene = question // 3
            own = slice(question, question + 1)
            about = (hidden[own], queries[own], points[own], coarse[own])
            alone, _ = sharp.sharpen(pixels[2 * scene : 2 * scene + 2], *about)
            assert torch.allclose(alone, together[own], atol=1e-5)


def test_it_is_saved_with_the_backbone(sharp, tmp_path):
    sharp.save(tmp_path)
    loaded = load_backbone(str(tmp_path))
    a, b = features(sharp, images(2)).points_BQE, features(loaded, images(2)).points_BQE
    assert torch.allclose(a, b, atol=2e-2), "weights are kept in half precision"
    assert loaded.to_spec()["sharp"] is True


def two_peaks(pointer, likelier):
    """Coordinates where the first look is at two patches of a grid of 6, the `likelier` a little more."""
    axis = (torch.arange(6) + 0.5) / 3 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).view(-1, 2)
    patches = torch.zeros(1, 1, 36, 64)
    for place, weight in ((7, 1.0), (28, 1.0)):
        patches[0, 0, place, 0] = weight + 0.02 * (place == likelier)
    with torch.no_grad():
        pointer.query.weight.copy_(torch.eye(64))
        pointer.key.weight.copy_(50 * torch.eye(64))
        for part in (pointer.query.bias, pointer.key.bias, pointer.shift.weight, pointer.shift.bias):
            part.zero_()
        query = torch.zeros(1, 1, 64)
        query[..., 0] = 2.0
        points, _ = pointer(query, patches, grid)
    return points[0, 0, 0, :2], grid


@pytest.mark.parametrize("likelier", [7, 28])
def test_of_two_places_the_likelier_is_pointed_at_and_nothing_between(likelier):
    point, grid = two_peaks(Pointer(64, patch_half=1 / 6, peak=True).eval(), likelier)
    assert (point - grid[likelier]).abs().max() < 1e-3
    mean, _ = two_peaks(Pointer(64, patch_half=1 / 6).eval(), likelier)
    assert (mean - (grid[7] + grid[28]) / 2).abs().max() < 0.1
    learning, _ = two_peaks(Pointer(64, patch_half=1 / 6, peak=True).train(), likelier)
    assert torch.equal(learning, mean), "while it learns, every place has a gradient"


def test_neighbours_of_the_likeliest_place_still_count():
    """Precision below a patch is a mean over neighbours: where nothing else is likely, a peak changes nothing."""
    axis = (torch.arange(24) + 0.5) / 12 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).view(-1, 2)
    logits = -((grid - torch.tensor([0.11, -0.37])) ** 2).sum(-1) * 200
    narrow = _weights(logits.view(1, 1, 1, -1), grid, (2 * 16 / 4 + 1) / 24)
    wide = _weights(logits.view(1, 1, 1, -1), grid, None)
    assert torch.allclose(narrow @ grid, wide @ grid, atol=1e-3)


def test_what_one_view_found_is_looked_for_in_the_other():
    """Two squares that the second view cannot tell apart: what was found in the first view decides."""
    torch.manual_seed(0)
    pointer = Pointer(8, patch_half=1 / 7, peak=True).eval()
    patches = torch.randn(1, 2, 49, 8)
    logits = torch.zeros(1, 1, 2, 49)
    logits[0, 0, 0, 10], logits[0, 0, 1, 20] = 30.0, 20.0
    axis = (torch.arange(7) + 0.5) / 7 * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    assert torch.allclose(pointer.found(patches, logits, grid)[0, 0], patches[0, 0, 10], atol=1e-4), "the surer view's"
    mean = pointer.train().found(patches, logits, grid)[0, 0]
    assert torch.allclose(mean, patches[0, 0, 10], atol=0.1) and mean.requires_grad is False

    sharp = SharpPointer(8, image_size=84, side=7, agree=True)
    query, found = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    before, _ = sharp(picture((20, 60)), query, logits[:, :, :1], found)
    alone, _ = sharp(picture((20, 60)), query, logits[:, :, :1])
    assert torch.equal(before, alone), "without effect until it has learnt"
    torch.nn.init.normal_(sharp.taken[1].weight)
    torch.nn.init.normal_(sharp.alike.weight)
    after, _ = sharp(picture((20, 60)), query, logits[:, :, :1], found)
    assert (after[..., :2] != alone[..., :2]).all() and (after[..., 2] != alone[..., 2]).all()


def test_views_that_agree_are_saved_with_the_backbone(tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone("tiny")
    backbone.sharp, backbone.agree = None, True
    backbone.add_sharp()
    with torch.no_grad():
        for layer in (backbone.sharp.taken[1], backbone.sharp.alike):
            torch.nn.init.normal_(layer.weight, std=0.1)
    backbone.eval().save(tmp_path)
    loaded = load_backbone(str(tmp_path))
    points = features(backbone, images(2)).points_BQE
    assert loaded.to_spec()["agree"] is True
    assert torch.allclose(points, features(loaded, images(2)).points_BQE, atol=2e-2)
    loaded.agree = False
    assert not torch.allclose(points, features(loaded, images(2)).points_BQE, atol=2e-2)
