"""Noise on the words of a rollout: an episode's own, and none when the policy is evaluated."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.models import vla_network
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.models.test_vla import make_vla
from tests.rl.toy import SPEC, PointReach, config


def rollout(word_noise, monkeypatch):
    """A rollout; what was asked of `mishearing` in it, and its collector."""
    asked = []

    def noted(backbone, noise):
        asked.append((noise[0], noise[1].tolist()))
        return nullcontext()

    monkeypatch.setattr(vla_network, "mishearing", noted)
    vla, env = make_vla(), PointReach(4)
    collector = Collector(
        vla_network.make_actor(vla, SPEC.names), env, generator=torch.Generator().manual_seed(1),
        train_seeds=(0, 1000), word_noise=word_noise,
    )  # fmt: skip
    collector.collect(RolloutBuffer(30, 4))
    return asked, collector


def test_every_decision_hears_its_own_episode(monkeypatch):
    asked, collector = rollout(0.5, monkeypatch)
    assert len(asked) == 30 and {scale for scale, _ in asked} == {0.5}
    episodes = np.array([seeds for _, seeds in asked])
    assert collector.seeds_used > 4, "some episodes ended"
    heard = sorted(set(episodes.flatten().tolist()))
    assert heard == list(range(len(heard))) and len(heard) >= collector.seeds_used - 4, "the last have only begun"
    assert (np.diff(episodes, axis=0) >= 0).all(), "until its episode ends, an environment keeps its number"
    collector.actor.encode(collector.env.observation())
    assert len(asked) == 30, "evaluation hears the words themselves"


def test_without_noise_nothing_is_asked(monkeypatch):
    assert rollout(0.0, monkeypatch)[0] == []


def test_a_backbone_without_noise_on_its_words_hears_none_and_less_than_none_is_refused(tmp_path):
    settings = replace(config(num_envs=8), word_noise=1.0)
    runner = Runner(make_vla(), PointReach(8), settings, tmp_path, evaluate=lambda p: (1, 2))
    assert runner.collector.word_noise == 0.0
    with pytest.raises(ValueError, match="word_noise must be 0 or more, got -1.0"):
        Runner(make_vla(), PointReach(8), replace(settings, word_noise=-1.0), tmp_path, evaluate=lambda p: (1, 2))
