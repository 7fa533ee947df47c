"""A policy's own episodes as a dataset: what was executed, how each ended, and readable by the stock LeRobotDataset."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from envs.demos.record import record
from envs.demos.rollout import PolicyWorld
from vla.core.types import ActionSpec
from vla.data.lerobot_dataset import load_dataset

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers inherit it, and import the toy world by name
import toy_demo_world as toy  # noqa: E402
import toy_policy  # noqa: E402

SIZE = 16
SEEDS = range(5)  # 3 fails


def logged(out, noise=0.0, **kwargs):
    policy = ("toy abc", partial(toy_policy.make, 2))
    return record(
        "toy", len(SEEDS), out, num_workers=1, image_size=SIZE, make_world=toy.fast_world, noise=noise, policy=policy,
        **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    return logged(tmp_path_factory.mktemp("logs") / "toy")


def test_failures_are_kept_and_every_frame_says_what_its_action_led_to(quiet):
    data = load_dataset(quiet)
    assert data.episodes == list(SEEDS)
    rows = [(seed, step) for seed in SEEDS for step in range(toy.length(seed))]
    ends = [step == toy.length(seed) - 1 for seed, step in rows]
    won = [end and toy.succeeds(seed) for (seed, _), end in zip(rows, ends, strict=True)]
    assert data.success.tolist() == won and sum(won) == 4
    np.testing.assert_array_equal(data.proprio, [toy.state(s, t) for s, t in rows])
    assert data.subset([1, 3]).success.tolist() == won[4:9] + won[15:19]
    assert json.loads((quiet / "meta" / "bascule.json").read_text())["policy"] == "toy abc"


def test_the_policy_is_asked_when_its_actions_are_done_and_told_of_new_episodes(quiet):
    data = load_dataset(quiet)
    asked = [seed_step[1] - seed_step[1] % 2 for seed_step in ((s, t) for s in SEEDS for t in range(toy.length(s)))]
    part = [t % 2 for s in SEEDS for t in range(toy.length(s))]
    # (decisions of this episode before, place in the chunk, what it saw at its decision)
    episode = np.repeat(list(SEEDS), [toy.length(s) for s in SEEDS])
    seen = [toy.state(s, t)[0] for s, t in zip(episode, asked, strict=True)]
    wanted = [[0.1 * t / 2, 0.1 * p, np.clip(x, -1, 1)] for t, p, x in zip(asked, part, seen, strict=True)]
    np.testing.assert_allclose(data.action, np.clip(wanted, toy.SPEC.low, toy.SPEC.high), atol=1e-6)


def test_the_recorded_action_is_the_one_that_was_executed(quiet, tmp_path):
    noisy, clean = load_dataset(logged(tmp_path / "noisy", noise=0.4)), load_dataset(quiet)
    moved = np.abs(noisy.action - clean.action)
    assert (moved[:, :2].max(0) > 0.05).all() and (moved[:, 2] == 0).all(), "all but the gripper"
    assert (np.abs(noisy.action[:, :2]) <= 0.5).all()
    world = PolicyWorld(toy.fast_world, partial(toy_policy.make, 2), "toy", SIZE)
    from envs.demos.episode import run_rollout

    episode = run_rollout(world, 1, 0.4)
    np.testing.assert_array_equal(episode.action, world.executed)
    np.testing.assert_array_equal(episode.action, noisy.action[noisy.episode_index == 1])


def test_a_policy_of_another_order_is_played_by_name_and_of_another_rate_not_at_all():
    from envs.demos.episode import run_rollout

    order = [2, 0, 1]
    names, low, high = (tuple(part[i] for i in order) for part in (toy.SPEC.names, toy.SPEC.low, toy.SPEC.high))
    spec = ActionSpec(names, low, high, toy.SPEC.control_hz)
    plain, turned = (
        run_rollout(PolicyWorld(toy.fast_world, partial(toy_policy.make, 2, **how), "toy", SIZE), 1, 0.0)
        for how in ({}, {"action_spec": spec})
    )
    # What the turned policy gives first is the gripper, then the toy's first and second component.
    assert not np.array_equal(plain.action, turned.action)
    wanted = [[0.1 * (t % 2), toy.state(1, t - t % 2)[0], 0.1 * (t // 2)] for t in range(toy.length(1))]
    np.testing.assert_allclose(turned.action, np.clip(wanted, toy.SPEC.low, toy.SPEC.high), atol=1e-6)
    other = ActionSpec(toy.SPEC.names, toy.SPEC.low, toy.SPEC.high, 3 * toy.SPEC.control_hz)
    with pytest.raises(ValueError, match="the suite toy takes them at"):
        PolicyWorld(toy.fast_world, partial(toy_policy.make, 2, action_spec=other), "toy", SIZE)


def test_stock_lerobot_reads_the_outcomes(quiet, tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    import lerobot.datasets

    stock, ours = lerobot.datasets.LeRobotDataset("local/toy", root=quiet), load_dataset(quiet)
    items = [stock[i] for i in range(len(stock))]
    assert [bool(item["next.success"]) for item in items] == ours.success.tolist()
    assert [float(item["next.reward"]) for item in items] == ours.success.astype(float).tolist()
    ends = np.append(np.diff(ours.episode_index) != 0, True)
    assert [bool(item["next.done"]) for item in items] == ends.tolist()


def test_another_policy_does_not_continue_a_recording(quiet):
    with pytest.raises(ValueError, match="holds a recording with policy 'toy abc'"):
        record(
            "toy", 5, quiet, num_workers=1, image_size=SIZE, make_world=toy.fast_world, noise=0.0,
            policy=("toy def", partial(toy_policy.make, 2)),
        )  # fmt: skip


def test_demonstrations_say_nothing_of_success(tmp_path):
    data = load_dataset(record("toy", 2, tmp_path / "demos", num_workers=1, image_size=SIZE, make_world=toy.fast_world))
    assert data.success is None
