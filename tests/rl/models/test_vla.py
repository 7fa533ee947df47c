"""The real VLA (bridge, head, processor, checkpoint) under the real runner: one policy before, during and after."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.runner import Runner
from tests.rl.toy import SPEC, PointReach, config
from tests.vla.toy_backbone import WORDS, ToyBackbone, ToyTokenizer, load_toy
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats


def make_vla(**config) -> VLA:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    return VLA.build(
        VLAConfig(
            backbone="toy", bridge=BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.3, dropout=0.3), **config
        ),
        stats=Stats.from_arrays(rng.uniform(-1, 1, (400, 2)), rng.uniform(-1, 1, (400, 3)) * SPEC.high),
        action_spec=SPEC,
        cameras=("front",),
        image_size=4,
        backbone=ToyBackbone(ToyTokenizer(WORDS), views=1, dropout=0.3),
    )


@pytest.mark.parametrize(("num_envs", "refiner_width"), [(16, 0), (6, 0), (16, 24)])
def test_refining_a_vla(tmp_path, num_envs, refiner_width):
    vla = make_vla().train()
    backbone = {name: p.clone() for name, p in vla.backbone.state_dict().items()}
    bridge = {name: p.clone() for name, p in vla.bridge.state_dict().items()}
    obs = PointReach(num_envs).reset(seeds=range(num_envs))
    imitation = VLAPolicy(vla).act(obs)
    rows = []
    settings = config(num_envs=num_envs, max_updates=4, ppo={"lr": 1e-3, "minibatch_size": 10})
    settings = replace(settings, actor=replace(settings.actor, refiner_width=refiner_width))
    runner = Runner(vla, PointReach(num_envs), settings, tmp_path, evaluate=lambda p: (1, 2), on_update=rows.append)
    assert np.array_equal(runner.greedy_policy().act(obs), imitation), "at step 0 RL's greedy policy is the imitation"
    runner.run()
    assert all(row["first_log_ratio"] < 1e-5 for row in rows[1:]) and sum(row["policy_steps"] for row in rows[1:]) > 0
    assert all(torch.equal(p, backbone[name]) for name, p in vla.backbone.state_dict().items())
    trained = [name for name, p in vla.bridge.state_dict().items() if not torch.equal(p, bridge[name])]
    assert bool(trained) == (refiner_width == 0)
    saved = VLA.load(tmp_path / "best", load_backbone=lambda spec: _one_view(load_toy(spec)))
    assert np.array_equal(VLAPolicy(saved).act(obs), runner.greedy_policy().act(obs))
    assert not np.array_equal(VLAPolicy(saved).act(obs), imitation)


def _one_view(backbone: ToyBackbone) -> ToyBackbone:
    return ToyBackbone(backbone.tokenizer, backbone.width, backbone.num_layers, views=1)
