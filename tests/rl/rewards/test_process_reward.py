"""Milestones without a teacher, the model that recognises them, its calibration against the truth, its reward."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.configs.learning import ActorConfig
from rl.configs.rewards import MilestoneConfig, ProgressConfig, ShapingConfig
from rl.models.actor import GreedyPolicy
from rl.models.vla_network import make_actor
from rl.rewards import process_reward
from rl.rewards.milestones import frame_labels, gripper_events, milestones
from rl.rewards.process_reward import (
    Episode,
    ProgressModel,
    _calibrated,
    auc,
    completed,
    events,
    fit_progress,
)
from rl.rewards.shaping import Shaping, watch
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.toy import SPEC, PointReach, ToyVLA, config

MARKS = MilestoneConfig()
LENGTH = 30


def pick_and_place() -> tuple[np.ndarray, np.ndarray]:
    """Reach, stop, close at 10, carry, stop, open at 20, retreat and stop."""
    gripper = np.where((np.arange(LENGTH) >= 10) & (np.arange(LENGTH) < 20), -1.0, 1.0)
    speed = np.full(LENGTH, 0.05)
    speed[[9, 10, 11, 19, 20, 28, 29]] = 0.002
    return gripper, np.cumsum(speed)[:, None] * np.ones(3)


def test_segments_end_at_lasting_gripper_changes():
    gripper, _ = pick_and_place()
    assert gripper_events(gripper, MARKS) == [10, 20]
    chatter = gripper.copy()
    chatter[4] = -1.0  # one frame: no event
    assert gripper_events(chatter, MARKS) == [10, 20]
    assert gripper_events(np.linspace(1, -1, LENGTH), MARKS) != [], "a slow closing is a closing"
    assert len(gripper_events(np.linspace(1, -1, LENGTH), MARKS)) == 1
    assert gripper_events(np.ones(LENGTH), MARKS) == []


def test_key_frames_are_where_the_arm_stands_near_a_change_and_at_the_end():
    assert [abs(a - b) <= 1 for a, b in zip(milestones(*pick_and_place(), MARKS), [10, 20, 29], strict=True)]
    marks = milestones(*pick_and_place(), MARKS)
    assert len(marks) == 3 and marks == sorted(marks)
    success, failure = (frame_labels(LENGTH, marks, won, MARKS) for won in (True, False))
    assert success.sum() >= 7 and failure.sum() == 0 and success[[5, 15, 25]].sum() == 0


def test_auc_counts_pairs():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert auc(np.ones(6), np.array([0, 1, 0, 1, 0, 1])) == 0.5 and auc(np.ones(3), np.zeros(3)) == 0.5


def synthetic(count: int, seed: int = 0) -> list[Episode]:
    """Frames whose features show, in noise, whether the arm stands at the object and whether it was told so."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        gripper, position = pick_and_place()
        success = k % 3 > 0
        at = frame_labels(LENGTH, milestones(gripper, position, MARKS), True, MARKS)
        signal = at if success else np.where(np.arange(LENGTH) > 15, 0.0, at)  # failures grasp, but do not place
        state = rng.normal(0, 0.15, (LENGTH, 4))
        other = rng.normal(0, 0.15, (LENGTH, 4))
        state[:, 0] += signal
        state[:, 1] += 1.0
        other[:, 0] += signal
        made.append(Episode(*(x.astype(np.float32) for x in (state, other, gripper, position)), success))
    return made


def test_reward_model_is_calibrated_to_one_false_positive_in_a_hundred():
    model, report = fit_progress(synthetic(300), ProgressConfig(steps=300))
    assert report.goals == 3 and report.frame_auc > 0.9
    assert report.calibration_negatives > 90 < report.negatives
    assert report.calibration_false_positives <= 0.01 * report.calibration_negatives
    assert report.false_positives <= 0.06 * report.negatives, "on others than it was calibrated on"
    assert report.false_negatives <= 0.2 * report.positives
    assert not any(p.requires_grad for p in model.parameters()), "frozen while RL uses it"
    # on episodes that neither trained nor calibrated it
    fresh = synthetic(150, seed=9)
    p = [model(torch.from_numpy(e.state_TS)).numpy() for e in fresh]
    claims = np.array([completed(x, report.threshold, report.goals) for x in p])
    truth = np.array([e.success for e in fresh])
    assert claims[~truth].mean() <= 0.06 and claims[truth].mean() > 0.7
    assert json.loads(json.dumps(report.to_dict()))["false_positive_wilson95"][1] < 0.1
    with pytest.raises(ValueError, match="succeeded"):
        fit_progress([replace(e, success=False) for e in synthetic(20)])


def test_no_episode_is_judged_by_a_model_that_learnt_from_it(monkeypatch):
    learnt, judged = {}, []
    train, told_apart = process_reward._train, process_reward._scores

    def training(episodes, *args):
        model = train(episodes, *args)
        learnt[id(model)] = {id(e) for e in episodes}
        return model

    def telling_apart(model, episodes):
        judged.append({id(e) for e in episodes})
        assert not learnt[id(model)] & judged[-1], "learnt from what it judges"
        return told_apart(model, episodes)

    monkeypatch.setattr(process_reward, "_train", training)
    monkeypatch.setattr(process_reward, "_scores", telling_apart)
    episodes = synthetic(40)
    _, report = fit_progress(episodes, ProgressConfig(steps=5))
    assert sum(map(len, judged)) == len(set().union(*judged)) == len(episodes)  # calibration's and the report's
    assert report.calibration_negatives > report.negatives > 0


def test_few_failures_promise_nothing():
    never, always = [np.full(LENGTH, 0.1)], [np.tile([0.1, 0.99], LENGTH)]
    assert _calibrated(never * 99, 2, 0.01) == (0.5, 0)
    assert _calibrated(never * 98, 2, 0.01)[0] > 1, "one in a hundred, from fewer than a hundred"
    assert _calibrated(never * 198 + always, 2, 0.01) == (0.5, 1)
    threshold, false = _calibrated(never * 150 + always, 2, 0.01)
    assert false == 0 and threshold >= 0.99 - 1e-6


def test_a_model_that_knows_nothing_is_never_believed():
    rng = np.random.default_rng(0)
    noise = [
        replace(e, state_TS=rng.normal(size=(LENGTH, 4)).astype(np.float32), other_TS=e.state_TS) for e in synthetic(60)
    ]
    model, report = fit_progress(noise, ProgressConfig(steps=50))
    assert report.calibration_false_positives <= 0.01 * report.calibration_negatives
    assert float(model.threshold) > 0.6


def test_events_are_rising_edges():
    p = np.array([0.9, 0.9, 0.1, 0.8, 0.2, 0.95, 0.95])
    assert events(p, 0.5).tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert completed(p, 0.5, 3) and not completed(p, 0.5, 4)


class Given(ProgressModel):
    """Believes what the first component says."""

    def __init__(self):
        super().__init__(1, 1)
        self.threshold.fill_(0.5)
        self.goals.fill_(2)

    def forward(self, state):
        return state[:, 0]


def test_shaping_is_a_potential_difference_that_adds_up_to_nothing(monkeypatch):
    monkeypatch.setattr("rl.rewards.shaping.summary", lambda conditions, proprio: proprio)
    shaping = Shaping(2, coef=0.3, gamma=0.9, model=Given())
    seen = torch.tensor([[0.0, 0.0], [0.9, 0.0], [0.9, 0.0], [0.0, 0.9], [0.9, 0.0], [0.9, 0.9]])
    shaping.begin([0, 1])
    phi = [shaping.potential(None, row[:, None]) for row in seen]
    assert np.array_equal(np.stack(phi, 1), [[0, 0.5, 0.5, 0.5, 1, 1], [0, 0, 0, 0.5, 0.5, 1]])
    never, over = np.zeros(2, bool), np.ones(2, bool)
    total, discount = np.zeros(2), 1.0
    for t in range(6):
        last = t == 5
        total += discount * shaping.reward(phi[t], phi[t] if last else phi[t + 1], over if last else never)
        discount *= 0.9
    assert np.allclose(total, -0.3 * phi[0], atol=1e-6), "discounted, it telescopes: no policy gains by it"
    shaping.begin([0])
    assert shaping.potential(None, torch.zeros(2, 1)).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="coef"):
        Shaping(2, coef=2.0)


class Told(PointReach):
    """The gripper closes only when there."""

    def alternative_instructions(self):
        return ["reach nothing"] * self.num_envs


def test_episodes_are_watched_with_their_last_frame_and_their_verdict(cloned):
    model = ToyVLA()
    model.load_state_dict(cloned)
    actor, env = make_actor(model, SPEC.names), Told(8)
    episodes = watch(actor, GreedyPolicy(actor, SPEC, 2), env, range(16), position=slice(0, 2))
    assert len(episodes) == 16 and 0 < sum(e.success for e in episodes) < 16
    for e in episodes:
        assert len(e.state_TS) == len(e.other_TS) == len(e.gripper_T) == len(e.position_TX) >= 2
        assert e.state_TS.shape[1] == 16 + 2 and e.position_TX.shape[1] == 2
        # a row a decision of two steps, and one of the last frame
        assert 2 * len(e.state_TS) - 3 <= e.control_steps <= 2 * len(e.state_TS) - 2


def test_the_potentials_change_joins_the_reward_of_the_decision_that_made_it(cloned):
    class Position(Shaping):
        def potential(self, conditions, proprio):
            return proprio[:, 0].numpy()

    model = ToyVLA()
    model.load_state_dict(cloned)
    actor = make_actor(model, SPEC.names)

    def collected(shaped):
        env = Told(8)
        shaping = Position(8, coef=0.5, gamma=0.9) if shaped else None
        noise = torch.Generator().manual_seed(1)
        worlds = Collector(actor, env, generator=noise, train_seeds=(0, 1000), shaping=shaping)
        buffer = RolloutBuffer(6, 8)
        worlds.collect(buffer)
        return buffer, env

    plain, _ = collected(False)
    shaped, env = collected(True)
    before = shaped.time_major("proprio")[..., 0]
    after = torch.cat([before[1:], torch.from_numpy(env.pos[None, :, 0])])
    ended = shaped.time_major("terminated") | shaped.time_major("truncated")
    expected = plain.time_major("reward") + 0.5 * (0.9 * torch.where(ended, 0.0, after) - before)
    assert ended.any() and torch.allclose(shaped.time_major("reward"), expected, atol=1e-6)


def test_a_shaped_run_reports_its_model_and_resumes_exactly(cloned, tmp_path):
    def run(out, updates, resume=False, **changes):
        model = ToyVLA()
        model.load_state_dict(cloned)
        how = ShapingConfig(episodes=64, progress=ProgressConfig(steps=60))
        settings = replace(config(max_updates=updates, num_envs=16), shaping=how, actor=ActorConfig(), **changes)
        runner = Runner(model, Told(16), settings, out)
        runner.run(resume=resume)
        return runner

    whole = run(tmp_path / "whole", 4)
    report = json.loads((tmp_path / "whole/progress.json").read_text())
    assert report["positives"] > 0 and report["calibration_false_positives"] <= 0.01 * report["calibration_negatives"]
    played = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    assert played["env_steps"] > played["control_steps"], "what was watched was played, too"
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume=True)
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(tensor, parts.learner.tensors()[name]), name
    frozen = whole.collector.shaping.model.state_dict()
    assert all(torch.equal(t, parts.collector.shaping.model.state_dict()[n]) for n, t in frozen.items())
