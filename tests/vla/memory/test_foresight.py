"""Where the robot will stop next: found in hindsight, told from what has changed, learnt by every frame."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.memory.test_policy import remembering
from tests.vla.training.test_train import demos
from vla.backbones.features import Features
from vla.data.feature_cache import encode_demos
from vla.model.memory.foresight import BINS, CHANNELS, GRID, LIMIT, Foresight, changes, sketch_of, stops
from vla.training.sampling import batch_frames, mixed_frames, moving_often

CELLS = GRID * GRID


def test_it_stops_where_it_stands_still_elsewhere_and_else_at_the_episodes_end():
    rest, way, end = np.zeros((5, 2)), np.array([[0.5, 0], [1, 0], [1.5, 0]]), np.full((4, 2), [2, 0])
    beyond = np.array([[2, 1], [2, 2.0]])
    one = np.concatenate([rest, way, end, beyond]).astype(np.float32)
    state, episode = np.concatenate([one, one + 9]), np.repeat([3, 5], len(one))
    found = stops(state, episode)
    # It rests at 2 from frame 9 on; from 1 (frame 6) that is not elsewhere, nor from where it stands itself.
    assert found[:14].tolist() == [9] * 6 + [13] * 8
    np.testing.assert_array_equal(found[14:], found[:14] + 14)


def test_a_sketch_is_the_mean_of_the_tokens_in_a_place_and_leaves_out_what_is_no_token():
    torch.manual_seed(0)
    coords = torch.tensor([[-0.9, -0.9, 0], [-0.7, -0.8, 0], [0.9, 0.9, 1], [-0.9, -0.9, 1]])
    raw = torch.randn(2, 1, 4, 24)
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    sketch = sketch_of(Features(raw, mask, raw, None, coords), 2).view(2, 2, CELLS, CHANNELS)
    normal = torch.nn.functional.layer_norm(raw[:, 0], (24,))
    basis = torch.tensor(
        [[np.sqrt(2 / 24) * np.cos(np.pi * (c + 0.5) * k / 24) for k in range(1, CHANNELS + 1)] for c in range(24)]
    ).float()
    torch.testing.assert_close(sketch[0, 0, 0], normal[0, :2].mean(0) @ basis)
    torch.testing.assert_close(sketch[1, 0, 0], normal[1, 0] @ basis)
    torch.testing.assert_close(sketch[:, 1, -1], normal[:, 2] @ basis)
    assert not sketch[:, 0, 1:].any()


def test_what_flashed_in_one_frame_stands_out_at_its_place_and_in_no_frame_that_is_not_kept():
    torch.manual_seed(0)
    still = torch.randn(1, 1, 2, CELLS, CHANNELS)
    frames = still + 0.01 * torch.randn(1, 4, 2, CELLS, CHANNELS)
    frames[:, :, 1] += torch.randn(1, 4, CELLS, CHANNELS)  # a hand's camera: all of it moves
    frames[0, 2, 0, 7] += 1.0
    kept = torch.ones(1, 4, dtype=torch.bool)
    now = frames[:, 3].flatten(1)
    found = changes(frames.flatten(2), now, kept, 2).view(2, CELLS)
    assert found[0].argmax() == 7 and found[0, 7] > 3 and found.sum() - found[0, 7] < 0.1 * found[0, 7]
    kept[0, 2] = False
    assert changes(frames.flatten(2), now, kept, 2).view(2, CELLS)[0, 7] < 0.1
    kept[0, 1] = False
    garbage = frames.clone()
    garbage[0, 1:3] = -100 * torch.rand(2, 2, CELLS, CHANNELS) ** 8
    torch.testing.assert_close(changes(garbage.flatten(2), now, kept, 2), changes(frames.flatten(2), now, kept, 2))


def test_of_two_places_it_says_one_and_none_between_them():
    net = Foresight(frames=2, views=1, proprio_dim=1, word_width=4).eval()
    for low, high, expected in ((0.4, 0.6, 1.0), (0.6, 0.4, -1.0)):
        share = torch.full((1, 1, BINS), 1e-6)
        share[0, 0, 2], share[0, 0, BINS - 3] = low, high
        assert net.place(share.log()).item() == pytest.approx(expected, abs=1e-3)
    for value in (-2.0, -1.33, -0.04, 0.0, 0.71, LIMIT):
        target = (1 - ((min(max(value, -LIMIT), LIMIT) + LIMIT) / 0.2 - torch.arange(BINS)).abs()).clamp(min=1e-9)
        logits = target.log()[None, None]
        state = torch.tensor([[value]])
        assert net.place(logits).item() == pytest.approx(min(max(value, -LIMIT), LIMIT), abs=1e-3)
        entropy = -(target * target.clamp(min=1e-9).log()).sum().item()
        assert net.loss(logits, state).item() == pytest.approx(entropy, abs=1e-3)
        assert net.loss(torch.randn(1, 1, BINS), state) > entropy


def test_the_bridge_goes_by_the_place_that_it_is_told_while_it_learns_and_else_by_the_one_foreseen():
    data = demos(episodes=2, length=13)
    vla = remembering()
    encoded = encode_demos(vla, data)
    batch = encoded.take(torch.arange(26))
    assert batch.seen.stop_BP.shape == batch.proprio_BP.shape and batch.seen.words_BD is None
    memory = vla.bridge.memory
    own = replace(batch.seen, stop_BP=None)
    place = memory.foresight.place(memory.foreseen(own, batch.proprio_BP))
    with torch.no_grad():
        foreseen = vla.act(own, batch.proprio_BP)
        torch.testing.assert_close(vla.act(replace(own, stop_BP=place), batch.proprio_BP), foreseen)
        assert (vla.act(replace(own, stop_BP=place + 1), batch.proprio_BP) - foreseen).abs().max() > 1e-4
    loss, _ = vla.loss(batch.seen, batch.proprio_BP, batch.action_BCA, batch.mask)
    alone, _ = vla.loss(own, batch.proprio_BP, batch.action_BCA, batch.mask)
    assert loss > alone
    loss.backward()
    assert memory.foresight.words.weight.grad.abs().max() > 0


def test_frames_in_which_the_robot_is_about_to_move_are_drawn_more_often_and_every_frame_is():
    state = np.zeros((60, 2), np.float32)
    state[28:30, 0], state[30:40, 0] = 1.5, 3.0  # the episode of the first 40 moves once, that of the rest never
    state[40:] = 7.0
    often = moving_often(state, np.repeat([0, 1], [40, 20]), 4)
    counts = torch.bincount(often, minlength=60)
    moving = torch.zeros(60, dtype=torch.bool)
    moving[24:30] = True
    assert (counts[~moving] == 1).all() and (counts[moving] == counts[26]).all()
    assert counts[moving].sum() / counts.sum() == pytest.approx(0.6, abs=0.02)
    drawn = torch.cat([mixed_frames(0, step, len(often) // 4, (60,), None, [often]) for step in range(4)])
    assert torch.equal(torch.bincount(drawn, minlength=60), counts)
    both = mixed_frames(0, 0, 8, (60, 60), None, [often, often])
    assert both.min() >= 0 and both.max() < 120 and (both >= 60).sum() == 4
    assert torch.equal(mixed_frames(0, 5, 8, (60,), None), batch_frames(0, 5, 8, 60))
    assert len(moving_often(state[40:], np.zeros(20, np.int64), 4)) == 20
