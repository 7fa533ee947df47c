"""Policies that LeRobot trained, as ours: the same actions as LeRobot's own loop, and refusals in one line."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from envs.demos.dataset_writer import WorldFacts, build_dataset, save_episode
from envs.demos.episode import run_episode
from policies.load import checkpoint, load_policy, of_single_observations
from tests.envs.demos import toy_demo_world as toy
from vla.core.checkpoint import weights_digest
from vla.core.types import Observation

SIZE = 32
ACT = ("chunk_size=4", "n_action_steps=2", "dim_model=32", "dim_feedforward=32", "n_heads=2", "latent_dim=4")
DIFFUSION = (
    "n_obs_steps=2", "drop_n_last_frames=0", "horizon=8", "n_action_steps=3", "down_dims=[8,16]", "n_groups=4",
    "num_inference_steps=2", "noise_scheduler_type=DDIM", "use_group_norm=true", "diffusion_step_embed_dim=8",
    "use_separate_rgb_encoder_per_camera=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Written by the recorder behind `vla demos`."""
    folder = tmp_path_factory.mktemp("demos")
    os.environ.setdefault("HF_HOME", str(folder / "hf"))
    world, files = toy.ToyWorld(SIZE), []
    for seed in (0, 1, 2):
        files.append(folder / f"{seed}.parquet")
        save_episode(files[-1], run_episode(world, seed, 0.1))
    build_dataset(files, folder / "set", WorldFacts(20, toy.SPEC.names, world.proprio_names, toy.CAMERAS, SIZE))
    return folder / "set"


def trained(kind, flags, dataset, out, monkeypatch):
    """(folder of the policy after two steps of LeRobot's trainer, started as the experiment does; its times)."""
    from policies.lerobot.train import main

    args = [f"--policy.{flag}" for flag in (*flags, "device=cpu", "push_to_hub=false")]
    if kind in ("act", "diffusion"):
        args.append("--policy.pretrained_backbone_weights=null")
    monkeypatch.setattr(sys, "argv", [
        "train", f"--times={out}.json", f"--policy.type={kind}", *args, "--dataset.repo_id=local/toy",
        f"--dataset.root={dataset}", f"--output_dir={out}", "--steps=2", "--batch_size=2", "--num_workers=0",
        "--log_freq=1", "--env_eval_freq=0", "--save_freq=0",
    ])  # fmt: skip
    main()
    return out / "checkpoints" / "last" / "pretrained_model", json.loads((out.parent / f"{out.name}.json").read_text())


@pytest.fixture(scope="module")
def act(dataset, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return trained("act", ACT, dataset, tmp_path_factory.mktemp("act") / "run", patch)


@pytest.fixture(scope="module")
def diffusion(dataset, tmp_path_factory):
    pytest.importorskip("diffusers", reason="the extra 'peers' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        return trained("diffusion", DIFFUSION, dataset, tmp_path_factory.mktemp("diffusion") / "run", patch)[0]


def observation(count=3, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for camera in toy.CAMERAS}
    return Observation(images, rng.normal(size=(count, 4)).astype(np.float32), ["pick up object 1"] * count)


def theirs(folder):
    """LeRobot's policy and pipelines, as `lerobot-eval` loads them."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config).eval()
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def their_action(parts, obs):
    policy, pre, post = parts
    images = {f"observation.images.{c}": torch.from_numpy(i).permute(0, 3, 1, 2) / 255 for c, i in obs.images.items()}
    batch = {**images, "observation.state": torch.from_numpy(obs.proprio), "task": obs.instruction}
    return post(policy.select_action(pre(batch))).numpy()


def test_act_answers_with_the_chunk_that_lerobot_plays(act, dataset):
    folder, times = act
    ours, parts = load_policy(checkpoint(folder)), theirs(folder)
    spec = ours.spec
    assert (spec.chunk_size, spec.n_action_steps, spec.observations) == (4, 2, 1)
    assert (spec.cameras, spec.picture_size, spec.proprio_dim) == (toy.CAMERAS, SIZE, 4)
    # names and rate are the dataset's, bounds the extremes of its actions
    assert spec.action_spec.names == toy.SPEC.names and spec.proprio_names == ("a", "b", "c", "d")
    stats = json.loads((dataset / "meta" / "stats.json").read_text())["action"]
    np.testing.assert_allclose([spec.action_spec.low, spec.action_spec.high], [stats["min"], stats["max"]], atol=1e-6)
    assert spec.action_spec.control_hz == 20
    first, later = observation(seed=1), observation(seed=2)
    played = np.stack([their_action(parts, first if step < 2 else later) for step in range(4)], 1)
    np.testing.assert_allclose(ours.act(first)[:, :2], played[:, :2], atol=1e-6)
    np.testing.assert_allclose(ours.act(later)[:, :2], played[:, 2:], atol=1e-6)
    assert np.ptp(played[:, :2] - played[:, 2:]) > 1e-3, "the pictures change nothing: this compares nothing"
    assert 0 < times["seconds_after_first"] < times["seconds"] and times["cpu_seconds"] > 0


def test_pictures_of_another_size_are_made_smaller_or_refused(act):
    policy = load_policy(act[0])
    assert policy.act(observation(size=2 * SIZE)).shape == (3, 4, 3)
    wide = observation()
    wide.images["wrist"] = np.zeros((3, SIZE, 2 * SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="trained on pictures of 32x32 pixels from 'wrist', it is shown 64x32"):
        policy.act(wide)


def test_diffusion_remembers_each_environments_last_two_observations(diffusion):
    """Played beside LeRobot's own loop; then one environment begins anew, and acts as if it had been alone."""
    ours, parts = load_policy(diffusion), theirs(diffusion)
    assert (ours.spec.observations, ours.spec.chunk_size, ours.n_action_steps) == (2, 1, 3)
    ours.reset()
    for step in range(5):
        if step % 3 == 0:
            torch.manual_seed(step // 3)  # what LeRobot draws from, ours draws by itself
        obs = observation(count=2, seed=step)
        np.testing.assert_allclose(ours.act(obs)[:, 0], their_action(parts, obs), atol=1e-5)
    # Environment 1 alone begins again: it has no memory of before, and its plan ends at another time than that of 0.
    torch.manual_seed(0)
    ours.reset([1])
    ours._decisions, alone = 0, load_policy(diffusion)
    alone.reset()
    for step in (10, 11):
        obs = observation(count=2, seed=step)
        both, one = ours.act(obs), alone.act(obs.select([1]))
        if step == 10:  # only environment 1 asked, with the same draws as the one alone
            np.testing.assert_allclose(both[1], one[0], atol=1e-5)
    np.testing.assert_allclose(both[1], one[0], atol=1e-5)
    with pytest.raises(ValueError, match="observations of 2 consecutive control steps, and frames come one by one"):
        of_single_observations(ours, "frames")


def test_the_same_evaluation_draws_the_same_numbers_and_none_of_the_callers(diffusion):
    policy, obs = load_policy(diffusion), observation()
    torch.manual_seed(7)
    policy.reset()
    first = policy.act(obs)
    after = torch.rand(1)
    policy.reset()
    np.testing.assert_array_equal(policy.act(obs), first)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))


def edited(folder, tmp_path, **changes):
    out = tmp_path / "edited"
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


def test_what_cannot_be_played_is_refused_in_one_line(act, tmp_path):
    folder = edited(act[0], tmp_path, temporal_ensemble_coeff=0.01, n_action_steps=1)

    def refusal(path):
        with pytest.raises(ValueError) as problem:
            load_policy(checkpoint(path))
        assert "\n" not in str(problem.value)
        return str(problem.value)

    assert "temporal_ensemble_coeff" in refusal(folder)
    config = json.loads((folder / "config.json").read_text()) | {"temporal_ensemble_coeff": None}
    more = {"observation.environment_state": {"type": "ENV", "shape": [7]}}
    (folder / "config.json").write_text(json.dumps(config | {"input_features": config["input_features"] | more}))
    assert "reads 'observation.environment_state'" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config | {"type": "warp"}))
    assert "type 'warp', which the installed LeRobot does not know" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapters" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "policy_preprocessor.json").unlink()
    assert "migrate_policy_normalization" in refusal(folder)
    run = act[0].parents[2]
    assert refusal(run) == f"{run} is the folder of a run of LeRobot: its policy is {act[0]}"
    from vla.model.model import VLA

    with pytest.raises(ValueError, match="a policy in LeRobot's format .act., which only `vla eval`"):
        VLA.load(act[0])


def test_other_weights_are_told_apart(act, tmp_path):
    folder = edited(act[0], tmp_path)
    before = weights_digest(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights_digest(folder) != before


def test_batches_are_read_as_lerobot_reads_them(dataset, monkeypatch):
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.dataset_reader import DatasetReader

    from policies.lerobot import train

    monkeypatch.setattr(DatasetReader, "_query_hf_dataset", train._query)
    times = {"action": [0, 0.05, 0.1], "observation.state": [-0.05, 0], "observation.images.front": [-0.05, 0]}
    for episodes in (None, [2, 0]):
        made = [LeRobotDataset("local/toy", root=dataset, delta_timestamps=times, episodes=episodes) for _ in "ab"]
        stock = [made[0][i] for i in range(len(made[0]))]
        train.read_numbers_by_column()
        for want, have in zip(stock, (made[1][i] for i in range(len(made[1]))), strict=True):
            assert want.keys() == have.keys()
            for key, value in want.items():
                same = torch.equal(value, have[key]) if torch.is_tensor(value) else value == have[key]
                assert same, key
        monkeypatch.setattr(DatasetReader, "_query_hf_dataset", train._query)
