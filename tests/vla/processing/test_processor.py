"""Observation to batch and back: quantiles, odd dimensions, text, images, and errors that say what is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, WORDS, ToyTokenizer, toy_observation, toy_stats
from vla.core.types import Observation
from vla.processing.batch import trimmed_text
from vla.processing.pictures import resize
from vla.processing.processor import Processor, ProcessorConfig, Stats, plain_text


def make(stats=None, **change):
    config = ProcessorConfig(
        cameras=CAMERAS,
        proprio_dim=5,
        action_names=SPEC.names,
        image_size=16,
        max_text_tokens=6,
        action_low=SPEC.low,
        action_high=SPEC.high,
        control_hz=20.0,
    )
    return Processor(replace(config, **change), stats or toy_stats(), ToyTokenizer(WORDS))


def stats_of(action):
    return Stats.from_arrays(np.random.default_rng(0).normal(size=(len(action), 5)), np.asarray(action))


# --- numbers ---


def test_quantiles_map_to_one():
    stats = toy_stats(frames=1001)
    processor = make(stats)
    for quantile, one in ((stats.action.q01, -1), (stats.action.q99, 1)):
        np.testing.assert_allclose(processor.normalise_action(np.array(quantile)), one, atol=1e-6)
    np.testing.assert_allclose(processor.normalise_proprio(np.array([stats.proprio.q99])), 1, atol=1e-6)


def test_action_round_trip_in_numpy_and_torch():
    processor = make()
    raw = np.random.default_rng(1).uniform(SPEC.low, SPEC.high, (7, 8, 4)).astype(np.float32)
    normal = processor.normalise_action(raw)
    assert normal.dtype == np.float32 and np.abs(normal[..., :3]).max() > 0.5
    np.testing.assert_allclose(processor.unnormalise_action(normal), raw, atol=1e-7)
    tensor = processor.normalise_action(torch.from_numpy(raw))
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(normal))
    np.testing.assert_array_equal(processor.unnormalise_action(tensor).numpy(), processor.unnormalise_action(normal))


def test_switch_is_left_alone_even_when_rarely_pressed():
    rare = np.zeros((1000, 4))
    rare[:, 3] = -1.0
    rare[:5, 3] = 1.0  # 0.5% of the frames: both quantiles are -1
    for action in (rare, np.where(rare == 1, -1, rare), np.where(rare == -1, 1, rare)):
        processor = make(stats_of(action))
        grip = np.array([[0, 0, 0, -1.0], [0, 0, 0, 1.0], [0, 0, 0, 0.25]], dtype=np.float32)
        np.testing.assert_array_equal(processor.normalise_action(grip)[:, 3], grip[:, 3])
        np.testing.assert_array_equal(processor.unnormalise_action(grip)[:, 3], grip[:, 3])


def test_degenerate_dimensions():
    action = np.zeros((1000, 4))
    action[:, 0] = 0.02  # never changes: centred, scale 1
    action[:4, 1] = 0.04  # changes in less than 1% of the frames: scaled by its extremes
    processor = make(stats_of(action))
    normal = processor.normalise_action(np.array([[0.02, 0.04, 0.0, 0.0], [0.03, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(normal, [[0, 1, 0, 0], [0.01, -1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(processor.unnormalise_action(normal)[:, :2], [[0.02, 0.04], [0.03, 0.0]], atol=1e-6)


def test_actions_leave_within_bounds():
    wild = np.full((2, 4), 30.0, dtype=np.float32) * [[1], [-1]]
    np.testing.assert_allclose(make().unnormalise_action(wild), [SPEC.high, SPEC.low])
    stats = toy_stats()
    free = make(stats, action_low=None, action_high=None)
    np.testing.assert_allclose(free.unnormalise_action(wild), [stats.action.max, stats.action.min], rtol=1e-6)
    assert free.action_spec.low == pytest.approx(stats.action.min) and make().action_spec.names == SPEC.names


def test_a_joint_that_stood_still_cannot_drown_the_rest():
    proprio = np.random.default_rng(0).normal(size=(500, 5))
    proprio[:, 2] = 0.3 + np.linspace(0, 1e-3, 500)
    processor = make(Stats.from_arrays(proprio, np.zeros((500, 4))))
    assert processor.normalise_proprio(np.array([[0, 0, 0.4, 0, 0]]))[0, 2].item() == 5.0


def test_stats_survive_json_exactly():
    stats = toy_stats()
    assert Stats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats
    with pytest.raises(ValueError, match="did you mean 'proprio'"):
        Stats.from_dict({**stats.to_dict(), "propio": 1})


# --- observations ---


def test_prepare_shapes_types_and_order():
    obs = toy_observation()
    inp = make().prepare(obs)
    assert inp.images_BVHWC.shape == (3, 2, 16, 16, 3) and inp.images_BVHWC.dtype == torch.uint8
    for view, camera in enumerate(CAMERAS):
        np.testing.assert_array_equal(inp.images_BVHWC[:, view].numpy(), obs.images[camera])
    shuffled = replace(obs, images=dict(reversed(obs.images.items())))
    assert torch.equal(make().prepare(shuffled).images_BVHWC, inp.images_BVHWC)
    assert inp.token_ids_BT.dtype == torch.int64 and inp.token_mask_BT.dtype == torch.bool
    assert inp.token_ids_BT.tolist()[0] == [2, 3, 4, 5, 8, 0] and inp.token_mask_BT[0].tolist() == [True] * 5 + [False]
    assert inp.proprio_BP.dtype == torch.float32 and inp.proprio_BP.shape == (3, 5)
    one = inp.select([1])
    assert one.batch_size == 1 and torch.equal(one.images_BVHWC[0], inp.images_BVHWC[1])


def test_other_sizes_are_resized_by_averaging():
    obs = toy_observation(size=64)
    obs.images["front"][:] = 0
    obs.images["front"][:, :, ::4] = 200  # stripes thinner than a pixel of the result
    image = make().prepare(obs).images_BVHWC[:, 0]
    assert image.shape == (3, 16, 16, 3)
    assert (image.float() - 50).abs().max() <= 30
    wide = replace(obs, images={name: np.full((3, 20, 40, 3), 77, np.uint8) for name in CAMERAS})
    assert (make().prepare(wide).images_BVHWC == 77).all()


@pytest.mark.parametrize("shape", [(224, 224), (64, 48), (90, 20), (7, 300), (17, 16)])
def test_resizing_is_what_torch_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    tensor = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(tensor, (16, 16), mode="bilinear", antialias=True)
    got = torch.from_numpy(resize(image, 16)).permute(0, 3, 1, 2).float()
    assert (got - expected).abs().max() < 0.51  # rounded to whole numbers, once


def test_text_is_plain_and_tokenised_once():
    assert plain_text("  Pick-up the RED_cube, please! ") == "pick up the red cube please"
    processor = make()
    a = processor.tokenise(["Pick up the red cube.", "pick up the red cube", "Pick up the red cube."])
    assert processor.tokenizer.calls == 2
    assert torch.equal(a[0][0], a[0][1]) and torch.equal(a[0][0], a[0][2])
    processor.tokenise(["Pick up the red cube."])
    assert processor.tokenizer.calls == 2


def broken(**change):
    return replace(toy_observation(), **change)


def images(**change):
    return {"images": {**toy_observation().images, **change}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": {"front": np.zeros((3, 16, 16, 3), np.uint8), "side": np.zeros((3, 16, 16, 3), np.uint8)}},
            "lacks camera 'wrist': this policy reads 'front', 'wrist', the observation has 'front', 'side'",
        ),
        ({"images": {}}, "the observation has none"),
        (images(wrist=np.zeros((3, 16, 16, 3), np.float32)), "camera 'wrist' must be uint8 RGB in 0..255, got float32"),
        (images(wrist=np.zeros((3, 16, 16, 4), np.uint8)), r"camera 'wrist' must have shape \(3, H, W, 3\)"),
        (images(wrist=np.zeros((2, 16, 16, 3), np.uint8)), r"got \(2, 16, 16, 3\)"),
        ({"proprio": np.zeros((3, 7), np.float32)}, r"reads proprio of shape \(3, 5\), the observation has \(3, 7\)"),
        ({"proprio": np.zeros((2, 5), np.float32)}, r"\(3, 5\), the observation has \(2, 5\)"),
        ({"proprio": np.array([[0] * 5, [0, 0, np.nan, 0, 0], [0] * 5])}, "NaN or infinity: world 1, component 2"),
        ({"instruction": ["pick up", " ?! ", "pick"]}, "must say something, got ' [?]! '"),
        ({"instruction": [None] * 3}, "must be text, got NoneType"),
    ],
)
def test_bad_observations_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        make().prepare(broken(**change))


def test_an_instruction_is_read_as_far_as_the_backbone_reads(caplog):
    long, short = "pick up the red cube the red", "pick up"
    one = make()
    ids, mask = one.tokenise([short, long])
    assert ids.shape == (2, 6) and mask.sum(1).tolist() == [2, 6] and len(caplog.messages) == 1
    one.text_limit = 350
    two = make()
    two.text_limit = 350
    ids, mask = two.tokenise([short, long])
    assert ids.shape == (2, 7) and mask.sum(1).tolist() == [2, 7] and ids[1].tolist() == [2, 3, 4, 5, 8, 4, 5]
    ids, mask = two.tokenise([short])
    assert ids.shape == (1, 6), "short ones are padded as they always were"
    assert len(caplog.messages) == 1 and "cut after 6 tokens" in caplog.text


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make(proprio_dim=4), "proprio_dim is 4 but the statistics have 5"),
        (lambda: make(action_names=("dx", "dy", "dz")), r"3 components \(dx, dy, dz\) but the statistics have 4"),
        (lambda: make(action_low=(0.0,)), "need 4 values each, got 1 and 4"),
        (lambda: make(cameras=("front", "front")), "distinct"),
        (lambda: make().normalise_action(np.zeros((2, 3))), r"\(dx, dy, dz, gripper\), got shape \(2, 3\)"),
        (lambda: make().unnormalise_action(torch.zeros(5)), r"got shape \(5,\)"),
        (lambda: stats_of([[0.0, np.inf, 0, 0]] * 3), "action holds NaN or infinity, first in frame 0, component 1"),
        (lambda: Stats.from_arrays(np.zeros((3, 2)), np.zeros((4, 2))), "3 proprio frames but 4 actions"),
        (lambda: Stats.from_arrays(np.zeros((0, 2)), np.zeros((0, 2))), "proprio must be"),
    ],
)
def test_bad_set_ups_are_explained(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("rate", [-20.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="control_hz must be a rate in Hz"):
        make(control_hz=rate)


def test_a_state_in_another_unit_is_told_once(caplog):
    processor = make()
    least, most = (np.array(part, np.float32) for part in (processor.stats.proprio.min, processor.stats.proprio.max))
    for state in (least, most, most + 2 * (most - least)):
        processor.scale_proprio(state[None])
    assert caplog.messages == []
    state = np.rad2deg(most + 1)[None]
    for _ in range(2):
        processor.scale_proprio(state)
    assert len(caplog.messages) == state.shape[1]
    assert all("in training it was" in line and "another unit" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [(1, 1, "next to nothing can be seen"), (2000, 300, "they are squeezed"), (480, 640, None)],
)
def test_pictures_of_an_unlikely_shape_are_told_once(height, width, words, caplog):
    processor = make()
    cameras = [camera for camera in processor.config.cameras if camera]
    images = {camera: np.full((1, height, width, 3), 9, np.uint8) for camera in cameras}
    for _ in range(2):
        processor.images(Observation(images, np.zeros((1, processor.config.proprio_dim), np.float32), ["go"]))
    assert len(caplog.messages) == (len(cameras) if words else 0)
    assert all(f"shows {width}x{height} pixels" in line and words in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("trained", "height", "width", "told"),
    [(1.0, 84, 168, True), (1.0, 480, 640, True), (4 / 3, 480, 640, False), (4 / 3, 360, 640, True),
     (4 / 3, 300, 300, True), (4 / 3, None, None, False), (0.0, 480, 640, False), (6.0, 100, 600, False)],
)  # fmt: skip
def test_pictures_of_another_aspect_than_in_training_are_told(trained, height, width, told, caplog):
    """They are squeezed into the square otherwise, so that everything is wider or narrower than it was."""
    processor = make()
    cameras = [camera for camera in processor.config.cameras if camera]
    processor.config = replace(processor.config, aspects=(trained,) * len(processor.config.cameras))
    size = processor.config.image_size
    images = {camera: np.full((1, height or size, width or size, 3), 9, np.uint8) for camera in cameras}
    for _ in range(2):
        processor.images(Observation(images, np.zeros((1, processor.config.proprio_dim), np.float32), ["go"]))
    assert len(caplog.messages) == (len(cameras) if told else 0)
    assert all("they are squeezed, otherwise than those of training" in line for line in caplog.messages)


def test_an_observation_of_nobody_is_told():
    tokens, mask = np.zeros((0, 5), np.int64), np.zeros((0, 5), bool)
    with pytest.raises(ValueError, match=r"of no environment \(B = 0\)"):
        trimmed_text(tokens, mask)


def test_black_pictures_are_told_once(caplog):
    """A covered camera, or floats in 0..1 cast to uint8, give pictures of 0 and 1: one warning for each camera."""
    processor = make()
    state = np.zeros((1, processor.config.proprio_dim), np.float32)
    cast = np.random.default_rng(0).random((1, 16, 16, 3)).round().astype(np.uint8)
    seen = np.where(np.arange(16)[:, None, None] == 3, 2, cast).astype(np.uint8)
    processor.images(Observation(dict.fromkeys(CAMERAS, seen), state, ["go"]))
    assert caplog.messages == [] and cast.max() == 1
    for _ in range(2):
        processor.images(Observation(dict.fromkeys(CAMERAS, seen) | {CAMERAS[0]: cast}, state, ["go"]))
    (line,) = caplog.messages
    assert line.startswith(f"camera '{CAMERAS[0]}' shows black") and "cast to uint8 (multiply them by 255)" in line


def test_a_state_that_never_moved_in_training_reads_the_same_whatever_it_becomes():
    """A policy has learnt nothing of it: its weights there are those that it began with."""
    proprio = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    proprio[:, 2] = 25.0
    processor = make(Stats.from_arrays(proprio, np.random.default_rng(1).uniform(-1, 1, (50, 4))))
    there, gone = proprio[:3], proprio[:3].copy()
    gone[:, 2] = [25.3, 30.0, -40.0]
    np.testing.assert_array_equal(processor.scale_proprio(gone), processor.scale_proprio(there))
    gone[:, 1] += 0.1
    assert not np.array_equal(processor.scale_proprio(gone), processor.scale_proprio(there))
