"""`vla experiment rl`: every kind of arm through the real path, kept as it goes."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("stable_baselines3", reason="the extra 'sb3' is not installed")

from bascule.experiments import refinement as experiment_rl  # noqa: E402
from bascule.experiments.refinement import RLConfig  # noqa: E402
from bascule.experiments.registry import EXPERIMENTS  # noqa: E402
from vla.core.config import lookup  # noqa: E402

ARMS = ("imitation", "no-kl-stop", "residual-sac")
SMALL = RLConfig(
    arms=ARMS, seeds=(0,), demos=1, steps=1, control_steps=50, episodes=2, validation_episodes=2, num_envs=2, workers=1
)


def test_every_kind_of_arm_runs_once_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_rl, "SAC_CHECKPOINTS", 1)
    make, perform = EXPERIMENTS["rl"].config, EXPERIMENTS["rl"].perform
    assert make is RLConfig
    result = perform(SMALL, tmp_path)
    assert result["experiment"] == "rl" and tuple(result["arms"]) == ARMS
    assert all(arm["episodes"] == 2 for arm in result["arms"].values())
    steps = {arm: result["arms"][arm]["control_steps"][0] for arm in ARMS}
    assert steps["imitation"] == 0 and all(steps[arm] >= 50 for arm in ARMS[1:])
    assert result["arms"]["no-kl-stop"]["sampled"][1] == 2 and result["arms"]["imitation"]["sampled"] is None
    assert (tmp_path / "residual-sac-0" / "residual.zip").is_file()
    # finished runs are kept: what is in the file is what is reported
    file = tmp_path / "no-kl-stop-0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"successes": 1}))
    assert perform(SMALL, tmp_path)["arms"]["no-kl-stop"]["successes"] == 1
    with pytest.raises(ValueError, match="choose another --out"):
        perform(replace(SMALL, control_steps=60), tmp_path)


def test_arms_change_what_they_say():
    from rl.recipes import tabletop_pick, tabletop_pick_guided

    base, arms = tabletop_pick(), experiment_rl._arms()
    assert arms["ppo"](base) == base
    assert arms["no-critic-warmup"](base).ppo.critic_warmup == 0
    assert arms["no-kl-stop"](base).ppo.kl_stop > 1e6
    assert arms["bf16-logprob"](base).actor.log_prob_dtype == "bfloat16"
    assert arms["rloo"](base).method.baseline == "rloo" and arms["grpo"](base).method.baseline == "grpo"
    assert arms["independent-noise"](base).actor.correlation == 0.0 != base.actor.correlation
    guided = arms["guided"](replace(base, max_env_steps=7, seed=3))
    assert guided.guide == tabletop_pick_guided().guide and (guided.max_env_steps, guided.seed) == (7, 3)
    assert arms["shaped"](base).shaping is not None and base.shaping is None
    assert arms["bridge"](base).actor.refiner_width == 0
    with pytest.raises(ValueError, match="grpo"):
        lookup("gropo", arms, "arm")
