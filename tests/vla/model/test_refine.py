"""The refiner: nothing until trained, then a residual that checkpoints keep."""

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import load_toy, toy_observation, toy_vla
from vla.model.config import BridgeConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

SMALL = BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.3)


@pytest.fixture
def vla():
    return toy_vla(bridge=SMALL).eval()


def shake(vla):
    with torch.no_grad():
        vla.refiner.net[-1].weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))


def test_it_starts_as_exactly_nothing(vla):
    obs = toy_observation()
    before = VLAPolicy(vla).act(obs)
    vla.add_refiner(12, seed=0)
    assert np.array_equal(VLAPolicy(vla).act(obs), before)
    shake(vla)
    assert not np.array_equal(VLAPolicy(vla).act(obs), before)
    kept = vla.refiner
    vla.add_refiner(12, seed=1)
    assert vla.refiner is kept, "a second RL run goes on with what the first has learnt"


def test_it_reads_latent_points_and_proprio(vla):
    vla.add_refiner(12, seed=0)
    shake(vla)
    inp = vla.processor.prepare(toy_observation())
    features = vla.encode(inp)
    latents = vla.condition(features, inp.proprio_BP)
    residual = vla.refiner(latents, inp.proprio_BP)
    assert residual.shape == (3, 8, 4)
    assert residual.std(1).max() > 1e-4, "each step of the chunk has its own latent"
    assert not torch.equal(vla.refiner(latents, inp.proprio_BP + 0.1), residual)
    assert latents.stem_BD.abs().sum() > 0
    latents.stem_BD.neg_()
    assert not torch.equal(vla.refiner(latents, inp.proprio_BP), residual)


def test_latents_can_be_kept_in_place_of_features(vla):
    vla.add_refiner(12, seed=0)
    shake(vla)
    inp = vla.processor.prepare(toy_observation())
    features = vla.encode(inp)
    latents = vla.condition(features, inp.proprio_BP)
    room = latents.empty_like(5)
    room.write(1, latents)
    again = room.select([1, 2, 3])
    assert torch.equal(vla.act_on(again, inp.proprio_BP), vla.act(features, inp.proprio_BP))
    assert torch.equal(room.select(slice(2, 4)).latent_BCD, latents.latent_BCD[1:])
    with pytest.raises(ValueError, match="do not fit"):
        room.write(3, latents)


def test_checkpoints_keep_it(vla, tmp_path):
    vla.add_refiner(12, seed=0)
    shake(vla)
    vla.save(tmp_path)
    obs = toy_observation()
    loaded = VLA.load(tmp_path, load_backbone=load_toy)
    assert loaded.config.refiner_width == 12
    assert np.array_equal(VLAPolicy(loaded).act(obs), VLAPolicy(vla).act(obs))


def test_imitation_of_a_refined_policy_is_refused(vla):
    vla.add_refiner(12, seed=0)
    inp = vla.processor.prepare(toy_observation())
    with pytest.raises(ValueError, match="refined by RL"):
        vla.loss(vla.encode(inp), inp.proprio_BP, torch.zeros(3, 8, 4), torch.ones(3, 8))
