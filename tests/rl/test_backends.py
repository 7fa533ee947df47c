"""One recipe on every backend: worlds of ours and of others, on the CPU and in Warp, under the real runner and VLA."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from envs import make_vec
from rl.recipes import RECIPES
from rl.runner import Runner
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"the extra of {package} is not installed")


BACKENDS = [
    pytest.param("tabletop-pick", "cpu", id="cpu"),
    pytest.param("robosuite-lift", "cpu", id="robosuite", marks=needs("robosuite")),
    pytest.param("metaworld-reach", "cpu", id="metaworld", marks=needs("metaworld")),
    # Warp's CPU device takes 20 s for what the others do in two, and a minute to compile where nothing is cached.
    pytest.param("tabletop-pick", "warp", id="warp", marks=[needs("mujoco_warp"), pytest.mark.slow]),
]
CHUNK, WORLDS = 8, 2


def untrained(env) -> VLA:
    """A policy on the embedded backbone with the statistics of random data; it moves, and achieves nothing."""
    rng = np.random.default_rng(0)
    low, high = np.asarray(env.action_spec.low), np.asarray(env.action_spec.high)
    state = env.reset(seeds=range(WORLDS)).proprio
    return VLA.build(
        VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32, heads=2, kv_heads=1)),
        stats=Stats.from_arrays(
            state.mean(0) + rng.uniform(-1, 1, (400, env.proprio_dim)),
            rng.uniform(0.1 * low, 0.1 * high, (400, env.action_spec.dim)),
        ),
        action_spec=env.action_spec,
        cameras=env.cameras,
    )


@pytest.mark.parametrize(("suite", "backend"), BACKENDS)
def test_the_same_recipe_trains_everywhere(tmp_path, suite: str, backend: str) -> None:
    torch.set_num_threads(1)
    horizon = 48  # less than any suite's: what fails fails sooner
    options = {"num_workers": 1} if backend == "cpu" else {"device": "cpu"}
    env = make_vec(suite, WORLDS, backend=backend, horizon=horizon, **options)
    try:
        recipe = RECIPES["tabletop-pick"]()
        recipe = replace(
            recipe,
            suite=suite,
            horizon=horizon,
            num_envs=WORLDS,
            n_action_steps=CHUNK,
            decisions_per_update=horizon // CHUNK,  # an episode each
            calibrate_scales=(),
            max_updates=2,
            max_seconds=None,
            ppo=replace(recipe.ppo, critic_warmup=1, epochs=1, critic_epochs=1, minibatch_size=64),
        )
        vla, rows = untrained(env), []
        obs = env.reset(seeds=[1, 2])
        before, backbone = VLAPolicy(vla).act(obs), [p.clone() for p in vla.backbone.parameters()]
        runner = Runner(vla, env, recipe, tmp_path, on_update=rows.append)
        assert np.array_equal(runner.greedy_policy().act(obs), before), "RL starts from the policy it got"
        result = runner.run()
        obs = env.reset(seeds=[1, 2])
        after = runner.greedy_policy().act(obs)
    finally:
        env.close()
    assert result.updates == 2 and len(rows) == 2 and result.env_steps == sum(row["control_steps"] for row in rows)
    for row in rows:
        assert all(np.isfinite(value) for value in row.values()), row
        # an untrained hand that does not succeed runs into the time limit: every step of the horizon, in every world
        assert row["episodes"] >= WORLDS and 0 <= row["success_rate"] <= 1
        if row["success_rate"] == 0:
            assert row["control_steps"] == WORLDS * horizon and row["episodes"] == WORLDS
    assert "policy_steps" not in rows[0], "the critic learns first"
    assert rows[1]["policy_steps"] >= 1 and rows[1]["first_log_ratio"] < 1e-4
    assert after.shape == before.shape and np.isfinite(after).all() and not np.array_equal(after, before)
    assert all(torch.equal(a, b) for a, b in zip(backbone, vla.backbone.parameters(), strict=True))
    assert np.array_equal(VLAPolicy(VLA.load(tmp_path / "best")).act(obs), after)


def test_a_recipes_horizon_is_the_worlds() -> None:
    with pytest.raises(ValueError, match="from 1 to the .* steps of suite"):
        make_vec("tabletop-pick", 1, horizon=10_000)
    env = make_vec("tabletop-pick", 1, num_workers=1, horizon=16, image_size=84)
    try:
        env.set_rendering(False)
        env.reset(seeds=[1])
        still = np.zeros((1, 20, env.action_spec.dim), np.float32)
        result = env.step_chunk(still)
        assert result.truncated.tolist() == [True] and result.n_steps.tolist() == [16]
        with pytest.raises(ValueError, match="last 16 steps.*asks for 24"):
            Runner(torch.nn.Linear(1, 1), env, replace(RECIPES["smoke"](), num_envs=1, horizon=24), "unused")
    finally:
        env.close()
