"""The plane of the table: state seen from the hand, demonstrations turned about the vertical."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from envs import make_vec
from envs.registry import load_suite
from rl.configs.teacher import TeacherConfig
from rl.models.critic import privileged_state
from rl.models.vla_network import make_actor
from rl.teacher.state_teacher import Teacher, TeacherPolicy, fit_teacher
from rl.teacher.symmetry import from_hand, turned
from tests.rl.toy import CHUNK, SPEC, ToyVLA, demos, evaluate
from vla.core.types import PlanarSymmetry

REACH = PlanarSymmetry(hand=(0, 1), places=((0, 1),), offsets=((2, 3),), turns=True)
HAND = TeacherConfig(count=1, width=64, steps=300, floor=0.05, origin="hand")


def worth_of(teacher):
    return evaluate(TeacherPolicy(teacher, make_actor(ToyVLA(), SPEC.names), SPEC, CHUNK))[0] / 200


def test_one_demonstration_serves_everywhere_once_it_is_turned():
    one, processor = demos(1), ToyVLA().processor
    there = worth_of(fit_teacher(one, processor, CHUNK, replace(HAND, origin="world")))
    shifted = worth_of(fit_teacher(one, processor, CHUNK, HAND, plane=REACH))
    everywhere = worth_of(fit_teacher(one, processor, CHUNK, replace(HAND, turns=12), plane=REACH))
    assert there < 0.25 and shifted < 0.5 and everywhere > 0.8


def test_a_teacher_that_sees_from_its_hand_does_not_know_where_it_is():
    teacher = fit_teacher(demos(3), ToyVLA().processor, CHUNK, HAND, plane=REACH)
    state = 0.4 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    moved = state.clone()
    moved[:, [0, 4]] += 0.7  # the goal and the hand
    moved[:, [1, 5]] -= 0.3
    assert torch.allclose(teacher(moved), teacher(state), atol=1e-5)
    moved[:, 2] += 0.5  # what lies between them
    assert (teacher(moved) - teacher(state)).abs().mean() > 0.05
    aware = fit_teacher(demos(3), ToyVLA().processor, CHUNK, replace(HAND, origin="world"))
    moved = state + torch.tensor([0.7, -0.3, 0.0, 0.0, 0.7, -0.3])
    assert (aware(moved) - aware(state)).abs().mean() > 0.05


def test_what_demonstrations_hardly_vary_says_little_above_the_floor():
    data, processor = demos(20), ToyVLA().processor
    still = replace(data, privileged=data.privileged.copy())
    still.privileged[:, 2] = 0.3  # as if the way to go in x were always the same
    moved = {}
    for floor in (1e-3, 1.0):
        teacher = fit_teacher(still, processor, CHUNK, replace(HAND, origin="world", floor=floor))
        state = torch.from_numpy(np.concatenate([still.privileged, still.proprio], 1))
        another = state.clone()
        another[:, 2] += 0.05
        moved[floor] = float((teacher(another) - teacher(state)).abs().mean())
    assert moved[1.0] < 0.1 * moved[1e-3]


def test_turning_keeps_lengths_and_heights_and_what_an_action_does():
    generator = np.random.default_rng(0)
    state = torch.from_numpy(generator.normal(size=(7, 6)).astype(np.float32))
    chunks = generator.normal(size=(7, CHUNK, 3)).astype(np.float32)
    states, actions = turned(state, chunks, ((0, 1), (2, 3)), SPEC.names, 4)
    assert states.shape == (28, 6) and actions.shape == (28, CHUNK, 3)
    assert torch.equal(states[:7], state) and np.array_equal(actions[:7], chunks)
    quarter = states[7:14]
    assert torch.allclose(
        quarter[:, :4], torch.stack([-state[:, 1], state[:, 0], -state[:, 3], state[:, 2]], 1), atol=1e-6
    )
    assert torch.equal(quarter[:, 4:], state[:, 4:]) and np.array_equal(actions[7:14, :, 2], chunks[:, :, 2])
    assert np.allclose(actions[7:14, :, 0], -chunks[:, :, 1], atol=1e-6)
    # moved by its action, a turned scene is the moved scene, turned
    for k in range(4):
        part = slice(7 * k, 7 * k + 7)
        after = states[part, :2].numpy() + actions[part, 0, :2]
        expected = state[:, :2].numpy() + chunks[:, 0, :2]
        assert np.allclose(np.linalg.norm(after, axis=1), np.linalg.norm(expected, axis=1), atol=1e-5)
    with pytest.raises(ValueError, match="'dy'"):
        turned(state, chunks, (), ("dx", "height", "gripper"), 2)


@pytest.mark.parametrize("name", ["tabletop-pick", "tabletop-ten"])
def test_a_suites_plane_is_what_its_worlds_tell(name):
    suite = load_suite(name)
    env = make_vec(name, 3, num_workers=1)
    try:
        env.set_rendering(False)
        obs = env.reset(seeds=[1, 2, 3])
        for _ in range(4):
            state, plane = privileged_state(obs).numpy(), suite.plane
            view, pairs = from_hand(plane, env.privileged_dim, env.proprio_dim)
            seen = state @ view.numpy()
            # the subject and the command are where the hand sees them: state and proprio tell that, too
            assert np.allclose(seen[:, [0, 1]], state[:, [3, 4]], atol=1e-6)
            lead = env.privileged_dim + np.array(plane.hand_offsets[0])
            assert np.allclose(seen[:, [13, 14]], state[:, lead], atol=1e-6)
            assert not seen[:, env.privileged_dim + np.array(plane.hand)].any()
            untouched = [
                i for i in range(state.shape[1]) if i not in (0, 1, 13, 14, *(env.privileged_dim + np.arange(2)))
            ]
            assert np.array_equal(seen[:, untouched], state[:, untouched])
            assert len(set(sum(pairs, ()))) == 2 * len(pairs) == 10
            moves = np.zeros((3, 1, env.action_spec.dim), np.float32)
            moves[:, :, :2] = [[0.5, -1.0]], [[1.0, 0.2]], [[-0.3, 0.9]]
            obs = env.step_chunk(moves).obs
    finally:
        env.close()
    assert suite.plane.turns == (name == "tabletop-pick")


@pytest.mark.parametrize(
    ("name", "place", "offset"),
    [("robosuite-lift", (0, 1), (8, 9)), ("robosuite-can", (0, 1), (8, 9)), ("robosuite-square", (4, 5), (10, 11))],
)
def test_robosuites_planes_are_what_its_worlds_tell(name, place, offset):
    pytest.importorskip("robosuite")
    env = make_vec(name, 1, num_workers=1)
    try:
        env.set_rendering(False)
        state = privileged_state(env.reset(seeds=[5_000_001])).numpy()
        view, pairs = from_hand(env.suite.plane, env.privileged_dim, env.proprio_dim)
        seen = state @ view.numpy()
        assert np.allclose(seen[:, place], state[:, offset], atol=1e-6) and np.abs(seen[:, offset]).max() > 1e-4
        assert {place, offset} <= set(pairs) and not env.suite.plane.turns
        assert not seen[:, [env.privileged_dim, env.privileged_dim + 1]].any()
    finally:
        env.close()


def test_what_cannot_be_is_said(cloned):
    one, processor = demos(1), ToyVLA().processor
    with pytest.raises(ValueError, match='origin to "world"'):
        fit_teacher(one, processor, CHUNK, HAND)
    with pytest.raises(ValueError, match="set turns to 1"):
        fit_teacher(one, processor, CHUNK, replace(HAND, turns=4), plane=replace(REACH, turns=False))
    assert 'set its origin to "hand"' in TeacherConfig(turns=2).problem()
    assert "its floor above 0" in TeacherConfig(floor=0.0).problem()


def test_an_older_checkpoints_teacher_sees_as_it_did():
    teacher = fit_teacher(demos(2), ToyVLA().processor, CHUNK, replace(HAND, origin="world"))
    tensors = teacher.state_dict()
    assert torch.equal(tensors.pop("view"), torch.eye(6))
    again = Teacher.from_tensors(tensors, CHUNK, HAND)
    state = torch.randn(9, 6)
    assert torch.equal(again(state), teacher(state))
