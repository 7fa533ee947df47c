"""Tasks are drawn as their rule says, evenly; the draw survives a resume."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rl.configs.learning import GRPOConfig
from rl.configs.run import CurriculumConfig
from rl.rollout.curriculum import RULES, Curriculum
from rl.runner import Runner
from tests.rl.toy import PointReach, ToyVLA, config

TASKS = ("easy", "half", "hard")
RATES = {"easy": 0.95, "half": 0.5, "hard": 0.05}


def made(rule="vla-rl", **changes) -> Curriculum:
    return Curriculum(CurriculumConfig(**({"rule": rule, "floor": 0.0} | changes)), TASKS, seed=0)


def told(curriculum: Curriculum, episodes: int = 400) -> Curriculum:
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        for task, rate in RATES.items():
            curriculum.record(task, bool(rng.random() < rate))
    return curriculum


def test_the_published_rule_is_exp_of_half_minus_success_over_tau():
    curriculum = told(made(temperature=0.25))
    s = curriculum.rates
    assert np.allclose(s, list(RATES.values()), atol=0.12)
    weight = np.exp((0.5 - s) / 0.25)
    assert np.allclose(curriculum.shares, weight / weight.sum())


@pytest.mark.parametrize(("rule", "favourite"), [("vla-rl", "hard"), ("frontier", "half"), ("weakest", "hard")])
def test_rules_prefer_what_they_say(rule, favourite):
    count = Counter(told(made(rule, temperature=1.0)).draw(300))
    assert count.most_common(1)[0][0] == favourite
    assert set(RULES) == {"uniform", "vla-rl", "frontier", "weakest"}


def test_draws_are_balanced_at_every_moment_not_only_on_average():
    curriculum, count = told(made("uniform")), Counter()
    for _ in range(60):
        count.update(curriculum.draw(5))
        assert max(count[t] for t in TASKS) - min(count[t] for t in TASKS) <= 2
    curriculum = told(made(temperature=0.5, floor=0.1))
    drawn, share = Counter(curriculum.draw(1000)), dict(zip(TASKS, curriculum.shares, strict=True))
    assert all(abs(drawn[task] - 1000 * share[task]) <= 2 for task in TASKS)


def test_old_outcomes_fade_and_no_task_is_forgotten():
    curriculum = made("frontier", window=16, floor=0.3)
    for _ in range(200):
        curriculum.record("easy", False)
    assert curriculum.rates[0] < 0.01
    for _ in range(64):
        curriculum.record("easy", True)
    assert curriculum.rates[0] > 0.95
    assert curriculum.shares.min() >= 0.1 - 1e-9 and curriculum.shares.sum() == pytest.approx(1.0)


def test_state_continues_the_same_draws():
    first, second = told(made()), made()
    first.draw(7)
    second.load_state(json.loads(json.dumps(first.state())))
    assert first.draw(50) == second.draw(50) and np.array_equal(first.shares, second.shares)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="vla-rl"):
        made("vla_rl")
    with pytest.raises(ValueError, match="temperature"):
        made(temperature=0.0)
    with pytest.raises(ValueError, match="floor"):
        made(floor=2.0)
    with pytest.raises(ValueError, match="tasks"):
        Curriculum(CurriculumConfig(), (), seed=0)


class TaskReach(PointReach):
    """Tasks differ in how near counts as there."""

    task_names = ("near", "far")

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.radius = np.full(num_envs, 0.15)
        self.tasks_seen = []

    def reset(self, *, seeds, tasks=None, env_ids=None):
        for i, task in zip(range(self.num_envs) if env_ids is None else env_ids, tasks or (), strict=False):
            self.radius[i] = {"near": 0.01, "far": 0.6}[task]
            self.tasks_seen.append(task)
        return super().reset(seeds=seeds, tasks=tasks, env_ids=env_ids)


@pytest.mark.parametrize("method", [None, GRPOConfig(group_size=4, episodes_per_update=16, max_rounds=2)])
def test_a_run_learns_which_task_needs_it_and_resumes_with_that(cloned, tmp_path, method):
    def run(out, updates, resume=False):
        model = ToyVLA()
        model.load_state_dict(cloned)
        settings = config(num_envs=16, max_updates=updates, trackers=())
        settings = replace(settings, method=method, curriculum=CurriculumConfig(temperature=0.2, window=16))
        runner = Runner(model, TaskReach(16), settings, out)
        runner.run(resume=resume)
        return runner

    whole = run(tmp_path / "whole", 4)
    curriculum, drawn = whole.collector.curriculum, Counter(whole.env.tasks_seen)
    assert curriculum.rates[0] < 0.2 < 0.8 < curriculum.rates[1] and drawn["near"] > 2 * drawn["far"]
    row = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert row["share/near"] > row["share/far"] and row["success/far"] > 0.8
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume=True)
    assert parts.collector.curriculum.state() == curriculum.state()


def test_a_curriculum_needs_tasks(tmp_path):
    settings = replace(config(), curriculum=CurriculumConfig())
    with pytest.raises(ValueError, match="named tasks"):
        Runner(ToyVLA(), PointReach(16), settings, tmp_path)
