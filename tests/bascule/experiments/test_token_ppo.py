"""`vla experiment token-ppo`: arms through the real path, kept as they go; and its control."""

from dataclasses import replace

import pytest
import torch

from bascule.experiments.registry import EXPERIMENTS
from bascule.experiments.tokens.comparison import TokenPPOConfig, arms, exchange
from rl.runner import Runner
from tests.rl.models.test_tokens import TOKENS
from tests.rl.models.test_vla import make_vla
from tests.rl.toy import PointReach, config

SMALL = TokenPPOConfig(
    arms=("exchanged",), seeds=(0,), demos=1, steps=1, control_steps=50, episodes=2, validation_episodes=2,
    num_envs=2, workers=1,
)  # fmt: skip


def test_arms_run_and_are_kept(tmp_path):
    perform = EXPERIMENTS["token-ppo"].perform
    result = perform(SMALL, tmp_path)
    assert result["experiment"] == "token-ppo" and tuple(result["arms"]) == SMALL.arms
    assert result["arms"]["exchanged"]["sampled"][1] == 2 and result["arms"]["exchanged"]["control_steps"][0] >= 50
    assert perform(SMALL, tmp_path)["arms"] == result["arms"]
    with pytest.raises(ValueError, match="choose another --out"):
        perform(replace(SMALL, control_steps=60), tmp_path)
    with pytest.raises(ValueError, match="tokens"):
        perform(replace(SMALL, arms=("token",)), tmp_path)


def test_arms_say_what_they_do():
    every = arms()
    assert set(TokenPPOConfig().arms) <= set(every)
    tokens, decoupled = every["tokens"].recipe(), every["decoupled"].recipe()
    assert tokens.actor.noise == "tokens" and tokens.actor.temperature == 1.5 and tokens.ppo.ratio == "chunk"
    assert replace(decoupled, ppo=tokens.ppo) == tokens and decoupled.ppo.ratio == "token"
    assert every["latents"].recipe().critic.reads == "latents"
    assert every["no-critic-warmup"].recipe().ppo.critic_warmup == 0 < tokens.ppo.critic_warmup
    assert every["cool"].recipe().actor.temperature == 1.0
    assert every["shaped"].recipe().shaping is not None and every["curriculum"].recipe().curriculum is not None
    assert {name for name, arm in every.items() if arm.exchanged} == {"exchanged"}


def test_the_control_gives_every_decision_the_advantage_of_another(tmp_path):
    settings = replace(config(num_envs=8), actor=TOKENS)
    honest, control = (
        Runner(make_vla(head="bins"), PointReach(8), settings, tmp_path / name) for name in ("honest", "control")
    )
    exchange(control)
    for runner in (honest, control):
        runner.collector.collect(runner.buffer)
        runner.learner.update(runner.buffer)
    ours, theirs = honest.buffer.advantages_B, control.buffer.advantages_B
    assert torch.equal(ours.sort().values, theirs.sort().values) and not torch.equal(ours, theirs)
