"""A teacher that learns from the reward what its few demonstrations have not shown it, before it teaches."""

import json
from dataclasses import replace

import pytest
import torch

from rl.configs.teacher import DistillConfig, TeacherConfig, TeacherPPOConfig
from rl.models.vla_network import make_actor
from rl.runner import Runner
from rl.teacher.state_teacher import TeacherPolicy, fit_teacher
from rl.teacher.teacher_ppo import rendering_disabled, train_teacher_ppo
from tests.rl.toy import CHUNK, SPEC, PointReach, ToyVLA, config, demos, evaluate

FEW = 2
QUICK = TeacherConfig(count=1, width=64, steps=200)
PRACTICE = TeacherPPOConfig(env_steps=30_000, decisions_per_update=8)


class Watched(PointReach):
    """Counts the control steps that are played with and without pictures."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.drawing, self.steps = True, {True: 0, False: 0}

    def step_chunk(self, chunk):
        result = super().step_chunk(chunk)
        self.steps[self.drawing] += int(result.n_steps.sum())
        return result


def worth_of(teacher):
    return evaluate(TeacherPolicy(teacher, make_actor(ToyVLA(), SPEC.names), SPEC, CHUNK))[0] / 200


def practised(config=PRACTICE, *, seed=0, rows=None, worth=None):
    teacher, env = fit_teacher(demos(FEW), ToyVLA().processor, CHUNK, QUICK), Watched(32)
    before = worth_of(teacher)
    with rendering_disabled(env):
        steps = train_teacher_ppo(
            teacher, ToyVLA().processor, env, config, train_seeds=(0, 1_000_000), n_action_steps=CHUNK, seed=seed,
            success_rate=worth, on_update=None if rows is None else rows.append,
        )  # fmt: skip
    return teacher, env, before, steps


def test_a_teacher_of_few_demonstrations_gets_better_by_its_reward():
    rows = []
    teacher, env, before, steps = practised(rows=rows)
    assert before < 0.6 and worth_of(teacher) > before + 0.25
    assert not any(p.requires_grad for p in teacher.parameters())
    assert env.steps == {True: 0, False: steps} and env.drawing
    assert [row["update"] for row in rows] == list(range(1, rows[0]["of"] + 1))
    assert rows[0]["of"] == round(30_000 / (8 * 32 * CHUNK))
    assert max(env.seeds_seen) < 1_000_000
    assert rows[-1]["std_mean"] < 0.8 * rows[0]["std_mean"]  # shrinks over the whole practice


def test_a_reward_that_punishes_success_makes_it_worse():
    """So it is the reward that it learns from."""

    class Perverse(Watched):
        def step_chunk(self, chunk):
            result = super().step_chunk(chunk)
            return replace(result, reward=-result.reward)

    good = fit_teacher(demos(40), ToyVLA().processor, CHUNK, replace(QUICK, steps=400))
    before = worth_of(good)
    train_teacher_ppo(
        good, ToyVLA().processor, Perverse(32), PRACTICE, train_seeds=(0, 1_000_000), n_action_steps=CHUNK
    )
    assert before > 0.8 and worth_of(good) < before - 0.3


def test_practice_depends_on_its_seed_alone():
    short = replace(PRACTICE, env_steps=4000)
    first, again, other = (practised(short, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_what_is_judged_and_kept_is_the_mean_of_its_parameters():
    """With a mean that hardly moves, what practice leaves is near what it found."""
    start = fit_teacher(demos(FEW), ToyVLA().processor, CHUNK, QUICK).state_dict()
    moved = {}
    for decay in (0.0, 0.999):
        config = replace(PRACTICE, env_steps=8000, ppo=replace(PRACTICE.ppo, average_decay=decay))
        ended = practised(config)[0].state_dict()
        moved[decay] = sum(float((ended[name] - start[name]).abs().sum()) for name in start)
    assert 0 < moved[0.999] < 0.05 * moved[0.0]


def test_it_ends_as_soon_as_it_is_good_enough():
    def until(enough, rates):
        rows, asked = [], iter(rates)
        practised(replace(PRACTICE, enough=enough, look_every=3), rows=rows, worth=lambda: next(asked))
        return len(rows)

    everything = round(30_000 / (8 * 32 * CHUNK))
    assert until(0.9, [0.5, 0.89, 0.9, 0.9]) == 9
    assert until(0.9, [0.9, 0.89, 0.5, 0.95, 0.9]) == 9, "one lucky look is not enough"
    assert until(0.9, [0.5] * everything) == everything == until(None, [])


def test_a_run_keeps_a_teacher_that_practice_has_spoilt(cloned, tmp_path):
    class Perverse(PointReach):
        def step_chunk(self, chunk):
            result = super().step_chunk(chunk)
            return replace(result, reward=-result.reward)

    model = ToyVLA()
    model.load_state_dict(cloned)
    guide = DistillConfig(teacher=QUICK, practice=replace(PRACTICE, enough=None), steps=3, minibatch_size=32)
    settings = replace(config(num_envs=32, max_updates=1), guide=guide)
    runner = Runner(model, Perverse(32), settings, tmp_path, demos=demos(40))
    runner.run()
    said = json.loads((tmp_path / "teacher.json").read_text())
    assert said["successes"] == said["imitation"]["successes"] > 60 and said["control_steps"] > 20_000
    assert worth_of(runner.distillation.teacher) > 0.6


def test_pictures_come_back_whatever_happens():
    env = Watched(4)
    with pytest.raises(RuntimeError, match="unplugged"), rendering_disabled(env):
        assert not env.drawing
        raise RuntimeError("unplugged")
    assert env.drawing


def test_a_run_lets_its_teacher_practise_and_counts_it(cloned, tmp_path):
    def run(out, practice, **changes):
        model, heard = ToyVLA(), []
        model.load_state_dict(cloned)
        guide = DistillConfig(teacher=QUICK, practice=practice, steps=3, minibatch_size=32)
        settings = replace(config(num_envs=32, **changes), guide=guide)
        runner = Runner(
            model, PointReach(32), settings, tmp_path / out, demos=demos(FEW), on_teacher_update=heard.append
        )
        runner.run()
        return runner, heard, json.loads((tmp_path / out / "teacher.json").read_text())

    runner, heard, said = run("with", PRACTICE, max_updates=1)
    assert said["imitation"]["successes"] + 15 < said["successes"] <= said["episodes"] == 96
    assert len(heard) == round(30_000 / (8 * 32 * CHUNK))
    without, unheard, plain = run("without", None, max_updates=1)
    assert not unheard and "imitation" not in plain and plain["successes"] == said["imitation"]["successes"]
    assert runner.env_steps - without.env_steps > 0.8 * said["control_steps"] > 20_000
    # a teacher that is good enough need not; half of a run's control steps at most are the teacher's
    _, unheard, plain = run("good", replace(PRACTICE, enough=said["imitation"]["successes"] / 96), max_updates=1)
    assert not unheard and "control_steps" not in plain
    most = said["control_steps"]
    bounded, heard, less = run("bounded", PRACTICE, max_updates=99, max_env_steps=most)
    update = less["control_steps"] / len(heard)
    assert 0 <= less["control_steps"] - most / 2 <= update and 0 <= bounded.env_steps - most <= update
    late = run("late", PRACTICE, max_updates=1, max_seconds=1e-9)[2]
    assert late["control_steps"] <= 8 * 32 * CHUNK and late["cut_short"] and "cut_short" not in said | plain | less
    with pytest.raises(ValueError, match="at least 1 control step"):
        run("wrong", replace(PRACTICE, env_steps=0), max_updates=1)


def test_killed_while_its_teacher_practises_a_run_comes_to_the_same(cloned, tmp_path):
    def start(out, **listeners):
        model = ToyVLA()
        model.load_state_dict(cloned)
        short = replace(PRACTICE, env_steps=6000)
        guide = DistillConfig(teacher=QUICK, practice=short, steps=3, minibatch_size=32)
        settings = replace(config(num_envs=32, max_updates=2), guide=guide)
        return Runner(model, PointReach(32), settings, tmp_path / out, demos=demos(FEW), evaluate=evaluate, **listeners)

    def killed(row):
        if row["update"] == 3:
            raise KeyboardInterrupt

    whole = start("whole")
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        start("cut", on_teacher_update=killed).run(resume=True)
    assert not (tmp_path / "cut/last/config.json").exists()  # no checkpoint yet: it will begin anew
    torch.manual_seed(123)  # another process
    cut = start("cut")
    found = cut.run(resume=True)
    assert (found.evaluations, found.env_steps) == (expected.evaluations, expected.env_steps)
    assert (tmp_path / "cut/teacher.json").read_text() == (tmp_path / "whole/teacher.json").read_text()
    for part in ("actor", "learner"):
        ours, theirs = (tensors_of(getattr(runner, part)) for runner in (cut, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def tensors_of(part):
    return dict(part.named_policy_parameters()) if hasattr(part, "named_policy_parameters") else part.tensors()
