"""A policy that remembers: what it sees while acting is what training showed it, and nothing leaks between episodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, load_toy, toy_backbone, toy_observation, toy_vla
from tests.vla.training.test_train import CONFIG, demos
from vla.backbones.features import with_query_noise
from vla.core.config import load_json, save_json
from vla.core.types import Observation
from vla.data.feature_cache import encode_demos
from vla.model.config import BridgeConfig, MemoryConfig
from vla.model.memory.recall import EMPTY
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.training.memory_budget import estimate
from vla.training.train import build_vla, train

STEPS = 2


def remembering(rule="bank", frames=3):
    bridge = BridgeConfig(width=32, gate_init=1.0)
    return toy_vla(bridge=bridge, chunk_size=4, n_action_steps=STEPS, memory=MemoryConfig(frames, rule)).eval()


def moments(count, batch=1, seed=0):
    return [toy_observation(batch, seed=seed * 1000 + number) for number in range(count)]


def played(policy, observations, **changes):
    return np.stack([policy.act(replace(obs, **changes)) for obs in observations])


@pytest.mark.parametrize("rule", ["bank", "uniform", "last", "current"])
def test_what_acting_remembers_is_what_training_showed(rule, monkeypatch):
    data = demos(episodes=2, length=13)
    vla = build_vla(
        replace(CONFIG, model=replace(CONFIG.model, memory=MemoryConfig(3, rule), n_action_steps=STEPS)), data,
        action_spec=SPEC, backbone=toy_backbone(point_dim=6),
    ).eval()  # fmt: skip
    monkeypatch.setattr("vla.data.feature_cache.CACHE_DTYPE", torch.float32)
    encoded = encode_demos(vla, data)
    seen, forward = [], vla.bridge.memory.forward
    monkeypatch.setattr(
        vla.bridge.memory, "forward", lambda given, *rest: (seen.append(given.memory_BMK), forward(given, *rest))[1]
    )
    for phase in range(STEPS):
        for episode in range(2):
            policy = VLAPolicy(vla)
            for frame in range(13 * episode + phase, 13 * (episode + 1), STEPS):
                policy.act(data.observation(slice(frame, frame + 1)))
                shown = encoded.take(torch.tensor([frame])).seen.memory_BMK
                torch.testing.assert_close(seen[-1], shown, atol=1e-5, rtol=1e-4)
    assert rule == "current" or (encoded.take(torch.arange(26)).seen.memory_BMK[..., -1] == EMPTY).any()


def test_what_was_seen_before_decides():
    vla = remembering()
    now = moments(1)
    alone = played(VLAPolicy(vla), now)
    assert np.abs(played(VLAPolicy(vla), [*moments(3, seed=1), *now])[-1] - alone[-1]).max() > 1e-4
    other = played(VLAPolicy(vla), [*moments(3, seed=2), *now])[-1]
    assert np.abs(played(VLAPolicy(vla), [*moments(3, seed=1), *now])[-1] - other).max() > 1e-4
    current = remembering("current")
    np.testing.assert_array_equal(
        played(VLAPolicy(current), [*moments(3, seed=1), *now])[-1], played(VLAPolicy(current), now)[-1]
    )


def test_a_reset_forgets_that_environment_and_no_other():
    vla = remembering()
    before, after = moments(3, batch=2, seed=1), moments(2, batch=2, seed=2)
    policy = VLAPolicy(vla)
    played(policy, before)
    policy.reset([1])
    mixed = played(policy, after)
    kept, fresh = VLAPolicy(vla), VLAPolicy(vla)
    played(kept, before)
    np.testing.assert_allclose(mixed[:, 0], played(kept, after)[:, 0], atol=1e-6)
    np.testing.assert_allclose(mixed[:, 1], played(fresh, after)[:, 1], atol=1e-6)
    policy.reset()
    np.testing.assert_allclose(played(policy, after), played(VLAPolicy(vla), after), atol=1e-6)


def test_environments_do_not_see_each_others_past_whatever_rows_they_come_in():
    vla = remembering()
    first, second = moments(5, seed=1), moments(5, seed=2)
    apart = [played(VLAPolicy(vla), one)[:, 0] for one in (first, second)]
    policy = VLAPolicy(vla)
    for step in range(5):
        rows, numbers = (first[step], second[step]), [7, 1_000_003]
        if step % 2:
            rows, numbers = rows[::-1], numbers[::-1]
        obs = Observation(
            {camera: np.concatenate([row.images[camera] for row in rows]) for camera in CAMERAS},
            np.concatenate([row.proprio for row in rows]),
            [row.instruction[0] for row in rows],
            env_ids=np.array(numbers),
        )
        chunk = policy.act(obs)
        for row, number in enumerate(numbers):
            np.testing.assert_allclose(chunk[row], apart[number > 7][step], atol=1e-5)


def test_an_environment_that_is_not_live_remembers_nothing_of_it():
    vla = remembering()
    policy, alone = VLAPolicy(vla), VLAPolicy(vla)
    observations = moments(4, batch=2)
    for number, obs in enumerate(observations):
        chunk = policy.act(replace(obs, live=np.array([True, number != 1])))
        if number != 1:
            np.testing.assert_allclose(chunk[1], alone.act(obs.select([1]))[0], atol=1e-5)


def test_it_learns_is_saved_and_loaded(tmp_path):
    data = demos(episodes=4, length=9)
    cfg = replace(CONFIG, model=replace(CONFIG.model, memory=MemoryConfig(3), n_action_steps=STEPS), steps=6)
    vla = build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))
    assert estimate(cfg, vla, {"data": data}).lines()  # what `vla train` says before it begins
    start = {name: value.clone() for name, value in vla.bridge.named_parameters()}
    train(cfg, vla, data, tmp_path / "out")
    moved = [name for name, value in vla.bridge.named_parameters() if not torch.equal(value, start[name])]
    assert {"memory.empty", "memory.time.weight", "blocks.0.project_memory.weight", "memory.stem.0.weight"} <= {*moved}
    loaded = VLA.load(tmp_path / "out", load_backbone=load_toy)
    observations = [data.observation(slice(frame, frame + 1)) for frame in range(0, 9, STEPS)]
    np.testing.assert_allclose(played(VLAPolicy(loaded), observations), played(VLAPolicy(vla), observations), atol=1e-6)
    assert VLAPolicy(loaded).spec.memory_frames == 3


def test_query_noise_is_on_remembered_states_too_and_on_nothing_else():
    data = demos(episodes=1, length=9)
    cfg = replace(CONFIG, model=replace(CONFIG.model, memory=MemoryConfig(3), n_action_steps=STEPS))
    vla = build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))
    features = encode_demos(vla, data).take(torch.arange(9)).seen
    rows, noisy = features.memory_BMK, with_query_noise(features, 2.0).memory_BMK
    width = features.queries_BLQD.shape[2] * features.queries_BLQD.shape[3]
    assert torch.equal(noisy[..., width:], rows[..., width:]) and torch.equal(noisy[0], rows[0])  # nothing is kept yet
    assert (noisy - rows)[8, :, :width].std() == pytest.approx(2.0, rel=0.2)


def test_wrong_use_is_refused_in_one_line():
    vla = remembering()
    with pytest.raises(ValueError, match="decisions 2 steps apart"):
        VLAPolicy(vla, n_action_steps=4)
    inp = vla.processor.prepare(toy_observation(1))
    with pytest.raises(ValueError, match="acts through VLAPolicy"):
        vla.predict(inp)


def test_a_memory_of_more_decisions_than_an_episode_has_is_refused():
    """Before anything is built: the policy's layers are as large as its memory."""
    data = demos(length=9)

    def built(frames):
        memory = MemoryConfig(frames, "bank")
        cfg = replace(CONFIG, model=replace(CONFIG.model, memory=memory, n_action_steps=STEPS))
        return build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))

    assert built(5).config.memory.frames == 5
    for frames in (6, 10**6):
        with pytest.raises(ValueError, match=f"a memory of {frames} frames .* longest of 9 frames: .* 5 or fewer"):
            built(frames)
    with pytest.raises(ValueError, match="--memory-frames 4 or fewer"):
        build_vla(replace(CONFIG, model=replace(CONFIG.model, memory=MemoryConfig(9))), {"a": demos(), "b": demos()})


def test_a_memory_of_the_older_rule_is_not_played_by_the_newer(tmp_path):
    """Until 30 November 2026 the bank dropped other frames, and its checkpoints did not say which."""
    for rule, older in (("bank", None), ("bank", "longest way"), ("last", None)):
        folder = tmp_path / rule
        remembering(rule).save(folder)
        VLA.load(folder, load_backbone=load_toy)
        config = load_json(folder / "config.json")
        config.pop("memory_rule")
        save_json(folder / "config.json", config | ({} if older is None else {"memory_rule": older}))
        with pytest.raises(
            ValueError, match=f"{rule} has learnt with a memory that kept other frames.* train it again"
        ):
            VLA.load(folder, load_backbone=load_toy)
