"""RL's cost in other tasks: success of each of them before and after."""

import json

import pytest

from envs.evaluation.evaluate import Count, EvalReport
from rl.retention import TaskChange, compare, retention

SEEDS = (10, 209)


def report(**rates: tuple[int, int]) -> EvalReport:
    tasks = {name: Count(*pair) for name, pair in rates.items()}
    won, played = sum(c.successes for c in tasks.values()), sum(c.episodes for c in tasks.values())
    return EvalReport(
        suite="s", policy="p", backend="cpu", successes=won, episodes=played, wrong_object=0, mean_steps=1.0,
        per_task=tasks, per_phrasing={}, seeds=SEEDS, deterministic=True, horizon=1, chunk_size=1, n_action_steps=1,
    )  # fmt: skip


@pytest.mark.parametrize(("after", "verdict"), [(80, "kept"), (60, "lost"), (72, "kept"), (95, "gained")])
def test_lost_is_below_the_interval_of_before(after, verdict):
    assert TaskChange("s", "pick", Count(80, 100), Count(after, 100)).verdict == verdict


def test_every_task_of_every_suite_is_compared():
    before = {"a": report(pick=(50, 100), place=(90, 100)), "b": report(push=(10, 50))}
    after = {"a": report(pick=(95, 100), place=(40, 100)), "b": report(push=(11, 50))}
    policies = {"old": before, "new": after}
    played = []

    def play(policy, suite):
        played.append((policy, suite))
        return policies[policy][suite]

    result = retention("old", "new", ["a", "b"], play)
    assert played == [("old", "a"), ("old", "b"), ("new", "a"), ("new", "b")]
    verdicts = {(row["suite"], row["task"]): row["verdict"] for row in result["tasks"]}
    assert verdicts == {("a", "pick"): "gained", ("a", "place"): "lost", ("b", "push"): "kept"}
    assert result["lost"] == ["a/place"] and result["mean_change"] == pytest.approx((0.45 - 0.5 + 0.02) / 3)
    assert json.loads(json.dumps(result)) == result


def test_other_episodes_are_not_compared():
    other = report(pick=(5, 10))
    with pytest.raises(ValueError, match="different episodes"):
        compare({"a": report(pick=(50, 100))}, {"a": other})
