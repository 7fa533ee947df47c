"""Learning with a pool of modulators: one dataset after another, resumed bit for bit, and nothing old is lost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, load_toy, toy_observation, toy_stats
from tests.vla.training.test_train import (
    CONFIG,
    Killed,
    assert_bit_equal,
    ctrl_c,
    demos,
    fresh,
    interrupt_at,
    kill,
    weights,
)
from vla.backbones.hub import load as load_backbone
from vla.model.config import BridgeConfig, ModulatorConfig, VLAConfig
from vla.model.model import VLA
from vla.model.modulators import IDENTITY, applied
from vla.model.policy import VLAPolicy
from vla.model.routing import query
from vla.training.modulation import episode_queries, extend
from vla.training.train import train

POOL = ModulatorConfig(count=3, rank=2, known_keys=2)


def known():
    return {"old": demos(seed=7)}


def new(seed):
    """Demonstrations in words that the known ones have not."""
    data = demos(seed=seed)
    return replace(data, instruction=["the cube the red the blue the green" for _ in data.instruction])


def extended(pool=POOL, cfg=CONFIG):
    """A policy with a fresh pool, and the run that trains it."""
    vla = fresh(cfg)
    extend(vla, pool, known(), seed=0)
    return vla, replace(cfg, model=vla.config)


def act(vla, number, obs=None):
    inp = vla.processor.prepare(obs or toy_observation(4))
    with torch.no_grad(), applied(vla, torch.full((inp.proprio_BP.shape[0],), number)):
        return vla.act(vla.encode(inp), inp.proprio_BP)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("how", "resumed_from"), [(kill, 4), (ctrl_c, 6)])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, decoder, how, resumed_from):
    pool, data = replace(POOL, decoder=decoder), demos(seed=1)
    straight, cfg = extended(pool, replace(CONFIG, query_noise=0.5))
    train(cfg, straight, data, tmp_path / "a")
    broken_off, _ = extended(pool)
    if how is kill:
        with pytest.raises(Killed):
            train(cfg, broken_off, data, tmp_path / "b", on_step=interrupt_at(6, how))
    else:
        train(cfg, broken_off, data, tmp_path / "b", on_step=interrupt_at(6, how))
    again = VLA.load(tmp_path / "b", load_backbone=load_toy, merge=False)
    seen = int(again.pool.counts_M.sum())
    assert seen == 8 * resumed_from and again.pool.before_M.sum() == 0, "counts of frames, none of earlier datasets"
    train(cfg, again, data, tmp_path / "b", resume=True)
    assert_bit_equal(weights(straight), weights(again))
    assert int(again.pool.counts_M.sum()) == 8 * 12


def test_a_second_dataset_leaves_policy_and_first_modulator_untouched(tmp_path):
    vla, cfg = extended()
    policy, obs = weights(vla), toy_observation(4)
    old = act(vla, IDENTITY)
    train(cfg, vla, demos(seed=1), tmp_path / "first")
    used = (vla.pool.counts_M > 0).nonzero().flatten().tolist()
    assert used
    after_first, acted = weights(vla), [act(vla, number) for number in used]
    vla = VLA.load(tmp_path / "first", load_backbone=load_toy)
    lines = extend(vla, None, {}, seed=0)
    assert lines == [f"{len(used)} of 3 modulators hold what was learnt before this dataset"]
    train(replace(cfg, model=vla.config), vla, demos(seed=2), tmp_path / "second")
    after_second = weights(vla)
    for name in policy:
        if not name.startswith("pool."):
            assert torch.equal(policy[name], after_second[name]), name
    for name in after_first:
        if name.startswith(("pool.up", "pool.down", "pool.keys")):
            assert torch.equal(after_first[name][used], after_second[name][used]), name
            assert not torch.equal(after_first[name], after_second[name]), "a fresh one has learnt"
    assert torch.equal(act(vla, IDENTITY, obs), old)
    for number, before in zip(used, acted, strict=True):
        assert torch.equal(act(vla, number), before)


def test_it_learns_and_the_keys_turn_to_what_asked(tmp_path):
    vla, cfg = extended(cfg=replace(CONFIG, steps=80, lr=3e-3))
    data = new(seed=1)
    queries, _ = episode_queries(vla, data)
    before = act(vla, IDENTITY)
    losses = []
    train(cfg, vla, data, tmp_path / "run", on_step=lambda p: losses.append(p.loss) if p.stage == "train" else None)
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])
    matched = vla.pool.match(queries)
    assert (matched != IDENTITY).all()
    assert float(vla.pool.pull(queries, vla.pool.choose(queries)).detach()) > 0.5
    assert torch.equal(act(vla, IDENTITY), before)


def test_the_decoder_learns_too(tmp_path):
    vla, cfg = extended(replace(POOL, decoder=True))
    start = weights(vla)
    train(cfg, vla, demos(seed=1), tmp_path / "run")
    used = int(vla.pool.counts_M.argmax())
    assert vla.pool.up["backbone-layers-1"][used].abs().sum() > 0
    assert torch.equal(start["backbone.layers.1.weight"], vla.state_dict()["backbone.layers.1.weight"])


def test_each_frame_asks_by_the_first_of_its_episode():
    vla, _ = extended()
    data = demos(episodes=3, length=5, seed=4)
    queries, episode = episode_queries(vla, data)
    for frame in range(15):
        first = frame // 5 * 5
        with torch.no_grad(), applied(vla, torch.tensor([IDENTITY])):
            alone = query(vla, vla.processor.prepare(data.observation(np.array([first]))))
        assert torch.allclose(queries[episode[frame]], alone[0], atol=1e-5)


def test_what_was_known_is_recognised(tmp_path):
    vla, cfg = extended(replace(POOL, known_keys=4))
    train(cfg, vla, new(seed=1), tmp_path / "run")
    queries, _ = episode_queries(vla, known()["old"])
    assert vla.pool.match(queries).tolist() == [IDENTITY] * len(queries)
    policy = VLAPolicy(VLA.load(tmp_path / "run", load_backbone=load_toy))
    assert np.isfinite(policy.act(toy_observation(2))).all()


def test_extending_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="--known DATASET"):
        extend(fresh(), POOL, {}, seed=0)
    vla, _ = extended()
    with pytest.raises(ValueError, match="leave out --known"):
        extend(vla, None, known(), seed=0)
    with pytest.raises(ValueError, match="3 modulators: leave out --modulators"):
        extend(vla, replace(POOL, count=4), {}, seed=0)
    vla.pool.counts_M += 1
    assert "warning: all modulators are in use" in extend(vla, None, {}, seed=0)[-1]
    assert "modulators learn without compile" in replace(CONFIG, model=vla.config, compile="inductor").problem()
    plain = fresh()
    plain.members = {"a": plain.processor}
    with pytest.raises(ValueError, match="one robot"):
        extend(plain, POOL, known(), seed=0)


def test_instructions_that_differ_by_a_verb_alone_are_told_apart():
    vla = VLA.build(
        VLAConfig(backbone="small", bridge=BridgeConfig(width=32)), stats=toy_stats(), action_spec=SPEC,
        cameras=CAMERAS, max_text_tokens=24, backbone=load_backbone("small"),
    ).eval()  # fmt: skip
    vla.add_modulators(ModulatorConfig(count=2, known_keys=4), seed=0)
    pulled = ("open the {}", "pull the {} open", "slide the {} open", "please open the {}")
    pushed = ("close the {}", "push the {} shut", "slide the {} shut", "please close the {}")
    lifted = (
        "pick up the {}",
        "lift the {}",
        "push the {} to the left",
        "put the {} on the plate",
        "slide the {} away",
    )
    things = ("red cube", "blue ball", "green bar", "white cabinet", "black drawer", "yellow drawer")
    said = {
        "known": [sentence.format(thing) for sentence in lifted for thing in things[:3]],
        "open": [sentence.format(thing) for sentence in pulled for thing in things[3:]],
        "close": [sentence.format(thing) for sentence in pushed for thing in things[3:]],
    }

    def ask(sentences):
        with torch.no_grad():
            seen = toy_observation(len(sentences), size=96, seed=len(sentences[0]))
            return query(vla, vla.processor.prepare(replace(seen, instruction=list(sentences))))

    vla.pool.know(ask(said["known"]))
    with torch.no_grad():
        for number, task in enumerate(("open", "close")):
            vla.pool.keys_MK[number] = vla.pool.asked(ask(said[task])).mean(0)
    vla.pool.counts_M += 1
    right = [vla.pool.match(ask(said[task])) for task in ("open", "close", "known")]
    assert (right[0] == 0).all() and (right[1] == 1).all() and (right[2] == IDENTITY).all()
