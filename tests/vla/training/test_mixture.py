"""One policy from two robots' demonstrations: places by name, own statistics, and a loss that never sees padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import load_toy, toy_backbone
from tests.vla.training.test_train import CONFIG, Killed, assert_bit_equal, demos, interrupt_at, kill, metrics, weights
from vla.data.batches import Joined, LiveDemos
from vla.data.feature_cache import encode_demos
from vla.model.heads.registry import masked_l1
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.training.multi_robot import (
    align_cameras,
    align_names,
    alike,
    build_vla,
    unlike_rates,
    unlike_units,
    unshared_components,
)
from vla.training.sampling import mixed_frames
from vla.training.train import train


def arm():
    return demos()  # cameras front and wrist, state a..e, action dx dy dz gripper


def hand():
    """One camera of another name, a state that shares "c", an action that shares "gripper"; other units."""
    data, rng = demos(episodes=3, length=5, seed=1), np.random.default_rng(5)
    return replace(
        data,
        images={"top": data.images["front"]},
        proprio=(100 + 10 * rng.normal(size=(15, 2))).astype(np.float32),
        action=(rng.normal(size=(15, 3)) * [1, 5, 50]).astype(np.float32),
        action_names=("gripper", "finger", "thumb"),
        proprio_names=("c", "z"),
    )


BOTH = {"arm": arm(), "hand": hand()}
CFG = replace(CONFIG, weights=(1.0, 1.0))


def policy(cfg=CFG, parts=None):
    return build_vla(cfg, parts or BOTH, backbone=toy_backbone(point_dim=6))


def test_names_find_their_places():
    assert align_names([("a", "b"), ("c", "b")]) == ([(0, 1), (2, 1)], 3)
    assert align_cameras([("front", "wrist"), ("top",)]) == [("front", "wrist"), ("top", "")]
    assert align_cameras([("front", "wrist"), ("top", "front"), ("wrist",)]) == [
        ("front", "wrist"), ("front", "top"), ("", "wrist"),
    ]  # fmt: skip
    assert align_cameras([("a",), ("b", "c", "a")]) == [("a", "", ""), ("a", "b", "c")]


@pytest.mark.parametrize(
    ("here", "there", "shown"),
    [
        (("elbow", "grip"), ("elbow.pos", "grip.pos"), "('elbow', 'elbow.pos')"),
        (("main_elbow", "main_grip"), ("grip.pos", "elbow.pos"), "('main_elbow', 'elbow.pos')"),
        (("grip", "joint_1"), ("grip", "Joint1"), "('joint_1', 'Joint1')"),
        (("elbow", "grip"), ("grip", "elbow"), None),
        (("elbow", "grip"), ("shoulder", "grip"), None),
        (("elbow", "grip"), ("elbow.pos", "grip.pos", "wrist.pos"), None),
    ],
)
def test_one_robot_named_in_two_ways_is_told(here, there, shown):
    def named(*names):
        return replace(arm(), action=arm().action[:, : len(names)], action_names=names)

    lines = unshared_components({"old": named(*here), "new": named(*there)})
    told = f"old and new name components of 'action' differently {shown}: these are learnt as those of two"
    assert [line.startswith(told) for line in lines] == ([True] if shown else [])


def test_a_space_that_leaves_every_action_as_recorded_is_refused():
    names = tuple(f"d{axis}" for axis in "xyz"[: arm().action.shape[1]])
    part = replace(arm(), action=arm().action[:, : len(names)], action_names=names)
    with pytest.raises(ValueError, match="--action-space delta changes nothing of dx"):
        policy(replace(CONFIG, action_space=("delta",)), part)
    assert policy(replace(CONFIG, action_space=("recorded",)), part).processor.config.action_space is None


def test_unlike_rates_are_told():
    slow = {"arm": arm(), "slow": replace(arm(), fps=arm().fps / 2)}
    (line,) = unlike_rates(CFG.model, slow)
    assert f"{CFG.model.chunk_size} actions lasts " in line and f"for slow ({arm().fps / 2:g} Hz)" in line
    assert unlike_rates(CFG.model, {"arm": arm(), "other": replace(arm(), fps=arm().fps * 1.0001)}) == []


def test_degrees_beside_radians_and_one_recording_twice_are_told():
    joints = replace(arm(), proprio=np.full(arm().proprio.shape, 40.0, np.float32) + arm().proprio)
    radians = replace(joints, proprio=np.deg2rad(joints.proprio).astype(np.float32))
    (line,) = unlike_units({"deg": joints, "rad": radians})
    assert line.startswith("the states of deg and rad have the same names and differ some 57 times")
    assert unlike_units({"deg": joints, "twice": replace(joints, proprio=2 * joints.proprio), "hand": hand()}) == []
    assert alike({"one": joints, "rad": radians, "hand": hand()}) == []
    (line,) = alike({"one": joints, "rad": radians, "link": replace(joints)})
    assert line.startswith("one and link are the same recording, learnt as those of two robots")


def test_each_robot_keeps_its_own_units_and_places():
    vla = policy()
    assert vla.action_dim == 6 and vla.processor.proprio_width == 6
    one, two = vla.members["arm"], vla.members["hand"]
    assert two.config.action_slots == (3, 4, 5) and two.config.proprio_slots == (2, 5)
    assert two.action_mask.tolist() == [0, 0, 0, 1, 1, 1] and one.action_mask.tolist() == [1, 1, 1, 1, 0, 0]
    action = BOTH["hand"].action
    normal = two.normalise_action(action)
    assert normal.shape == (15, 6) and (normal[:, :3] == 0).all()
    np.testing.assert_array_equal(two.normalise_action(torch.from_numpy(action)).numpy(), normal)
    np.testing.assert_allclose(two.unnormalise_action(normal), action, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(two.unnormalise_action(torch.from_numpy(normal)).numpy(), action, rtol=1e-5, atol=1e-5)
    # Within its own quantiles, though the other robot's units are a thousand times smaller.
    assert 0.5 < np.abs(normal[:, 5]).max() < 1.5
    inp = two.prepare(BOTH["hand"].observation(slice(0, 4)))
    assert (inp.images_BVHWC[:, 1] == 0).all() and inp.images_BVHWC[:, 0].any()
    assert (inp.proprio_BP[:, [0, 1, 3, 4]] == 0).all() and inp.proprio_BP[:, [2, 5]].all()


@pytest.mark.parametrize("freeze", [True, False])
def test_the_loss_never_sees_padding(freeze):
    cfg = replace(CFG, model=replace(CFG.model, freeze_backbone=freeze))
    vla = policy(cfg).eval()
    kind = (
        (lambda name: encode_demos(vla, BOTH[name], processor=vla.members[name]))
        if freeze
        else (lambda name: LiveDemos(vla.members[name], BOTH[name], vla.chunk_size))
    )
    source = Joined([kind("arm"), kind("hand")])
    assert source.sizes == (24, 15)
    frames = torch.tensor([30, 2, 38, 5])  # of the hand, the arm, the hand's last frame, the arm's sixth
    batch = source.take(frames)
    assert batch.mask.shape == (4, 4, 6)
    assert batch.mask[2].sum() == 3 and batch.mask[0, 0].tolist() == [0, 0, 0, 1, 1, 1]  # last frame: one step is real
    assert batch.weight == source.weigh(frames) == batch.mask.sum()
    features = batch.seen if freeze else vla.encode(batch.seen)
    loss = lambda action: vla.loss(features, batch.proprio_BP, action, batch.mask)[0]  # noqa: E731
    poisoned = torch.where(batch.mask > 0, batch.action_BCA, torch.full_like(batch.action_BCA, 1e6))
    assert loss(poisoned) == loss(batch.action_BCA)
    action = batch.action_BCA.clone().requires_grad_()
    loss(action).backward()
    assert ((action.grad != 0) == (batch.mask > 0)).all()
    # and the mean is over what is real
    error = torch.ones(4, 4, 6)
    assert masked_l1(error * batch.mask, batch.mask) == 1.0
    # each frame is that of its own robot, in the order asked for
    for place, (name, local) in enumerate([("hand", 6), ("arm", 2), ("hand", 14), ("arm", 5)]):
        own = vla.members[name].normalise_proprio(BOTH[name].proprio[[local]])
        assert torch.equal(batch.proprio_BP[[place]], own)


def test_datasets_are_drawn_as_weighted():
    sizes = (24, 15)
    for weights_, share in (((1.0, 3.0), 0.25), (None, 24 / 39), ((9.0, 1.0), 0.9)):
        counts = [int((mixed_frames(0, step, 10, sizes, weights_) < 24).sum()) for step in range(200)]
        assert np.mean(counts) == pytest.approx(10 * share, abs=0.15)
        assert {int(np.floor(10 * share)), int(np.ceil(10 * share))} >= set(counts)  # every batch, to within one
    first = mixed_frames(0, 3, 10, sizes, None)
    assert torch.equal(first, mixed_frames(0, 3, 10, sizes, None))
    assert not torch.equal(first, mixed_frames(0, 4, 10, sizes, None))
    every = torch.cat([mixed_frames(1, step, 10, sizes, (1.0, 1.0)) for step in range(60)])
    assert set(every.tolist()) == set(range(39))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_mixture_trains_resumes_and_serves_each_robot(tmp_path, freeze):
    cfg = replace(CFG, model=replace(CFG.model, freeze_backbone=freeze))
    straight = policy(cfg)
    train(cfg, straight, BOTH, tmp_path / "a")
    with pytest.raises(Killed):
        train(cfg, policy(cfg), BOTH, tmp_path / "b", on_step=interrupt_at(6, kill))
    resumed = VLA.load(tmp_path / "b", load_backbone=load_toy, merge=False)
    train(cfg, resumed, BOTH, tmp_path / "b", resume=True)
    assert_bit_equal(weights(resumed), weights(straight))
    for name, part in BOTH.items():
        vla = VLA.load(tmp_path / "a", load_backbone=load_toy, member=name)
        assert vla.processor.stats == part.stats()
        action = VLAPolicy(vla).act(part.observation(slice(0, 3)))
        assert action.shape == (3, 4, part.action.shape[1])
        assert (action >= part.action.min(0) - 1e-5).all() and (action <= part.action.max(0) + 1e-5).all()
    assert VLAPolicy(VLA.load(tmp_path / "a", load_backbone=load_toy, member="hand")).spec.cameras == ("top",)


def test_it_learns_both_robots(tmp_path):
    cfg = replace(CFG, steps=200, lr=4e-3, batch_size=24, save_every=999, log_every=20)
    train(cfg, policy(cfg), BOTH, tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    # each robot's own loss fell, not only the easier one's
    for name, part in BOTH.items():
        vla = VLA.load(tmp_path, load_backbone=load_toy, member=name)
        chunk, mask = part.chunks(4)
        scale = part.action.std(0)
        error = np.abs(vla.predict(vla.processor.prepare(part.observation(slice(None)))) - chunk)[mask > 0] / scale
        assert error.mean() < 0.5 * (np.abs(chunk - part.action.mean(0))[mask > 0] / scale).mean(), name


def test_what_does_not_fit_is_named(tmp_path):
    vla = policy()
    with pytest.raises(ValueError, match="not built for the dataset 'leg' but for: arm, hand"):
        train(CFG, vla, {"arm": BOTH["arm"], "leg": BOTH["hand"]}, tmp_path)
    with pytest.raises(ValueError, match="2 datasets need 2 weights, got 3"):
        policy(replace(CFG, weights=(1.0, 1.0, 1.0)))
    twice = {**BOTH, "hand": replace(BOTH["hand"], action_names=("x", "x", "y"))}
    with pytest.raises(ValueError, match="feature 'action' of hand names a component twice"):
        policy(parts=twice)
    with pytest.raises(ValueError, match="components"):
        vla.members["hand"].normalise_action(np.zeros((2, 6)))
