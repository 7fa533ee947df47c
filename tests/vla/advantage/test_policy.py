"""A policy that is told whether its actions shall be good: what that changes and leaves alone, and how it learns."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from rl.configs.learning import ActorConfig
from rl.external.residual_sac import Plans
from rl.models.vla_network import VLANetwork
from rl.offline.session import learn_without_resets
from tests.vla.toy_backbone import load_toy, toy_observation, toy_vla
from tests.vla.training.test_train import CONFIG, Killed, assert_bit_equal, demos, fresh, interrupt_at, kill, weights
from vla.core.config import load_json
from vla.data.batches import Batch
from vla.data.tables import flags
from vla.model.advantage import BAD, GOOD, UNTOLD, add_advantage
from vla.model.config import AdvantageConfig, ModulatorConfig, VLAConfig, model_problem
from vla.model.model import VLA
from vla.training.advantage.labels import FIGURES, LABELS, imitated_failures, telling
from vla.training.train import train
from vla.training.train_config import JudgeConfig

JUDGE = JudgeConfig(folds=2, value_steps=30, good=0.5, steps_ahead=3)


def actions(vla, told=None, rows=4):
    inp = vla.processor.prepare(toy_observation(rows))
    with torch.no_grad():
        features = vla.encode(inp)
        if told is not None:
            features = replace(features, advantage_B=torch.full((rows,), told))
        return vla.act(features, inp.proprio_BP)


def learnt(guidance=1.0, seed=1):
    """A policy whose two labels do no longer nothing."""
    vla = toy_vla().eval()
    add_advantage(vla, AdvantageConfig(guidance), seed=0)
    generator = torch.Generator().manual_seed(seed)
    for last in (vla.bridge.advantage.good, vla.bridge.advantage.bad):
        last.weight.data = torch.randn(last.weight.shape, generator=generator)
    return vla


def test_a_policy_that_can_be_told_acts_as_before_until_it_learns():
    plain, told = toy_vla().eval(), toy_vla().eval()
    add_advantage(told, AdvantageConfig(), seed=0)
    assert all(torch.equal(actions(told, word), actions(plain)) for word in (None, GOOD, UNTOLD, BAD))
    assert (
        "bridge.advantage.good.weight" in told.state_dict() and "bridge.advantage.good.weight" not in plain.state_dict()
    )
    before = told.bridge.advantage
    add_advantage(told, AdvantageConfig(), seed=0)  # a second iteration
    assert told.bridge.advantage is before


def test_it_asks_for_good_actions_unless_it_is_told_otherwise(tmp_path):
    vla = learnt()
    good, bad, untold = (actions(vla, word) for word in (GOOD, BAD, UNTOLD))
    assert torch.equal(actions(vla), good)
    assert not torch.allclose(good, bad) and not torch.allclose(good, untold)
    assert torch.equal(untold, actions(toy_vla().eval()))
    vla.save(tmp_path)
    again = VLA.load(tmp_path, load_backbone=load_toy)
    assert again.config.advantage == AdvantageConfig(1.0) and torch.equal(actions(again), good)
    vla.bridge.advantage.asked = BAD
    assert torch.equal(actions(vla), bad)


def test_guidance_goes_beyond_what_it_does_untold():
    vla = learnt()
    good, untold = actions(vla, GOOD), actions(vla, UNTOLD)
    torch.testing.assert_close(actions(learnt(1.5)), untold + 1.5 * (good - untold))
    torch.testing.assert_close(actions(learnt(0.0)), untold)


def test_each_row_is_told_for_itself():
    vla = learnt()
    inp = vla.processor.prepare(toy_observation(3))
    with torch.no_grad():
        features = replace(vla.encode(inp), advantage_B=torch.tensor([GOOD, BAD, UNTOLD]))
        mixed = vla.act(features, inp.proprio_BP)
    for row, word in enumerate((GOOD, BAD, UNTOLD)):
        torch.testing.assert_close(mixed[row], actions(vla, word, rows=3)[row])


def test_some_labels_are_left_out_at_random_and_nothing_is_drawn_without_labels():
    vla, told = toy_vla(), torch.tensor([GOOD, BAD]).repeat(1000)
    features = vla.encode(vla.processor.prepare(toy_observation(1)))
    batch = Batch(features, None, None, None, told_B=told)
    torch.manual_seed(0)
    seen = telling(features, batch, 0.3).advantage_B
    assert abs((seen == UNTOLD).float().mean() - 0.3) < 0.05
    assert torch.equal(seen[seen != UNTOLD], told[seen != UNTOLD])
    assert torch.equal(telling(features, batch, 0.0).advantage_B, told)
    state = torch.get_rng_state()
    assert telling(features, replace(batch, told_B=None), 0.3) is features
    assert torch.equal(torch.get_rng_state(), state)


def logged(episodes=40, seed=3):
    """Episodes of 6 frames in which one thing is seen and two are done: that with the first sign succeeds."""
    data = demos(episodes=episodes, seed=seed)
    won = np.arange(episodes) % 2 == 0
    last = np.arange(data.num_frames) % 6 == 5
    sign = np.where(won, 1.0, -1.0).repeat(6)
    action = data.action.copy()
    action[:, 0] = 0.05 * sign
    proprio = data.proprio.copy()
    proprio[:, 2] = sign * (np.arange(data.num_frames) % 6 >= 3)  # what it led to
    images = {camera: np.full_like(pixels, 90) for camera, pixels in data.images.items()}
    return replace(data, images=images, action=action, proprio=proprio, success=last & won.repeat(6))


def run(**changes):
    start = fresh(CONFIG)
    add_advantage(start, AdvantageConfig(), seed=0)
    return start, replace(CONFIG, model=start.config, advantage=JUDGE, **changes)


def test_it_learns_which_of_two_things_was_good(tmp_path):
    vla, cfg = run(steps=120, lr=4e-3, batch_size=32)
    data = logged()
    train(cfg, vla, data, tmp_path)
    first = np.flatnonzero(np.arange(data.num_frames) % 6 == 0)[:8]
    inp = vla.processor.prepare(data.observation(first))
    with torch.no_grad():
        features = vla.encode(inp)
        good, bad = (
            vla.act(replace(features, advantage_B=torch.full((8,), word)), inp.proprio_BP)[:, 0, 0]
            for word in (GOOD, BAD)
        )
    assert good.mean() > bad.mean() + 1.0
    figures = load_json(tmp_path / FIGURES)["only"]
    assert figures["episodes"] == 40 and figures["successes"] == 20
    assert figures["good_of_successes"] > 2 * figures["good_of_failures"]


def test_a_resumed_run_is_bit_equal_and_is_not_judged_again(tmp_path, monkeypatch):
    data = {"demos": demos(), "logs": logged(12)}
    straight, cfg = run()
    train(cfg, straight, data, tmp_path / "a")
    broken_off, _ = run()
    with pytest.raises(Killed):
        train(cfg, broken_off, data, tmp_path / "b", on_step=interrupt_at(5, kill))
    resumed = VLA.load(tmp_path / "b", load_backbone=load_toy, merge=False)
    monkeypatch.setattr("vla.training.advantage.labels.judge", None)
    train(cfg, resumed, data, tmp_path / "b", resume=True)
    assert_bit_equal(weights(resumed), weights(straight))
    assert (tmp_path / "a" / LABELS).read_bytes() == (tmp_path / "b" / LABELS).read_bytes()


def test_demonstrations_are_good_and_the_control_mixes_labels(tmp_path):
    from vla.core.checkpoint import load_tensors

    data, labels = {"demos": demos(), "logs": logged(12)}, {}
    for shuffled in (False, True):
        vla, cfg = run(steps=1)
        out = tmp_path / str(shuffled)
        train(replace(cfg, advantage=replace(JUDGE, shuffled=shuffled)), vla, data, out)
        labels[shuffled] = load_tensors(out / LABELS)["label"]
        assert (labels[shuffled][:24] == GOOD).all() and set(labels[shuffled].tolist()) == {GOOD, BAD}
    assert labels[True].sum() == labels[False].sum() and not torch.equal(labels[True], labels[False])


def test_what_cannot_be_told_or_judged_is_refused(tmp_path):
    vla, cfg = run()
    with pytest.raises(ValueError, match="none of the datasets .demonstrations. says which episodes succeeded"):
        train(cfg, vla, demos(), tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be told which actions were good"):
        train(replace(CONFIG, advantage=JUDGE), fresh(CONFIG), logged(12), tmp_path / "y")
    assert "leave out --tune" in replace(cfg, model=replace(cfg.model, freeze_backbone=False)).problem()
    assert "good must be in" in replace(cfg, advantage=replace(JUDGE, good=1.0)).problem()
    assert "guidance" in model_problem(VLAConfig(advantage=AdvantageConfig(-1.0)))
    assert "without modulators" in model_problem(VLAConfig(advantage=AdvantageConfig(), modulators=ModulatorConfig()))
    refined = toy_vla()
    refined.add_refiner(8, seed=0)
    with pytest.raises(ValueError, match="guided 2 times as far"):
        VLANetwork(learnt(guidance=2.0), ActorConfig())
    with pytest.raises(ValueError, match="guided 2 times as far"):
        learn_without_resets(learnt(guidance=2.0), None, demos(), None, tmp_path, evaluate=None)
    with pytest.raises(ValueError, match="guided 2 times as far"):
        Plans(learnt(guidance=2.0), 1)
    Plans(learnt(), 1)
    assert "flow head" in model_problem(VLAConfig(head="flow", advantage=AdvantageConfig(2.0)))
    with pytest.raises(ValueError, match="refined by RL"):
        add_advantage(refined, AdvantageConfig(), seed=0)


def test_failures_that_nobody_tells_apart_are_told():
    assert imitated_failures("x", demos()) == []
    data = logged(12)
    failed = sum(not data.success[data.episode_index == number].any() for number in data.episodes)
    (line,) = imitated_failures("logs", data)
    assert failed > 0 and line.startswith(f"logs: {failed} of 12 episodes did not succeed, by feature next.success")
    assert imitated_failures("x", replace(data, success=np.ones_like(data.success))) == []


def test_a_success_that_is_no_number_is_refused(tmp_path):
    table = pa.table({"episode_index": [0, 0], "frame_index": [0, 1], "next.success": [0.0, 1.0]})
    assert flags(tmp_path, table, "next.success").tolist() == [False, True]
    with pytest.raises(ValueError, match="feature 'next.success' is NaN at episode 0, frame 1"):
        flags(tmp_path, table.set_column(2, "next.success", pa.array([0.0, float("nan")])), "next.success")
