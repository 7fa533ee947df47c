"""Demonstrations beside RL: a spread fitted to how they scatter, a loss that holds the policy to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.configs.learning import ActorConfig
from rl.models.actor import GaussianChunkActor
from rl.models.state_std import MAX_LOG_FACTOR, StateScale, fit_scale
from rl.runner import Runner
from rl.storage.demonstrations import DemoRows
from tests.rl.test_vla import make_vla
from tests.rl.toy import SPEC, PointReach, config, demos


def test_scale_finds_where_demonstrators_vary():
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(2000, 3, generator=generator) * 2 - 1
    true = torch.stack([torch.where(state[:, 0] > 0, 0.4, 0.1), torch.full((2000,), 0.2)], 1)
    error = torch.randn(2000, 4, 2, generator=generator) * true[:, None]
    mask = torch.ones(2000, 4)
    mask[::2, 2:] = 0
    error[::2, 2:] = 50.0  # padding must not count
    scale = fit_scale(state, error, mask)
    factor = scale(state).exp()
    wide, narrow = factor[state[:, 0] > 0.2], factor[state[:, 0] < -0.2]
    assert float(wide[:, 0].mean() / narrow[:, 0].mean()) == pytest.approx(4.0, rel=0.25)
    assert float(wide[:, 1].mean() / narrow[:, 1].mean()) == pytest.approx(1.0, rel=0.15)
    assert scale(state).mean(0).abs().max() < 0.1, "the configured spread stays the mean one"
    assert not any(p.requires_grad for p in scale.parameters())
    assert scale(state * 100).abs().max() <= MAX_LOG_FACTOR
    again = StateScale.from_tensors(scale.state_dict())
    assert torch.equal(again(state), scale(state))
    with pytest.raises(ValueError, match="demonstrated"):
        fit_scale(state[:1], error[:1], mask[:1])


@pytest.mark.parametrize("trains", ["head", "bridge", "all"])
def test_demonstrated_decisions_are_read_as_the_policy_reads_them(trains):
    vla, data = make_vla(), demos()
    actor = GaussianChunkActor(vla, SPEC.names, ActorConfig(trains=trains))
    rows = DemoRows.of(actor, data, limit=20, seed=3)
    assert len(rows) == 20
    batch = rows.draw(7, torch.Generator().manual_seed(0))
    mean = actor.mean(batch.conditions, batch.proprio_BP)
    assert mean.shape == batch.action_BCA.shape == (7, 8, 3) and mean.requires_grad
    assert set(batch.mask_BC.unique().tolist()) <= {0.0, 1.0} and (batch.mask_BC[:, 0] == 1).all()
    # the loss of these rows is the imitation loss of the same frames
    every = DemoRows.of(actor, data)
    action = vla.processor.unnormalise_action(every.action_BCA[:, 0].numpy())
    assert np.allclose(action, data.action, atol=1e-5)


def test_a_run_with_demonstrations_resumes_exactly(tmp_path):
    settings = config(num_envs=8, max_updates=4, ppo={"lr": 1e-3, "minibatch_size": 16, "demo_coef": 0.3})
    settings = replace(settings, actor=ActorConfig(state_std=True))

    def run(out, updates, resume=False):
        rows = []
        runner = Runner(
            make_vla(), PointReach(8), replace(settings, max_updates=updates), out, demos=demos(), on_update=rows.append
        )
        runner.run(resume=resume)
        return runner, rows

    whole, rows = run(tmp_path / "whole", 4)
    assert all(row["demo_loss"] > 0 for row in rows[1:]) and rows[-1]["first_log_ratio"] < 1e-5
    log_std = whole.actor.log_std_of(*whole.actor.encode(PointReach(8).reset(seeds=range(8))))
    assert log_std.shape == (8, 1, 3) and log_std.std(0).max() > 0
    run(tmp_path / "parts", 2)
    parts, _ = run(tmp_path / "parts", 4, resume=True)
    assert whole.learner.tensors().keys() == parts.learner.tensors().keys()
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(tensor, parts.learner.tensors()[name]), name
    with pytest.raises(ValueError, match="name a data set"):
        Runner(make_vla(), PointReach(8), settings, tmp_path / "without")
