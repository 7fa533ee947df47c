"""Augmented pictures follow from (seed, step), stay pictures, and never reach an evaluation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.training.test_train import CONFIG, demos, fresh
from vla.data.batches import LiveDemos
from vla.processing.augment import augment, draw_augmentation
from vla.processing.config import AugmentConfig
from vla.training.train import _Run

NOTHING = AugmentConfig(crop=1.0, brightness=0, contrast=0, saturation=0, hue=0)


def pictures(batch=3, views=2, size=24, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(40, 215, (batch, views, 6, 6, 3), np.uint8)
    return torch.from_numpy(blocks.repeat(size // 6, 2).repeat(size // 6, 3))


def test_no_strength_is_no_change():
    images = pictures()
    assert torch.equal(augment(images, draw_augmentation(3, 2, 7), NOTHING), images)


@pytest.mark.parametrize("name", ["crop", "brightness", "contrast", "saturation", "hue", "blur", "overlay"])
def test_each_strength_changes_each_picture_in_its_own_way(name):
    images = pictures()
    strength = {"crop": 0.7, "blur": 0.1}.get(name, 0.3)
    draws = draw_augmentation(3, 2, 0)
    draws[..., 7:9] = draws[..., 7:9].abs()  # textures and blur that one sees
    changed = augment(images, draws, replace(NOTHING, **{name: strength}))
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    # the same picture six times over comes out in six ways
    same = images[:1, :1].expand(3, 2, -1, -1, -1)
    ways = augment(same, draws, replace(NOTHING, **{name: strength})).flatten(0, 1)
    assert len({way.numpy().tobytes() for way in ways}) == 6
    assert not any(torch.equal(way, images[0, 0]) for way in ways)


def test_each_does_what_its_name_says():
    images = pictures().float()
    high = torch.ones(3, 2, 25)
    bright = augment(images.byte(), high, replace(NOTHING, brightness=0.1)).float()
    torch.testing.assert_close(bright, images + 25.5, atol=0.51, rtol=0)
    flat = augment(images.byte(), -high, replace(NOTHING, contrast=1.0)).float()
    assert (flat.std((2, 3)) < 1).all()  # all contrast gone: one grey level remains per picture
    grey = augment(images.byte(), -high, replace(NOTHING, saturation=1.0)).float()
    luma = (images * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    torch.testing.assert_close(grey, luma.expand_as(grey), atol=1.0, rtol=0)
    turned = augment(grey.byte(), high, replace(NOTHING, hue=0.5)).float()
    torch.testing.assert_close(turned, grey, atol=1.0, rtol=0)  # grey has no hue to turn
    # zoom at its strongest (side 0.5), pushed to the lower right: that quarter fills the frame
    quarter = augment(images.byte(), high, replace(NOTHING, crop=0.5)).float()
    expected = images[:, :, 12:, 12:].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (quarter - expected).abs().median() == 0
    whole = high.clone()
    whole[..., 0] = -1  # and the whole picture is among the zooms
    assert torch.equal(augment(images.byte(), whole, replace(NOTHING, crop=0.5)), images.byte())


def test_a_blur_keeps_the_light_and_takes_the_edges():
    images, strongest = pictures(), torch.ones(3, 2, 25)
    blurred = augment(images, strongest, replace(NOTHING, blur=0.1)).float()
    assert (blurred.mean((2, 3)) - images.float().mean((2, 3))).abs().max() < 8
    edges = lambda x: (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()  # noqa: E731
    assert edges(blurred) < 0.4 * edges(images.float())
    none = strongest.clone()
    none[..., 8] = -1
    assert torch.equal(augment(images, none, replace(NOTHING, blur=0.1)), images)


def test_a_texture_lies_over_the_picture_as_opaque_as_drawn():
    images, draws = pictures(), draw_augmentation(3, 2, 0)
    draws[..., 7] = 1.0
    hidden = augment(images, draws, replace(NOTHING, overlay=1.0))
    assert torch.equal(hidden, augment(255 - images, draws, replace(NOTHING, overlay=1.0))), "one sees texture alone"
    assert hidden.float().std((2, 3)).mean() > 5 and len({t.numpy().tobytes() for t in hidden.flatten(0, 1)}) == 6
    half = augment(images, draws, replace(NOTHING, overlay=0.5)).float()
    torch.testing.assert_close(half, (images.float() + hidden.float()) / 2, atol=1.5, rtol=0)


def test_the_first_draws_are_what_they_were_before_there_were_more():
    old = torch.rand(3, 2, 7, generator=torch.Generator().manual_seed(5)) * 2 - 1
    assert torch.equal(draw_augmentation(3, 2, 5)[..., :7], old)


def test_draws_follow_from_seed_and_step_and_split_like_the_batch():
    cfg, data = replace(CONFIG, augment=AugmentConfig()), demos()
    vla = fresh(cfg)
    run = _Run(cfg, vla, {"only": data})
    source = LiveDemos(vla.processor, data, vla.chunk_size)
    one = run.fetch(source, 5)[0][0].seen.images_BVHWC
    assert torch.equal(one, run.fetch(source, 5)[0][0].seen.images_BVHWC)
    assert not torch.equal(one, run.fetch(source, 6)[0][0].seen.images_BVHWC)
    halves = _Run(replace(cfg, accumulate=2), fresh(cfg), {"only": data}).fetch(source, 5)
    assert torch.equal(torch.cat([part.seen.images_BVHWC for part, _ in halves]), one)
    assert sum(share for _, share in halves) == pytest.approx(1.0)


def test_without_augmentation_training_sees_what_serving_sees():
    cfg, data = replace(CONFIG, model=replace(CONFIG.model, freeze_backbone=False)), demos()
    vla = fresh(cfg)
    run = _Run(cfg, vla, {"only": data})
    from vla.training.sampling import mixed_frames

    trained = run.fetch(LiveDemos(vla.processor, data, vla.chunk_size), 3)[0][0].seen
    rows = mixed_frames(cfg.seed, 3, cfg.batch_size, (data.num_frames,), None).numpy()
    served = vla.processor.prepare(data.observation(rows))
    for name in ("images_BVHWC", "token_ids_BT", "token_mask_BT", "proprio_BP"):
        assert torch.equal(getattr(trained, name), getattr(served, name)), name
    # and with it, only the pictures differ, only in training
    augmented = _Run(replace(cfg, augment=AugmentConfig()), fresh(cfg), {"only": data})
    changed = augmented.fetch(LiveDemos(vla.processor, data, vla.chunk_size), 3)[0][0].seen
    assert not torch.equal(changed.images_BVHWC, served.images_BVHWC)
    assert torch.equal(changed.token_ids_BT, served.token_ids_BT) and torch.equal(changed.proprio_BP, served.proprio_BP)
