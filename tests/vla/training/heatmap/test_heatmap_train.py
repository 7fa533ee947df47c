"""Heat-map policies from a few demonstrations: built, trained, saved, loaded, refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.load import load_policy
from tests.vla.training.heatmap.toy_demos import NAMES, SIZE, toy_demos, turning_demos
from vla.data.camera_geometry import out_of_reach, shares_within
from vla.model.heatmap.config import BODIES, HeatmapConfig
from vla.model.heatmap.head import Seen
from vla.model.heatmap.policy import HeatmapPolicy
from vla.model.heatmap.pretrained import read_head, write_head
from vla.model.xyz import back_project
from vla.training.heatmap.learning import errors_mm, learn, loss_of
from vla.training.heatmap.looks import encode
from vla.training.heatmap.train import HeatmapTrainConfig, build, tasks_of, train

CONFIG = HeatmapTrainConfig(
    model=HeatmapConfig(width=16, picture_size=SIZE), pretrained=None, steps=2, batch_size=2, frames_per_keyframe=2
)


@pytest.fixture(scope="module")
def policy():
    return build(CONFIG, toy_demos())


def test_a_policy_moves_within_its_bounds_and_says_what_it_reads(policy):
    demos = toy_demos()
    obs = demos.observation([0, 30])
    chunk = policy.act(obs)
    spec = policy.spec
    assert chunk.shape == (2, 12, 4) and spec.chunk_size == spec.n_action_steps == 12
    assert spec.depth and spec.cameras == ("front", "wrist") and spec.proprio_names == NAMES
    low, high = np.array(spec.action_spec.low), np.array(spec.action_spec.high)
    assert (chunk >= low - 1e-6).all() and (chunk <= high + 1e-6).all()
    assert policy.model.config.motion.metres_per_action == pytest.approx(0.02, rel=1e-3)


def test_what_is_over_stands_still_and_changes_nothing_for_others(policy):
    obs = toy_demos().observation([0, 30])
    obs.live = np.array([False, True])
    chunk = policy.act(obs)
    assert (chunk[0, :, :3] == 0).all() and (chunk[0, :, 3] == 1).all()
    np.testing.assert_allclose(chunk[1:], policy.act(obs.select([1])), atol=1e-5)


def test_trained_saved_and_loaded_it_acts_the_same(tmp_path):
    demos, policy = toy_demos(), build(CONFIG, toy_demos())
    figures = train(CONFIG, policy, demos, tmp_path / "policy")
    assert figures["looks"] == 2 * 2 * 2 * 2  # two looks of two frames of two keyframes of two episodes
    again = load_policy(tmp_path / "policy")
    assert isinstance(again, HeatmapPolicy) and again.model.config == policy.model.config
    obs = demos.observation([3, 25])
    np.testing.assert_allclose(again.act(obs), policy.act(obs), atol=1e-6)
    with pytest.raises(ValueError, match="--out"):
        train(CONFIG, policy, demos, tmp_path / "policy")


def test_a_head_learns_where_its_keyframes_are(policy):
    demos = toy_demos()
    mine = build(replace(CONFIG, frames_per_keyframe=1), demos)
    tasks, total = tasks_of(replace(CONFIG, frames_per_keyframe=1), mine, demos)
    lesson = encode(mine.model, tasks, torch.Generator().manual_seed(0), shift_m=0.0)
    assert total == 4 and lesson.batch_size == 8
    before = float(sum(loss_of(mine.model, lesson)).detach())
    learn(mine.model, lesson, steps=40, batch_size=8, lr=6e-4, seed=0)
    assert float(sum(loss_of(mine.model, lesson)).detach()) < 0.6 * before
    zoomed = lesson.half_B < 0.1
    assert float(errors_mm(mine.model, lesson)[zoomed].median()) < 30


def test_a_backbone_without_a_finer_look_gives_heat_maps_of_its_tokens():
    demos = toy_demos()
    plain = build(replace(CONFIG, model=replace(CONFIG.model, backbone="tiny")), demos)
    head, size = plain.model.head, plain.model.config.workspace.resolution
    assert head.from_fine is None and size == plain.model.backbone.image_size == head.factor * plain.model.backbone.side
    assert plain.act(demos.observation([0])).shape == (1, 12, 4)


def test_labels_turn_with_the_scene():
    """Without a turn a keyframe is where the hand will be; with one it keeps its distance from the middle."""
    demos, policy = toy_demos(), build(CONFIG, toy_demos())
    plain, turned = (
        next(tasks_of(replace(CONFIG, turn_deg=degrees), policy, demos)[0]) for degrees in (0.0, 90.0)
    )  # fmt: skip
    np.testing.assert_allclose(plain.at_B3[0], demos.proprio[15, :3], atol=1e-6)
    middle = torch.tensor(CONFIG.model.workspace.centre_m)
    for one, other in ((plain.at_B3, turned.at_B3), (plain.hand_B3, turned.hand_B3)):
        assert (one - middle).norm(dim=-1).allclose((other - middle).norm(dim=-1), atol=1e-5)
    assert not plain.at_B3.allclose(turned.at_B3, atol=1e-3)
    assert (plain.at_B3 - plain.hand_B3).norm(dim=-1).allclose((turned.at_B3 - turned.hand_B3).norm(dim=-1), atol=1e-5)


def test_the_task_is_over_where_a_demonstration_ends():
    """A frame of the end is seen half as often as a keyframe's, and says so; without `done` none is."""
    demos = toy_demos()
    told = build(replace(CONFIG, model=replace(CONFIG.model, done=True)), demos)
    tasks, total = tasks_of(CONFIG, told, demos)
    (task,) = tasks
    assert total == 2 * (2 * 2 + 1) and task.flags_BF[:, 2].tolist() == [0, 0, 0, 0, 1] * 2
    assert task.at_B3[4].allclose(task.hand_B3[4])
    plain = next(tasks_of(CONFIG, build(CONFIG, demos), demos)[0])
    assert plain.flags_BF.shape == (8, 2)


def test_a_hand_whose_task_is_over_stays_as_it_is(tmp_path):
    demos = toy_demos()
    policy = build(replace(CONFIG, model=replace(CONFIG.model, done=True)), demos)
    head = policy.model.head.flags.out
    for over, moves in ((9.0, False), (-9.0, True)):
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([-9.0, 0.0, over]))  # close the gripper; and it is over, or not
        policy.save(tmp_path / str(moves))
        chunk = load_policy(tmp_path / str(moves)).act(demos.observation([0, 30]))
        assert (chunk[..., :3] != 0).any() == moves
        assert (chunk[0, 0, 3], chunk[1, 0, 3]) == (1, -1)  # open and closed as they were


def test_a_hand_that_turns_is_known_by_its_names_and_plays(tmp_path):
    """The workspace is put around the hand, the scale of rotations measured, the gripper opened at its low end."""
    demos = turning_demos()
    policy = build(CONFIG, demos)
    config = policy.model.config
    assert config.body == BODIES["robosuite"] and config.workspace.centre_m[2] > 0.8
    assert config.motion.radians_per_action == pytest.approx(0.2, rel=1e-3)
    assert policy.model.state_dim == 2  # the fingers: neither place nor orientation
    policy = build(replace(CONFIG, model=replace(CONFIG.model, done=True)), demos)
    train(CONFIG, policy, demos, tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    obs = demos.observation([0, 50])
    chunk = again.act(obs)
    np.testing.assert_allclose(chunk, policy.act(obs), atol=1e-6)
    assert chunk.shape == (2, 12, 7) and chunk[0, 0, 6] == -1 and np.abs(chunk).max() <= 1
    with torch.no_grad():
        again.model.head.flags.out.bias.copy_(torch.tensor([9.0, 0.0, -9.0]))
        again.model.head.turn.out.weight.zero_()
        again.model.head.turn.out.bias.zero_()
        for axis, number in enumerate((36, 0, 6)):  # down, and turned by 30 degrees
            again.model.head.turn.out.bias[72 * axis + number] = 9.0
    turned = again.act(obs)
    scale = config.motion.radians_per_action
    fastest = policy.spec.action_spec.high[5]
    assert np.abs(turned[..., 3:5]).max() < 1e-6 and 0.05 < fastest < 0.3
    steps = np.ceil(np.pi / 6 / (scale * fastest))
    assert steps > 12 and scale * turned[0, :, 5].sum() == pytest.approx(12 / steps * np.pi / 6, rel=1e-3)
    near = replace(obs, proprio=demos.proprio[[14, 50]])  # there the hand is turned by 17 degrees already
    assert scale * again.act(near)[0, :, 5].sum() == pytest.approx(np.pi / 6 - 0.3, abs=1e-3)


def test_bins_turn_with_the_scene():
    demos = turning_demos()
    policy = build(CONFIG, demos)
    plain, turned = (next(tasks_of(replace(CONFIG, turn_deg=degrees), policy, demos)[0]) for degrees in (0.0, 60.0))
    for row, (yaw, keyframe) in enumerate([(0.3, 15)] * 2):
        assert plain.turn_B3[row].tolist() == [36, 0, round(np.rad2deg(yaw) / 5)], keyframe
    assert torch.equal(plain.turn_B3[:, :2], turned.turn_B3[:, :2])
    middle = torch.tensor(policy.model.config.workspace.centre_m)
    for row in range(len(plain.at_B3)):  # by as much as what is to be found has turned about the workspace's middle
        one, other = ((task.at_B3[row] - middle)[:2] for task in (plain, turned))
        angle = np.rad2deg(np.angle(complex(*other.tolist()) / complex(*one.tolist())))
        apart = (5 * int(turned.turn_B3[row, 2] - plain.turn_B3[row, 2]) - angle + 180) % 360 - 180
        assert abs(apart) <= 5


@pytest.mark.parametrize(
    ("demos", "words"),
    [
        ({"depth": False}, "--depth"),
        ({"action_names": ("dx", "dy", "dz", "roll", "gripper")}, "roll"),
        ({"still": True}, "displace"),
    ],
)
def test_demonstrations_that_do_not_fit_are_refused(demos, words):
    with pytest.raises(ValueError, match=words):
        build(CONFIG, toy_demos(**demos))


def test_a_robot_that_works_outside_of_the_workspace_is_refused(policy):
    demos = toy_demos()
    moved = demos.proprio.copy()
    moved[:, :3] += [0.0, 0.5, 0.0]
    with pytest.raises(ValueError, match=r"4 of 4 keyframes .* lie outside of the workspace, 0.28 m to each side"):
        tasks_of(CONFIG, policy, replace(demos, proprio=moved))


def test_cameras_that_see_nothing_of_the_workspace_are_told():
    """Extrinsics the wrong way round, which no single matrix shows."""
    demos = toy_demos()
    shares = shares_within(demos.geometry, CONFIG.model.workspace.centre_m, CONFIG.model.workspace.half_m)
    known = demos.geometry["front"].take(np.unique(np.linspace(0, 79, 16).astype(int)))
    depth = torch.from_numpy(known.depth_mm[:, None].astype(np.float32) / 1000)
    at, there = back_project(depth, *(torch.from_numpy(m)[:, None] for m in (known.intrinsics, known.extrinsics)))
    inside = ((at - torch.tensor(CONFIG.model.workspace.centre_m)).abs() <= CONFIG.model.workspace.half_m).all(-1)
    wanted = (inside & there)[..., ::4, ::4].sum() / there[..., ::4, ::4].sum()
    assert shares["front"] == pytest.approx(float(wanted)) and 0.3 < wanted < 1
    assert out_of_reach(demos.geometry, (0.5, 0.0, 0.1), 0.4) == []
    (line,) = out_of_reach(demos.geometry, (-0.5, 0.0, 0.1), 0.4)
    assert "(0.0% of 'front', 0.0% of 'wrist') lies within 0.4 m of (-0.5, 0, 0.1) m" in line
    turned = {
        name: replace(known, extrinsics=np.linalg.inv(known.extrinsics).astype(np.float32))
        for name, known in demos.geometry.items()
    }
    with pytest.raises(ValueError, match="measure nothing of the workspace, 0.28 m .* robot_from_camera"):
        build(CONFIG, replace(demos, geometry=turned))


def test_a_pretrained_head_is_taken_over_but_for_what_reads_the_state(policy, tmp_path):
    write_head(policy.model, tmp_path / "head.safetensors", {})
    other = build(replace(CONFIG, seed=5), toy_demos())
    read_head(other.model, str(tmp_path / "head.safetensors"))
    mine, theirs = policy.model.head.state_dict(), other.model.head.state_dict()
    assert torch.equal(mine["heat.weight"].half().float(), theirs["heat.weight"])
    assert not torch.equal(mine["choose.features.weight"], theirs["choose.features.weight"])
    wider = build(replace(CONFIG, model=replace(CONFIG.model, width=24)), toy_demos())
    with pytest.raises(ValueError, match="pre-train a head for this one"):
        read_head(wider.model, str(tmp_path / "head.safetensors"))


def test_the_gripper_tells_what_comes_next():
    """Scenes that differ in nothing but the gripper's state have different keyframes: a few steps must tell them."""
    torch.manual_seed(0)
    head = build(CONFIG, toy_demos()).model.head
    queries = torch.randn(1, 8, head.ask[0].in_features // 8).expand(8, -1, -1)
    seen = Seen(torch.zeros(8, 3, 36, 1), queries, None, None)
    state = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).repeat(4, 1)
    wanted = torch.tensor([0, 1]).repeat(4)
    optimiser = torch.optim.AdamW(head.choose.parameters(), lr=1.5e-3)
    for _ in range(40):
        optimiser.zero_grad()
        (-head.chosen_slot(seen, state)[torch.arange(8), wanted].log().mean()).backward()
        optimiser.step()
    assert (head.chosen_slot(seen, state)[torch.arange(8), wanted] > 0.8).all()
