"""A frozen VLA with a corrector learnt by SB3's SAC: without a correction it is the VLA, and the VLA never changes."""

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="the extra 'sb3' is not installed")

from rl.external.residual_sac import (
    Plans,
    ResidualConfig,
    ResidualPolicy,
    ResidualVecEnv,
    learn_residual,
    save_residual,
)  # noqa: E402
from rl.external.sb3 import SAC, StateVecEnv  # noqa: E402
from rl.rollout.step_collector import play  # noqa: E402
from tests.rl.models.test_vla import make_vla  # noqa: E402
from tests.rl.models.test_what_trains import fingerprint  # noqa: E402
from tests.rl.toy import SPEC, PointReach  # noqa: E402
from vla.core.types import Policy  # noqa: E402
from vla.model.policy import VLAPolicy  # noqa: E402

SMALL = ResidualConfig(
    alpha=0.3, n_action_steps=3, learning_starts=16, batch_size=32, buffer_size=2000, width=32, num_critics=2,
    demo_episodes=4,
)  # fmt: skip


class Counting(PointReach):
    """Counts the steps whose picture was drawn, and keeps what was done."""

    drawing = True

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.drawn, self.done = [], []

    def step_chunk(self, chunk):
        self.drawn.append(self.drawing)
        self.done.append(chunk.copy())
        return super().step_chunk(chunk)


def test_without_a_correction_it_is_the_vla_looking_as_often():
    vla, ours, theirs = make_vla(), Counting(4), Counting(4)
    policy = ResidualPolicy(vla, None, SMALL, 4)
    assert isinstance(policy, Policy)
    play(policy, ours, range(4))
    play(VLAPolicy(vla, n_action_steps=3), theirs, range(4))
    assert np.allclose(np.concatenate(ours.done, 1), np.concatenate(theirs.done, 1), atol=1e-6)
    assert len(ours.done) == 3 * len(theirs.done)


def test_pictures_are_drawn_only_when_the_vla_looks():
    env = Counting(4)
    worlds = ResidualVecEnv(env, make_vla(), replace(SMALL, n_action_steps=5), seed=0)
    state = worlds.reset()
    assert worlds.plans.action().any(), "it has looked"
    assert state.shape == (4, worlds.observation_space.shape[0]) and np.isfinite(state).all()
    for _ in range(11):
        state, _, done, _ = worlds.step(np.zeros((4, 3), np.float32))
        assert not done.any()
    assert env.drawn == ([False] * 4 + [True]) * 2 + [False]
    before = worlds.plans._chunk.copy()
    state, _, done, infos = worlds.step(np.zeros((4, 3), np.float32))  # the horizon: new episodes, and a look at them
    assert done.all() and all(i["TimeLimit.truncated"] for i in infos)
    assert not np.array_equal(before, worlds.plans._chunk) and (worlds.plans.at == 0).all()
    assert not np.allclose(state, [i["terminal_observation"] for i in infos])
    worlds.close()
    assert env.drawing


def test_corrections_are_bounded_and_a_demonstrators_action_becomes_one():
    env = Counting(4)
    worlds = ResidualVecEnv(env, make_vla(), SMALL, seed=0)
    worlds.reset()
    base = worlds.plans.action().copy()
    half = worlds.plans.vla.processor.unnormalise_action(base + 0.15)
    residual = worlds.action_of(half)
    inside = np.abs(half) < np.array(SPEC.high) * 0.999
    assert np.allclose(residual[inside], 0.5, atol=1e-4)
    far = worlds.action_of(np.broadcast_to(np.float32(SPEC.high), (4, 3)))
    assert np.abs(far).max() <= 1.0
    worlds.step(np.ones((4, 3), np.float32))
    done = worlds.plans.vla.processor.normalise_action(env.done[-1][:, 0])
    assert (done - base).max() <= SMALL.alpha + 1e-4


def test_sac_learns_on_a_frozen_vla_with_demonstrations_in_its_buffer(tmp_path, monkeypatch):
    vla, env = make_vla(), Counting(4)
    before = fingerprint(vla)

    class Expert:
        def reset(self, env_ids=None): ...

        def act(self, obs):
            gap = np.clip(obs.privileged[:, 2:4], -0.2, 0.2)
            return np.concatenate([gap, np.ones((4, 1), np.float32)], 1)[:, None].astype(np.float32)

    wide = replace(SMALL, alpha=1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, figures = learn_residual(env, vla, wide, control_steps=160, demonstrator=Expert())
    assert figures["stored_successes"] >= 2 and figures["control_steps"] >= 160 and model._n_updates > 10
    assert not list(tmp_path.glob("SB3-*")), "SB3's logger has left its folder"
    assert fingerprint(vla) == before and not any(p.requires_grad for p in vla.parameters())
    critic = model.critic
    norms = [m for m in critic.qf0.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 and critic.q_networks[1] is critic.qf1
    owned = {id(p) for group in critic.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in critic.parameters()}, "the normalised networks are the ones that learn"
    assert type(model.replay_buffer).__name__ == "NStepReplayBuffer"
    path = save_residual(model, tmp_path)
    again = SAC.load(path, device="cpu")
    acts = [ResidualPolicy(vla, m, wide, 4).act(PointReach(4).reset(seeds=range(4))) for m in (model, again, None)]
    assert np.array_equal(acts[0], acts[1]) and not np.array_equal(acts[0], acts[2])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="alpha"):
        ResidualVecEnv(PointReach(2), make_vla(), ResidualConfig(alpha=0.0))
    with pytest.raises(ValueError, match="chunk size"):
        Plans(make_vla(), 2, 99)
    worlds = StateVecEnv(PointReach(2), seed=0)
    with pytest.raises(AttributeError, match="where they are made"):
        worlds.set_attr("horizon", 3)
    with pytest.raises(AttributeError, match="vector environment itself"):
        worlds.env_method("reset")
