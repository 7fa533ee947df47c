"""Policies that meet environments and robots: the same names in another order are mended, all else is told."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_worlds import PROPRIO_NAMES
from envs.evaluation.evaluate import evaluate
from envs.experts.pick_place import TabletopExpert
from rl.runner import Runner
from vla.core.compatibility import Fit, Reordered, choose_embodiment, fit, fitted, require_same, side_of
from vla.core.types import ActionSpec, Observation, PolicySpec
from vla.processing.preprocess import ProcessorConfig

NAMES = ("dx", "dy", "dz", "gripper")


def spec(names=NAMES, hz=20.0, low=-1.0, high=1.0):
    return ActionSpec(tuple(names), (low,) * len(names), (high,) * len(names), hz)


def side(action=None, proprio_dim=None, proprio_names=None, cameras=None):
    return PolicySpec(action, cameras=cameras, proprio_dim=proprio_dim, proprio_names=proprio_names)


WORLD = side(spec(), len(PROPRIO_NAMES), PROPRIO_NAMES, ("front", "wrist"))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (side(spec(("joint_0", "joint_1", "joint_2", "joint_3"))), "joint_0, joint_1, joint_2, joint_3"),
        (side(spec(("dx", "dy", "dz"))), "3 components (dx, dy, dz)"),
        (side(spec(("dx", "dy", "dz", "dz"))), "dx, dy, dz, dz"),
        (side(spec(hz=7.0)), "7 Hz, the environment takes them at 20 Hz"),
        (side(spec([f"action_{i}" for i in range(4)], low=-3.0, high=3.0)), "action_0 ranges over -3..3"),
        (side(spec([f"action_{i}" for i in range(4)], hz=7.0)), "7 Hz"),
        (side(proprio_dim=7), "a state of 7 numbers"),
        (side(proprio_names=tuple("abcdefgh")), "the state a, b, c"),
        (side(cameras=("front", "top")), "it lacks 'top'"),
    ],
)
def test_what_differs_is_refused_in_one_line_that_names_both_sides(policy, words):
    with pytest.raises(ValueError) as refusal:
        fit(policy, WORLD)
    told = str(refusal.value)
    assert words in told and "the environment" in told and "\n" not in told
    if policy.action_spec is not None and "components" in told:
        assert "dx, dy, dz, gripper" in told, "both lists"


@pytest.mark.parametrize(
    "policy",
    [
        side(),
        side(spec(), 8, PROPRIO_NAMES, ("wrist",)),
        side(spec(hz=0.0)),  # a checkpoint that was never told
        side(spec(hz=19.9)),
        side(spec(("dx.vel", "dy.vel", "dz.vel", "gripper.pos"))),  # recorded by LeRobot's tools
        side(proprio_names=tuple(f"{name}.pos" for name in PROPRIO_NAMES)),
        side(proprio_names=tuple(f"observation.state_{i}" for i in range(8))),
    ],
)
def test_what_is_missing_or_written_otherwise_is_not_held_against_it(policy):
    assert fit(policy, WORLD) == Fit()


def test_actions_without_names_are_played_and_said():
    found = fit(side(spec([f"action_{i}" for i in range(4)])), WORLD)
    assert found.action_order is None and "taken for dx, dy, dz, gripper" in found.notices[0]


def test_a_kind_that_both_sides_write_down_must_be_the_same():
    with pytest.raises(ValueError, match="not the same components"):
        fit(side(spec(("x.pos", "y.pos"))), side(spec(("x.vel", "y.vel"))))


def test_named_actions_beyond_the_bounds_are_said_once():
    found = fit(side(spec(low=-10.0, high=10.0)), WORLD)
    assert len(found.notices) == 1 and "dx ranges over -10..10" in found.notices[0] and "cut off" in found.notices[0]


class Turned:
    """The expert of the tabletop, with its actions and the state it reads in another order."""

    spec = PolicySpec(spec(("gripper", "dz", "dy", "dx")), chunk_size=1, proprio_names=PROPRIO_NAMES[::-1])

    def __init__(self, worlds):
        self.expert, self.seen = TabletopExpert(worlds), None

    def reset(self, env_ids=None):
        self.expert.reset(env_ids)

    def act(self, obs):
        self.seen = obs.proprio
        right = Observation(obs.images, obs.proprio[:, ::-1], obs.instruction, obs.privileged)
        return self.expert.act(right)[..., ::-1]

    def answer(self, obs, questions):
        return [(state.tolist(), question) for state, question in zip(obs.proprio, questions, strict=True)]


def test_another_order_is_played_as_it_was_meant(caplog):
    """In the real worlds, through worker processes: 0 of 4 without the names."""
    env = make_vec("tabletop-pick", 2, num_workers=1)
    try:
        env.set_rendering(False)
        with caplog.at_level(logging.WARNING):
            report = evaluate(Turned(2), env, range(100, 104))
        assert report.successes == 4 and caplog.text.count("reordered by name") == 2
        obs = env.reset(seeds=[100, 101])
        turned = Turned(2)
        player = fitted(turned, env, say=lambda notice: None)
        player.act(obs)
        np.testing.assert_array_equal(turned.seen, obs.proprio[:, ::-1])
        said = player.answer(obs, ["what?", "where?"])
        assert said == [(obs.proprio[0, ::-1].tolist(), "what?"), (obs.proprio[1, ::-1].tolist(), "where?")]
        assert isinstance(player, Reordered) and player.spec.action_spec.names == env.action_spec.names
        assert player.spec.proprio_names == env.proprio_names == PROPRIO_NAMES
        assert fitted(player, env, say=lambda notice: pytest.fail(notice)) is player
    finally:
        env.close()


def test_training_refuses_another_order_with_the_remedy():
    with pytest.raises(ValueError, match=r"gripper, dz, dy, dx.* on dx, dy, dz, gripper.*demonstrations"):
        require_same(Turned(1), Toy(), remedy="reorder the demonstrations")


@dataclass
class Toy:
    action_spec: ActionSpec = spec()
    num_envs: int = 2
    horizon: int = 5


def test_online_rl_looks_before_it_begins(tmp_path):
    from rl.recipes import RECIPES

    class Model:
        action_spec = spec(("gripper", "dz", "dy", "dx"))

    config = RECIPES["smoke"]()
    with pytest.raises(ValueError, match="reorders, training does not"):
        Runner(Model(), Toy(num_envs=config.num_envs, horizon=config.horizon or 5), config, tmp_path)

    class Fits:
        action_spec = spec()

    class Demonstrations:
        action_spec = spec(("dx", "dz", "dy", "gripper"))

    world = Toy(num_envs=config.num_envs, horizon=config.horizon or 5)
    with pytest.raises(ValueError, match="the demonstrations on dx, dz, dy, gripper"):
        Runner(Fits(), world, config, tmp_path, demos=Demonstrations())


def test_sides_are_read_from_policies_clients_and_worlds():
    @dataclass
    class Processor:
        config: ProcessorConfig

    @dataclass
    class Policy:
        processor: Processor
        action_spec: ActionSpec = spec()

    config = ProcessorConfig(("front", ""), 2, NAMES, proprio_names=("a", "b"))
    assert side_of(Policy(Processor(config))) == side(spec(), 2, ("a", "b"), ("front",))

    class Client:
        spec = side(None, 8, None, ("front",))

    assert side_of(Client()) == Client.spec
    assert side_of(object()) == side()


def test_an_embodiment_is_chosen_where_there_are_several():
    assert choose_embodiment((), None, "p") is None and choose_embodiment(("a",), None, "p") is None
    assert choose_embodiment(("a", "b"), "b", "p") == "b"
    for names, wanted, words in (
        (("a", "b"), None, r"p controls 2 embodiments \(a, b\): choose one with --embodiment NAME"),
        (("a", "b"), "c", "p has no embodiment 'c'; it controls: a, b"),
        ((), "c", "leave out --embodiment c"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_embodiment(names, wanted, "p")


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ([(-1, 1)] * 4, [(-1, 1)] * 3 + [(0, 100)], "gripper ranges over -1..1, the robot's gripper over 0.."),
        ([(-100, 90)] * 4, [(-3.2, 3.2)] * 4, "dx over -3.2..3.2 (3 more are alike)"),
        ([(-1.2, 1.5)] * 4, [(-100, 100)] * 4, "dx over -100..100 (3 more are alike)"),
        ([(-1.2, 1.5)] + [(-40, 60)] * 3, [(-100, 100)] * 4, None),
        ([(-100, 90)] * 4, [(-np.inf, np.inf)] * 4, None),
        ([(-0.2, 0.3)] * 4, [(-1, 1)] * 4, None),
    ],
)  # fmt: skip
def test_ranges_that_differ_as_units_do_are_told_before_a_robot_moves(ours, theirs, told):
    policy, robot = (side(ActionSpec(NAMES, *map(tuple, zip(*part, strict=True)), 20.0)) for part in (ours, theirs))
    notices = fit(policy, robot, where="robot", ranges=False).notices
    assert [told in notice for notice in notices] == ([] if told is None else [True])
