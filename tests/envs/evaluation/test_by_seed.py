"""Every episode's end by its seed, the same however many environments and processes play; and when to stop."""

import numpy as np
import pytest

from envs.evaluation.evaluate import evaluate
from envs.experts.pick_place import TabletopExpert
from envs.make import make_cpu_vec
from envs.sim.render_options import RenderOptions
from vla.core.statistics import wilson95

SEEDS = range(5_000_000, 5_000_012)


class Moody(TabletopExpert):
    """The expert, which stands still where it is told of something red or blue."""

    def act(self, obs, **more):
        chunk = super().act(obs, **more)
        lazy = ["red" in words or "blue" in words for words in obs.instruction]
        return np.where(np.array(lazy)[:, None, None], 0, chunk)


def played(num_envs, num_workers, seeds=SEEDS, **more):
    env = make_cpu_vec("tabletop-pick", num_envs, num_workers=num_workers, phrasings="train", render=RenderOptions(32))
    env.set_rendering(False)
    try:
        return evaluate(Moody(num_envs), env, seeds, suite="tabletop-pick", **more)
    finally:
        env.close()


@pytest.fixture(scope="module")
def report():
    return played(4, 1)


def test_the_result_has_every_seed(report):
    by_seed = report.to_dict()["by_seed"]
    assert set(by_seed) == {"seed", "task", "phrasing", "outcome", "steps"}
    assert by_seed["seed"] == list(SEEDS) and set(by_seed["task"]) == set(report.per_task)
    assert by_seed["outcome"].count("success") == report.successes and 0 < report.successes < 12
    steps = [n for n, outcome in zip(by_seed["steps"], by_seed["outcome"], strict=True) if outcome == "success"]
    assert np.mean(steps) == report.mean_steps
    late = [n for n, outcome in zip(by_seed["steps"], by_seed["outcome"], strict=True) if outcome == "out of time"]
    assert set(late) == {report.horizon}


@pytest.mark.parametrize("num_envs, num_workers", [(4, 2), (5, 3)])
def test_the_episodes_are_the_same_with_other_workers(report, num_envs, num_workers):
    assert played(num_envs, num_workers).each == report.each


def test_an_evaluation_ends_when_its_interval_is_narrow(report):
    solved = [outcome == "success" for outcome in report.outcomes]
    widths = [np.diff(wilson95(sum(solved[:n]), n))[0] for n in range(1, 13)]
    width = 0.57  # three successes and nothing else are narrower: with six environments, these three end first
    fewest = 1 + next(k for k, found in enumerate(widths) if found <= width)
    assert 3 < fewest < 12
    assert solved[:6].count(True) == 3 and np.diff(wilson95(3, 3))[0] < width
    for num_envs in (2, 6):
        stopped = played(num_envs, 1, until_width=width)
        assert stopped.each == report.each[:fewest]
        assert (stopped.successes, stopped.episodes) == (sum(solved[:fewest]), fewest)
        assert stopped.seeds == (SEEDS[0], SEEDS[fewest - 1])
        assert sum(count.episodes for count in stopped.per_task.values()) == fewest
        assert stopped.to_dict()["until_width"] == width


def test_an_interval_that_stays_wide_takes_all_seeds():
    report = played(3, 1, SEEDS[:3], until_width=0.1)
    assert report.episodes == 3 and "until_width" not in played(3, 1, SEEDS[:3]).to_dict()
    with pytest.raises(ValueError, match="width lies between 0 and 1, got 10"):
        played(3, 1, SEEDS[:3], until_width=10)
