"""A teacher that sees the simulator's state, and a policy that is shown what it would have done."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.configs.learning import FilteredConfig
from rl.configs.teacher import DistillConfig, TeacherConfig
from rl.models.vla_network import make_actor
from rl.runner import Runner
from rl.teacher.state_teacher import TeacherPolicy, fit_teacher
from tests.rl.models.test_vla import make_vla
from tests.rl.toy import CHUNK, SPEC, PointReach, ToyVLA, config, demos, evaluate

QUICK = TeacherConfig(count=2, width=64, steps=400)
GUIDE = DistillConfig(teacher=QUICK, steps=30, minibatch_size=128, anneal_updates=30)


def policy_from(cloned):
    model = ToyVLA()
    model.load_state_dict(cloned)
    return model


def guided(model, out, data=None, *, guide=GUIDE, **changes):
    settings = replace(config(num_envs=32, **changes), guide=guide)
    return Runner(model, PointReach(32), settings, out, demos=demos(40) if data is None else data)


def test_a_teacher_does_what_was_demonstrated():
    data, processor = demos(40), ToyVLA().processor
    teacher = fit_teacher(data, processor, CHUNK, QUICK)
    state = torch.from_numpy(np.concatenate([data.privileged, data.proprio], 1))
    wanted, mask = data.chunks(CHUNK)
    error = (teacher(state).numpy() - processor.normalise_action(wanted)) * mask[..., None]
    assert np.abs(error).mean() < 0.1 < np.abs(wanted).mean()
    acting = TeacherPolicy(teacher, make_actor(ToyVLA(), SPEC.names), SPEC, CHUNK)
    assert evaluate(acting)[0] / 200 >= 0.9
    assert not any(p.requires_grad for p in teacher.parameters())
    again = fit_teacher(data, processor, CHUNK, QUICK)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="record them anew"):
        fit_teacher(replace(data, privileged=None), processor, CHUNK, QUICK)


def test_a_policy_learns_from_it_what_no_reward_has_told_it(cloned, tmp_path):
    """PPO is still warming up its critic: all that is learnt comes from the teacher."""
    model = policy_from(cloned)
    runner = guided(model, tmp_path / "a", decisions_per_update=8, max_updates=30, ppo={"critic_warmup": 99})
    before = evaluate(runner.greedy_policy())[0] / 200
    runner.run()
    assert before <= 0.7 and evaluate(runner.greedy_policy())[0] / 200 >= 0.9
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["teacher_distance"] < 0.7 * rows[0]["teacher_distance"]
    played = json.loads((tmp_path / "a" / "teacher.json").read_text())
    assert played["demonstrations"] == 40 and 0.8 * played["episodes"] <= played["successes"] <= played["episodes"]


def test_the_spread_and_what_is_frozen_stay(cloned, tmp_path):
    model = policy_from(cloned)
    runner = guided(model, tmp_path / "a", max_updates=2, ppo={"critic_warmup": 99})
    spread, backbone = runner.actor.log_std.detach().clone(), model.backbone.weight.detach().clone()
    head = model.head[0].weight.detach().clone()
    runner.run()
    assert torch.equal(spread, runner.actor.log_std) and torch.equal(backbone, model.backbone.weight)
    assert not torch.equal(head, model.head[0].weight)


def test_ppo_goes_on_from_where_the_teacher_led(cloned, tmp_path):
    rows = []
    runner = guided(policy_from(cloned), tmp_path / "a", max_updates=4)
    runner.on_update = rows.append
    runner.run()
    assert all(row["policy_steps"] > 0 and row["first_log_ratio"] < 1e-5 for row in rows[1:])


def test_it_remembers_the_latest_decisions(cloned, tmp_path):
    """40 of them, of rollouts of 32 x 4: the end of the last one, in a ring."""
    runner = guided(policy_from(cloned), tmp_path / "a", max_updates=3, guide=replace(GUIDE, memory=40))
    runner.run()
    guide, buffer = runner.distillation, runner.buffer
    expected = guide.teacher(buffer.flat("state")[:, :-1])[-40:]
    kept = guide._rows["chunk"]
    assert len(kept) == 40
    order = [int((kept - row).abs().sum((1, 2)).argmin()) for row in expected]
    assert sorted(order) == list(range(40)) and torch.equal(kept[order], expected)
    seen = buffer.stored_inputs.select(torch.arange(88, 128)).raw_BLND
    assert torch.equal(guide._inputs.select(order).raw_BLND, seen)


@pytest.mark.parametrize("real", [False, True])
def test_a_guided_run_resumes_exactly(cloned, tmp_path, real):
    def run(out, updates, resume=False):
        model = make_vla() if real else policy_from(cloned)
        guide = replace(GUIDE, memory=200, steps=3, minibatch_size=32)
        runner = guided(model, tmp_path / out, demos(6), guide=guide, max_updates=updates)
        runner.run(resume=resume)
        return runner

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    assert all(torch.equal(t, parts.learner.tensors()[name]) for name, t in whole.learner.tensors().items())
    ours, theirs = whole.distillation.state(), parts.distillation.state()
    assert ours["num_updates"] == theirs["num_updates"] == 4
    assert all(torch.equal(t, theirs["memory"][name]) for name, t in ours["memory"].items())


def test_what_it_needs_is_said(cloned, tmp_path):
    with pytest.raises(ValueError, match="learns from demonstrations"):
        settings = replace(config(num_envs=8), guide=GUIDE)
        Runner(policy_from(cloned), PointReach(8), settings, tmp_path / "a")
    with pytest.raises(ValueError, match="a teacher goes with PPO"):
        guided(policy_from(cloned), tmp_path / "a", method=FilteredConfig())
    other = demos(6)
    with pytest.raises(ValueError, match="demonstrations of this suite"):
        guided(policy_from(cloned), tmp_path / "a", replace(other, privileged=other.privileged[:, :3])).run()
    with pytest.raises(ValueError, match="at least 1"):
        guided(policy_from(cloned), tmp_path / "a", guide=replace(GUIDE, steps=0))
