"""Intervals and tests against published values, and the bootstrap against what it must cover."""

import numpy as np
import pytest

from vla.core.statistics import (
    Pairs,
    bootstrap,
    holm,
    iqm,
    mcnemar,
    middle95,
    newcombe95,
    rates_by_task,
    verdict,
    wilson95,
)


@pytest.mark.parametrize(
    "counts, low, high",
    [
        # Newcombe 1998, Statistics in Medicine 17:2635: method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((0, 30, 0, 0), 0.8395, 1.0),
        # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850: airways and complete response
        ((1, 1, 7, 12), -0.507, -0.026),
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_the_paired_interval_is_the_published_one(counts, low, high):
    e, f, g, h = counts  # theirs is the first rate less the second
    found = newcombe95(Pairs(both=e, only_first=g, only_second=f, neither=h))
    assert found == pytest.approx((low, high), abs=6e-4 if abs(low) == 0.507 else 6e-5)
    mirrored = newcombe95(Pairs(both=e, only_first=f, only_second=g, neither=h))
    assert mirrored == pytest.approx((-found[1], -found[0]))


def test_the_exact_test_is_the_published_one():
    assert mcnemar(Pairs(1, 1, 7, 12)) == pytest.approx(0.0703, abs=5e-5)  # Fagerland et al. 2013
    assert mcnemar(Pairs(59, 6, 16, 80)) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(Pairs(794, 86, 150, 570)) == pytest.approx(3.716e-5, rel=1e-3)  # R: binom.test(86, 236)
    assert mcnemar(Pairs(5, 4, 4, 5)) == mcnemar(Pairs(9, 0, 0, 9)) == 1.0
    assert mcnemar(Pairs(0, 3000, 4000, 0)) == pytest.approx(6.4e-33, rel=0.05), "large counts do not overflow"


def test_pairs_count_who_solved_what():
    first, second = np.array([1, 1, 0, 0, 0], bool), np.array([1, 0, 1, 1, 0], bool)
    pairs = Pairs.of(first, second)
    assert pairs == Pairs(both=1, only_first=1, only_second=2, neither=1)
    assert pairs.scenes == 5 and pairs.difference == pytest.approx(second.mean() - first.mean())
    assert newcombe95(Pairs(0, 0, 0, 0)) == (-1.0, 1.0)


def test_holms_correction_is_step_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side():
    assert iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -90])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm(np.array([9.0, 1, 2, 3, 0])) == pytest.approx(2.0), "of five scores one on each side, as trim_mean"
    assert iqm(np.array([[1.0, 2, 3], [4, 5, 9]])) == pytest.approx([2, 6]), "of three none"


def test_rates_by_task():
    arm = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(rates_by_task(arm, np.array([0, 0, 1, 1])), [[0.5, 1.0], [0.0, 0.5]])


def test_one_policys_resamples_have_the_spread_of_its_scenes():
    tasks = np.repeat([0, 1], [100, 300])
    arm = np.concatenate([np.arange(100) < 50, np.arange(300) < 270])[None]
    (drawn,) = bootstrap([arm], tasks)
    expected = np.sqrt(100 * 0.25 + 300 * 0.09) / 400
    assert drawn.mean().std() == pytest.approx(expected, rel=0.05), "within tasks: the split between them is fixed"
    assert drawn.of_task(0).std() == pytest.approx(0.05, rel=0.05)
    assert drawn.mean().mean() == pytest.approx(0.8, abs=0.002)


def test_arms_share_their_scenes():
    arm = np.random.default_rng(0).random((1, 50)) < 0.5
    tasks = np.zeros(50, int)
    same, other = bootstrap([arm, arm], tasks)
    np.testing.assert_array_equal(same.mean(), other.mean())
    again = bootstrap([arm, arm], tasks)[0]
    np.testing.assert_array_equal(again.mean(), same.mean())


def test_the_spread_between_training_seeds_is_not_made_smaller():
    solved = np.array([0.2, 0.5, 0.8])[:, None] > (np.arange(20_000) + 0.5) / 20_000
    (drawn,) = bootstrap([solved], np.zeros(20_000, int), resamples=1000)
    seeds = np.std([0.2, 0.5, 0.8], ddof=1) / np.sqrt(3)
    assert drawn.mean().std() == pytest.approx(seeds, rel=0.06), "as the standard error of three values"
    assert drawn.rates_BRT.shape == (1000, 2, 1)


def test_a_training_seed_keeps_its_tasks():
    solved = np.repeat([[True], [False]], 80, axis=1)  # one policy solves all eight tasks, the other none
    (drawn,) = bootstrap([solved], np.repeat(np.arange(8), 10))
    assert set(drawn.mean()) == {0.0, 1.0}, "drawn task by task, the policies would average out"
    assert middle95(drawn.iqm()) == (0.0, 1.0)


def test_the_sentence():
    assert verdict("A", "B", 0.075, (0.021, 0.128)) == "B is better than A: +7.5 points, 95% CI [2.1, 12.8]."
    assert verdict("A", "B", -0.075, (-0.128, -0.021)) == "B is worse than A: -7.5 points, 95% CI [-12.8, -2.1]."
    assert verdict("A", "B", 0.01, (-0.03, 0.05)).startswith("No difference found between B and A: +1.0 points")
    assert verdict("A", "B", 0.05, (0.0, 0.1)).startswith("No difference found"), "0 belongs to the interval"
    assert verdict("A", "B", 0.075, (0.021, 0.128), p=0.01).startswith("B is better than A")
    few = "Too few scenes to tell B from A: -100.0 points, 95% CI [-100.0, -7.0], but McNemar p, exact, is 0.5."
    assert verdict("A", "B", -1.0, (-1.0, -0.07), p=0.5) == few


def test_wilsons_interval_of_nothing():
    assert wilson95(0, 0) == (0.0, 1.0)
