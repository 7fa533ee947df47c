"""The offline agent: its equations against slow ones, a chain whose values are known, what tells algorithms apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rl.configs.offline import ALGORITHMS, AgentConfig
from rl.offline.agent import Agent
from rl.offline.algorithms import BY_NAME, Opinion, Values, calibrated, conservative, imitate_the_better
from rl.offline.replay import Replay, Step
from tests.rl.offline.stub import ACTIONS, STEPS, StubVLA, seen

QUICK = AgentConfig(
    critic_width=32, critic_lr=3e-3, lr=3e-3, batch_size=32, target_rate=0.1, motion_std=0.05, gripper_std=0.05
)


def values(returned: float) -> Values:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(shape, generator=generator) for shape in ((2, 5, 6), (2, 5))]
    return Values(*draw, torch.full((5,), returned))


def test_every_algorithm_has_a_name() -> None:
    assert set(BY_NAME) == set(ALGORITHMS)


@pytest.mark.parametrize("returned", [-1.0, 0.4, 2.0])
def test_penalties_against_loops(returned: float) -> None:
    given, config = values(returned), AgentConfig(temperature=0.3)
    for penalty, bound in ((conservative, -math.inf), (calibrated, returned)):
        total = 0.0
        for critic in range(2):
            for state in range(5):
                every = [max(float(q), bound) for q in given.of_others_2BK[critic, state]]
                soft = 0.3 * math.log(sum(math.exp(q / 0.3) for q in every) / 6)
                total += (soft - float(given.of_data_2B[critic, state])) / 5
        assert float(penalty(given, config)) == pytest.approx(total, abs=1e-5)


def test_calibration_changes_nothing_where_values_are_above_the_returns() -> None:
    above, within = values(0.0), values(0.5)
    config = AgentConfig()
    assert torch.equal(calibrated(above, config), conservative(above, config))
    assert calibrated(within, config) > conservative(within, config)


def test_calibration_has_no_gradient_below_the_returns() -> None:
    given = values(0.5)
    others = given.of_others_2BK.clone().requires_grad_()
    calibrated(replace(given, of_others_2BK=others), AgentConfig()).backward()
    assert others.grad is not None
    assert (others.grad[others < 0.5] == 0).all() and (others.grad[others > 0.5] > 0).all()


def test_awac_weighs_by_advantage() -> None:
    log_prob = torch.zeros(3, requires_grad=True)
    opinion = Opinion(
        value_B=torch.zeros(3), log_prob_B=log_prob, departure_B=torch.zeros(3), succeeded_B=torch.zeros(3) > 0,
        advantage_B=torch.tensor([-1.0, 0.0, 1.0]),
    )  # fmt: skip
    imitate_the_better(opinion, AgentConfig(advantage_scale=1.0)).backward()
    assert log_prob.grad is not None
    expected = -torch.tensor([math.exp(-1), 1.0, math.e]) / 3
    torch.testing.assert_close(log_prob.grad, expected)


def chain(config: AgentConfig, at: float) -> Replay:
    """0 -> 1 -> 2 -> done, in chunks of 2, 1 and 2 control steps; and as many episodes from 3, which lead nowhere.
    Everywhere the action `at` was taken."""
    replay, action = Replay(200), torch.full((STEPS, len(ACTIONS)), at)
    for _ in range(20):
        lengths = (2, 1, 2)
        replay.add_episode(
            [
                Step(seen([k]), action, n, float(k == 2), 0.0 if k == 2 else config.gamma**n, seen([min(k + 1, 2)]))
                for k, n in enumerate(lengths)
            ]
        )
        replay.add_episode([Step(seen([3]), action, 2, 0.0, 0.0, seen([3]))])
    return replay


def learnt(config: AgentConfig, at: float, updates: int) -> tuple[Agent, torch.Tensor]:
    agent = Agent(StubVLA(), ACTIONS, STEPS, config, seed=0)  # type: ignore[arg-type]
    generator, replay = torch.Generator().manual_seed(0), chain(config, at)
    for _ in range(updates):
        agent.update(replay.sample(config.batch_size, generator), generator)
    return agent, agent.value(seen([0, 1, 2, 3]))


@pytest.mark.parametrize(("algorithm", "within"), [("rlpd", 0.05), ("cal-ql", 0.1)])
def test_values_of_a_chain_are_discounted_by_control_steps(algorithm: str, within: float) -> None:
    config = replace(QUICK, algorithm=algorithm, gamma=0.8, actor_every=10**9, penalty=0.02)
    _, found = learnt(config, 0.0, 300)
    torch.testing.assert_close(found, torch.tensor([0.8**3, 0.8, 1.0, 0.0]), atol=within, rtol=0)


def test_cal_ql_stops_pushing_at_what_the_data_returned_and_cql_does_not() -> None:
    config = replace(QUICK, gamma=0.8, actor_every=10**9, penalty=0.1)  # what the policy does was never taken
    _, clipped = learnt(replace(config, algorithm="cal-ql"), 0.6, 150)
    _, pushed = learnt(replace(config, algorithm="cql"), 0.6, 150)
    assert clipped.min() > -1.0 and pushed.max() < -3.0


def test_the_actor_goes_where_the_reward_was() -> None:
    for algorithm in ("rlpd", "awac", "filtered"):
        config = replace(QUICK, algorithm=algorithm, motion_std=0.3, gripper_std=0.3, anchor=0.01)
        agent = Agent(StubVLA(), ACTIONS, STEPS, config, seed=0)  # type: ignore[arg-type]
        generator, replay = torch.Generator().manual_seed(0), Replay(300)
        for _ in range(300):  # right is rewarded, left is not; what the gripper does is the same
            action = 1.2 * torch.rand(STEPS, 2, generator=generator) - 0.6
            replay.add_episode([Step(seen([0]), action, 2, float(action[:, 0].mean() > 0), 0.0, seen([0]))])
        for _ in range(150):
            agent.update(replay.sample(64, generator), generator)
        right, gripper = agent.vla.refiner.shift.tolist()  # type: ignore[union-attr]
        assert right > 0.05 and abs(gripper) < right / 2, (algorithm, right, gripper)


def test_the_first_policy_is_imitation_and_actions_stay_within_bounds() -> None:
    agent = Agent(StubVLA(), ACTIONS, STEPS, replace(QUICK, motion_std=3.0), seed=0)  # type: ignore[arg-type]
    assert torch.equal(agent.mean(seen([0, 1])), torch.zeros(2, STEPS, 2))
    drawn = agent.act(seen([0] * 50), torch.Generator().manual_seed(0))
    assert drawn[..., 0].abs().max() == 1.0


def test_an_agent_goes_on_as_it_was() -> None:
    config = replace(QUICK, algorithm="cal-ql")
    replay = chain(config, 0.1)

    def go_on(agent: Agent, updates: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(updates):
            agent.update(replay.sample(32, generator), generator)

    first = Agent(StubVLA(), ACTIONS, STEPS, config, seed=0)  # type: ignore[arg-type]
    go_on(first, 5, 1)
    second = Agent(StubVLA(), ACTIONS, STEPS, config, seed=7)  # type: ignore[arg-type]
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    import copy

    second.load(kept, copy.deepcopy(first.state()))
    go_on(first, 5, 2)
    go_on(second, 5, 2)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_wrong_configurations_are_told() -> None:
    with pytest.raises(ValueError, match="algorithm must be one of"):
        Agent(StubVLA(), ACTIONS, STEPS, AgentConfig(algorithm="sarsa"), seed=0)  # type: ignore[arg-type]
