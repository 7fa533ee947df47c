"""A pool of modulators: who is chosen, and that nobody else is changed."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import load_toy, toy_observation, toy_vla
from vla.model.config import BridgeConfig, FaithfulConfig, ModulatorConfig, VLAConfig, model_problem
from vla.model.model import VLA
from vla.model.modulators import IDENTITY, RIDGE, applied
from vla.model.policy import VLAPolicy
from vla.model.routing import query

BRIDGE = BridgeConfig(width=32, gate_init=0.5)
SMALL = ModulatorConfig(count=3, rank=2, known_keys=2)


def with_effect(vla, config=SMALL, used=None):
    """The policy with a pool all of whose modulators do something."""
    vla.add_modulators(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for up in vla.pool.up.values():
            up.copy_(torch.randn(up.shape, generator=generator))
        vla.pool.counts_M += torch.tensor([1] * config.count if used is None else used)
    return vla


def modulated(**config):
    return with_effect(toy_vla(bridge=BRIDGE, **config))


def act(vla, obs, chosen):
    inp = vla.processor.prepare(obs)
    with torch.no_grad(), applied(vla, None if chosen is None else torch.tensor(chosen)):
        return vla.act(vla.encode(inp), inp.proprio_BP)


def cosine(a, b):
    """Slowly, from the definition."""
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def slowly_asked(queries, known):
    """Both halves of queries as they differ from the known mean, of unit length, the words whitened by the
    covariance of what is known with a ridge, from the definition."""
    queries, known = queries.double().numpy(), known.double().numpy()
    half = known.shape[1] // 2
    difference = queries - known.mean(0)
    covariance = np.cov(known[:, :half].T, bias=True)
    ridge = RIDGE * np.trace(covariance) / half
    values, vectors = np.linalg.eigh(covariance + ridge * np.eye(half))
    words = difference[:, :half] @ (vectors / np.sqrt(values)) @ vectors.T
    halves = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (words, difference[:, half:])]
    return np.concatenate(halves, 1).tolist()


def test_choices_and_usage_equal_a_slow_reference():
    vla = toy_vla(bridge=BRIDGE)
    vla.add_modulators(ModulatorConfig(count=4, rank=2, known_keys=3, assign="observation"), seed=5)
    pool, width = vla.pool, 2 * vla.backbone.width
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(9, width, generator=generator) * torch.linspace(0.1, 3, width)
    pool.know(known)
    usage, before = [0] * 4, [0] * 4
    for _ in range(3):  # datasets
        pool.begin_dataset(torch.zeros(1, width))
        before = list(usage)
        for _ in range(3):  # steps
            query = torch.randn(6, width, generator=generator)
            asked = slowly_asked(query, known)
            expected = []
            for one in asked:
                scores = [
                    (cosine(one, key.tolist()) + 1) / 2 * (1 / before[m] if before[m] else 1.0)
                    for m, key in enumerate(pool.keys_MK)
                ]
                expected.append(scores.index(max(scores)))
            chosen = pool.learn(query)
            assert chosen.tolist() == expected
            for number in expected:
                usage[number] += 1
            assert pool.counts_M.tolist() == usage
            keys = [*pool.known_IK.tolist(), *pool.keys_MK.tolist()]
            for one, number in zip(asked, pool.match(query).tolist(), strict=True):
                scores = [cosine(one, key) if k < 3 or usage[k - 3] else -2.0 for k, key in enumerate(keys)]
                best = scores.index(max(scores))
                assert number == (IDENTITY if best < 3 else best - 3)
            pulled = sum(cosine(o, pool.keys_MK[m].tolist()) for o, m in zip(asked, expected, strict=True)) / 6
            assert float(pool.pull(query, chosen).detach()) == pytest.approx(pulled, abs=1e-5)


@pytest.mark.parametrize("assign", ["dataset", "observation"])
def test_earlier_modulators_are_left_alone_while_there_are_fresh_ones(assign):
    vla = toy_vla(bridge=BRIDGE)
    vla.add_modulators(ModulatorConfig(count=2, rank=2, known_keys=1, assign=assign), seed=5)
    query = vla.pool.keys_MK[[0, 0, 0]].detach().clone()  # exactly the first key
    vla.pool.begin_dataset(query)
    assert vla.pool.learn(query).tolist() == [0, 0, 0]
    assert vla.pool.learn(query).tolist() == [0, 0, 0], "usage counts from the next dataset on"
    vla.pool.begin_dataset(query)
    assert vla.pool.learn(query).tolist() == [1, 1, 1]
    assert vla.pool.counts_M.tolist() == [6, 3]


def test_a_dataset_is_learnt_by_the_modulator_that_most_of_its_episodes_choose():
    vla = toy_vla(bridge=BRIDGE)
    vla.add_modulators(ModulatorConfig(count=3, rank=2, known_keys=1), seed=5)
    first, second = vla.pool.keys_MK[0].detach().clone(), vla.pool.keys_MK[1].detach().clone()
    vla.pool.begin_dataset(torch.stack([second, first, second]))
    assert vla.pool.learn(torch.stack([first, second])).tolist() == [1, 1]


def test_a_modulator_that_has_learnt_nothing_is_never_matched():
    vla = toy_vla(bridge=BRIDGE)
    vla.add_modulators(ModulatorConfig(count=2, rank=2, known_keys=1), seed=5)
    query = vla.pool.keys_MK[[0]].detach().clone()
    assert vla.pool.match(query).tolist() == [IDENTITY]
    vla.pool.begin_dataset(query)
    vla.pool.learn(query)
    assert vla.pool.match(query).tolist() == [0]


def test_keys_of_what_is_known_lie_in_its_clusters():
    pool = toy_vla(bridge=BRIDGE)
    pool.add_modulators(ModulatorConfig(count=1, known_keys=3), seed=0)
    pool = pool.pool
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, pool.centre_K.shape[0], generator=generator)
    points = centres.repeat_interleave(20, 0) + 0.05 * torch.randn(60, centres.shape[1], generator=generator)
    pool.know(points[torch.randperm(60, generator=generator)])
    assert (pool.similarity(centres, pool.known_IK).amax(1) > 0.99).all()


@pytest.mark.parametrize("decoder", [False, True])
def test_a_modulator_is_the_low_rank_product_in_every_layer_and_row(decoder):
    vla = toy_vla(bridge=BRIDGE)
    with_effect(vla, ModulatorConfig(count=3, rank=2, known_keys=2, decoder=decoder))
    with torch.no_grad():
        for up in vla.pool.up.values():
            up *= 0.05
    assert ("backbone-layers-0" in vla.pool.up) == decoder and "head-out" in vla.pool.up
    obs = toy_observation(3)
    both = act(vla, obs, [1, IDENTITY, 0])
    inp = vla.processor.prepare(obs)
    for row, number in enumerate([1, IDENTITY, 0]):
        merged = copy.deepcopy(vla)  # slow reference: the product added to each weight
        for part in ("bridge", "head", "backbone"):
            for name, layer in getattr(merged, part).named_modules():
                place = f"{part}.{name}".replace(".", "-")
                if place in vla.pool.up and number != IDENTITY:
                    with torch.no_grad():
                        layer.weight += 16 / 2 * vla.pool.up[place][number] @ vla.pool.down[place][number]
        merged.pool.chosen_B = torch.full((3,), IDENTITY)
        with torch.no_grad():
            alone = merged.act(merged.encode(inp), inp.proprio_BP)
        assert torch.allclose(both[row], alone[row], atol=1e-5), (row, number)
    assert not torch.allclose(act(vla, obs, [0, 0, 0])[0], both[0], atol=1e-3)


@pytest.mark.parametrize("decoder", [False, True])
def test_where_nothing_is_chosen_the_outputs_are_the_old_ones_bit_for_bit(decoder):
    plain = toy_vla(bridge=BRIDGE).eval()
    obs = toy_observation(4)
    before = act(plain, obs, None)
    vla = with_effect(plain, ModulatorConfig(count=3, rank=2, known_keys=2, decoder=decoder))
    assert torch.equal(act(vla, obs, [IDENTITY] * 4), before)
    mixed = act(vla, obs, [IDENTITY, 2, IDENTITY, 0])
    assert torch.equal(mixed[[0, 2]], before[[0, 2]])
    assert not torch.allclose(mixed[[1, 3]], before[[1, 3]], atol=1e-3)


def test_the_residual_of_rl_belongs_to_what_was_known():
    vla = toy_vla(bridge=BRIDGE)
    vla.add_refiner(16, seed=0)
    torch.nn.init.normal_(vla.refiner.net[-1].weight)
    obs, plain = toy_observation(2), copy.deepcopy(vla)
    plain.refiner = None
    before, head_alone = act(vla, obs, None), act(plain, obs, None)
    assert not torch.allclose(before, head_alone, atol=1e-3)
    vla.add_modulators(SMALL, seed=0)  # untrained: they add nothing yet
    acted = act(vla, obs, [IDENTITY, 1])
    assert torch.equal(acted[0], before[0]) and torch.equal(acted[1], head_alone[1])


def test_a_policy_chooses_at_the_first_decision_and_keeps_it_until_reset():
    vla = modulated().eval()
    policy, obs = VLAPolicy(vla), toy_observation(3)
    asked = []

    def rule(pool, query):
        asked.append(len(query))
        return torch.arange(len(query)) % 3

    policy.routing.rule = rule
    first = policy.act(obs)
    other = toy_observation(3, seed=1)
    other.instruction[:] = obs.instruction
    policy.act(other)
    assert asked == [3], "kept, whatever the pictures show by then"
    assert np.allclose(policy.act(obs), first, atol=1e-6)
    policy.reset([1])
    policy.act(obs)
    assert asked == [3, 1]
    other.instruction[2] = "pick up the blue cube"
    policy.act(other)
    assert asked == [3, 1] if obs.instruction[2] == other.instruction[2] else asked == [3, 1, 1]
    policy.reset()
    policy.act(obs)
    assert asked[-1] == 3
    policy.act(toy_observation(2))
    assert asked[-1] == 2, "other environments"


def test_a_choice_is_by_the_frozen_features_and_worlds_that_rest_ask_nothing():
    vla = modulated().eval()
    obs = toy_observation(3)
    inp = vla.processor.prepare(obs)
    with torch.no_grad():
        queries = query(vla, inp)
    vla.pool.know(queries[[0]])
    vla.pool.centre_K.zero_()
    vla.pool.known_IK.copy_(queries[[0, 0]])
    with torch.no_grad():
        vla.pool.keys_MK.copy_(queries[[1, 2, 2]])
    policy = VLAPolicy(vla)
    chunk = policy.act(obs)
    expected = vla.to_actions(act(vla, obs, [IDENTITY, 0, 1]))
    assert np.allclose(chunk, expected, atol=1e-6)
    obs = toy_observation(3)
    obs.live = np.array([False, True, True])
    policy.reset()
    half = policy.act(obs)
    assert (half[0] == 0).all() and np.allclose(half[1:], expected[1:], atol=1e-5)


def test_a_checkpoint_grows_by_the_modulators_alone_and_acts_the_same(tmp_path):
    plain = toy_vla(bridge=BRIDGE).eval()
    plain.save(tmp_path / "plain")
    vla = with_effect(plain)
    vla.save(tmp_path / "three")
    own = sum(part.nbytes for part in (*vla.pool.parameters(), *vla.pool.buffers()))
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "three")}
    assert own <= size["three"] - size["plain"] <= own + 200 * len(vla.pool.state_dict()), "and names of tensors"
    layers = sum(layer.in_features + layer.out_features for layer in _linear(plain))
    modulators, known, words = 3 * 4 * (2 * layers + 48), 4 * 3 * 48, 4 * 24 * 25
    assert own == modulators + known + words + 2 * 3 * 8 + 8  # the last: usage
    again = VLA.load(tmp_path / "three", load_backbone=load_toy)
    obs = toy_observation(3)
    assert again.config == vla.config and not again.pool.up["head-out"].equal(torch.zeros(1))
    assert torch.equal(act(again, obs, [0, 2, IDENTITY]), act(vla, obs, [0, 2, IDENTITY]))
    assert again.pool.counts_M.tolist() == [1, 1, 1]


def _linear(vla):
    return [m for part in (vla.bridge, vla.head) for m in part.modules() if isinstance(m, torch.nn.Linear)]


def test_only_the_pool_learns_and_what_is_frozen_does_not_drop_out():
    vla = modulated().train()
    names = {name for name, parameter in vla.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("pool.") for name in names)
    assert not any(module.training for module in vla.modules() if isinstance(module, torch.nn.Dropout))


def test_a_modulated_policy_asked_past_the_choice_says_so():
    vla = modulated().eval()
    inp = vla.processor.prepare(toy_observation(1))
    with pytest.raises(ValueError, match="has modulators, and nothing has chosen"):
        vla.act(vla.encode(inp), inp.proprio_BP)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"modulators": ModulatorConfig(count=0)}, "positive count"),
        ({"modulators": ModulatorConfig(known_keys=-1)}, "known_keys"),
        ({"modulators": ModulatorConfig(), "freeze_backbone": False}, "stands still"),
        ({"modulators": ModulatorConfig(), "bridge": FaithfulConfig("base")}, "released"),
    ],
)
def test_configurations_that_do_not_fit_are_named(config, says):
    assert says in model_problem(VLAConfig(**config))


def test_rl_refuses_modulators():
    from rl.models.vla_network import ActorConfig, make_actor

    with pytest.raises(ValueError, match="RL does not train modulators"):
        make_actor(modulated(), ("dx", "dy", "dz", "gripper"), ActorConfig())
