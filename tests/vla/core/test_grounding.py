"""Confidence, threshold and the rule when to hold: right values, and what a threshold may cost."""

import numpy as np
import pytest

from vla.core.grounding import FirstSight, calibrate, threshold_in


def test_a_threshold_lies_between_two_kinds_that_are_apart():
    present, absent = np.full(500, 0.9), np.full(500, 0.1)
    present[:5], absent[:5] = 0.0, 1.0  # one percent of each is wrong, and is left out
    assert calibrate(present, absent) == pytest.approx(0.5)
    # Halfway in log-odds: 1 in 1000 and 1 in 2 are apart by as much as 1 in 2 and 999 in 1000.
    odds = np.exp((np.log(1 / 999) + np.log(1)) / 2)
    assert calibrate(np.full(100, 0.5), np.full(100, 0.001)) == pytest.approx(odds / (1 + odds))


def test_at_most_two_percent_of_what_is_there_are_held():
    rng = np.random.default_rng(0)
    for count in (100, 250, 1999):
        present, absent = rng.beta(6, 2, count), rng.beta(2, 3, count)  # they overlap
        threshold = calibrate(present, absent)
        assert (present < threshold).mean() <= 0.02
        assert (present <= threshold).mean() > 0.02, "as high as that allows"
    assert calibrate(np.full(200, 0.7), np.full(200, 0.7)) == 0.7, "what cannot be told apart is not held"


@pytest.mark.parametrize(
    ("present", "absent", "told"),
    [
        (np.ones(99), np.zeros(100), "100 present questions or more, got 99"),
        (np.ones(100), [], "100 absent questions or more, got 0"),
        (np.full(100, np.nan), np.zeros(100), "present questions must lie in"),
        (np.ones(100), np.full(100, -3.0), "absent questions must lie in"),
    ],
)
def test_what_gives_no_threshold_is_refused(present, absent, told):
    with pytest.raises(ValueError, match=told):
        calibrate(present, absent)


def test_an_instruction_is_held_until_its_object_was_first_seen():
    sight, told = FirstSight(0.5), ["the cup", "the cube"]
    holds = lambda *values: sight.holds(np.array(values), told).tolist()  # noqa: E731
    assert holds(0.4, 0.5) == [True, False]
    assert holds(0.4, 0.1) == [True, False], "in the gripper: it was seen before"
    assert holds(0.6, 0.1) == [False, False]
    told[0] = "the bowl"
    assert holds(0.3, 0.1) == [True, False], "another instruction"
    told[0] = "the cup"
    assert holds(0.3, 0.1) == [False, False]
    sight.reset([1])
    assert holds(0.3, 0.1) == [False, True], "another episode"
    sight.reset()
    assert holds(0.3, np.nan) == [True, False], "no decision, nothing to hold"
    assert sight.holds(None, told).tolist() == [False, False]


def test_a_threshold_is_a_number_from_0_to_1():
    assert threshold_in({}) is None and threshold_in({"grounding": {"threshold": 0.25}}) == 0.25
    for wrong in ({}, {"threshold": "high"}, {"threshold": 2}, {"threshold": None}, 0.3):
        with pytest.raises(ValueError, match="a number from 0 to 1"):
            threshold_in({"grounding": wrong})
