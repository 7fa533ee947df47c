"""`vla experiment peers`: arms within budgets, kept as they go; what is told of them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bascule.experiments.peers import experiment, lerobot_peers, smolvla
from bascule.experiments.peers.budget import Budget, Learnt, steps_within
from bascule.experiments.peers.experiment import PeersConfig
from bascule.experiments.registry import EXPERIMENTS
from vla.core.types import PolicySpec

SMALL = PeersConfig(
    arms=("ours", "act", "blind"),
    seeds=(0,),
    demos=1,
    steps=2,
    seconds=1,
    batch_size=2,
    episodes=2,
    num_envs=2,
    workers=1,
)


class Still:
    spec = PolicySpec(chunk_size=8, n_action_steps=4, cameras=("front",), picture_size=32)

    def reset(self, env_ids=None): ...

    def act(self, obs, *, prefix=None):
        return np.zeros((obs.batch_size, 8, 4), np.float32)


def test_arms_run_once_in_every_budget_and_are_kept(tmp_path, monkeypatch):
    asked = []

    def learn(peer, dataset, folder, budget, *, batch_size, seed):
        assert (dataset / "meta" / "info.json").is_file()
        asked.append((peer.kind, budget.label, batch_size, folder.name))
        return Learnt(Still(), 5, 1.5, 2.5, 100, 90, batch_size, 8, 4, folder)

    monkeypatch.setattr(experiment, "learn", learn)
    monkeypatch.setattr(experiment, "check_installed", lambda: None)
    make, perform = EXPERIMENTS["peers"].config, EXPERIMENTS["peers"].perform
    assert make is PeersConfig
    result = perform(SMALL, tmp_path)
    assert list(result["arms"]) == ["ours-1s", "ours-2steps", "act-1s", "act-2steps", "blind"]
    assert asked == [("act", "1s", 2, "act-1s-0"), ("act", "2steps", 2, "act-2steps-0")]
    assert all(arm["episodes"] == 2 for arm in result["arms"].values())
    ours, act = result["arms"]["ours-2steps"], result["arms"]["act-1s"]
    assert ours["steps"] == 2 and 0 < ours["trained_parameters"] < ours["parameters"]
    assert (act["steps"], act["train_seconds"], act["parameters"], act["trained_parameters"]) == (5, 1.5, 100, 90)
    told = result["protocol"]
    assert told["demonstrations"] == 1 and told["horizon"] == 56 and told["versions"]["lerobot"] == "0.6.1"
    assert told["lerobot_flags"]["act"][0] == "act" and told["lerobot_visual_weights"]["act"] in ("random", "ImageNet")
    row = json.loads((tmp_path / "ours-2steps-0.json").read_text())
    assert row["batch_size"] == 2 and row["picture_size"] == 96 and row["n_action_steps"] == 4
    assert len(row["outcomes"]) == 2 and row["evaluation_seeds"][0] >= 5_000_000
    perform(SMALL, tmp_path)
    assert len(asked) == 2, "finished arms are not trained again"
    with pytest.raises(ValueError, match="choose another --out"):
        perform(replace(SMALL, batch_size=3), tmp_path)


def test_rl_has_the_seconds_only_and_what_imitation_leaves_of_them():
    budgets = [Budget("seconds", 60), Budget("steps", 9)]
    assert [name for name, _ in experiment._runs(SMALL, "ours-rl", budgets)] == ["ours-rl-60s"]
    assert steps_within(60, 10, 0.5) == 100 and steps_within(5, 10, 0.5) == 1


def test_unknown_names_and_missing_packages_are_told(tmp_path, monkeypatch):
    for changes, told in ({"arms": ("atc",)}, "act"), ({"conditions": ("minutes",)}, "seconds"), ({"recipe": "x"}, "x"):
        with pytest.raises(ValueError, match=told):
            experiment.peers(replace(SMALL, **changes), tmp_path)
    monkeypatch.setattr(lerobot_peers.importlib.util, "find_spec", lambda name: None if name == "diffusers" else 1)
    with pytest.raises(ValueError, match="needs diffusers: ./run setup peers"):
        experiment.peers(SMALL, tmp_path)


def test_seconds_become_steps_by_a_short_run(tmp_path, monkeypatch):
    ran = []

    def run(args, log, out):
        flags = dict(arg.removeprefix("--").split("=", 1) for arg in args if arg.startswith("--"))
        steps = int(flags["steps"])
        ran.append((steps, flags["save_checkpoint"], flags["policy.type"], flags["batch_size"], flags["seed"]))
        if flags["save_checkpoint"] == "true":
            (lerobot_peers.Path(flags["output_dir"]) / "checkpoints" / "last" / "training_state").mkdir(parents=True)
        seconds = {"seconds": 99.0, "cpu_seconds": 0.5 * steps + 2, "cpu_seconds_after_first": 0.5 * (steps - 1)}
        lerobot_peers.Path(flags["times"]).write_text(json.dumps(seconds))

    policy = SimpleNamespace(policy=SimpleNamespace(parameters=lambda: []), n_action_steps=4)
    policy.config = SimpleNamespace(chunk_size=16)
    monkeypatch.setattr(lerobot_peers, "_run", run)
    monkeypatch.setattr(lerobot_peers, "on_gpu", lambda: False)
    monkeypatch.setattr("policies.load.load_policy", lambda folder: policy)
    peer = lerobot_peers.PEERS["act"]
    took = lerobot_peers.learn(peer, tmp_path, tmp_path / "run", Budget("seconds", 30), batch_size=8, seed=3)
    assert ran == [(8, "false", "act", "8", "3"), (60, "true", "act", "8", "3")]
    assert (took.steps, took.seconds, took.wall_seconds) == (60, 32.0, 99.0)
    assert not (tmp_path / "run-calibration").exists() and not (tmp_path / "run.times.json").exists()
    lerobot_peers.learn(peer, tmp_path, tmp_path / "run", Budget("steps", 5), batch_size=8, seed=3)
    assert ran[2:] == [(5, "true", "act", "8", "3")]


def test_a_failure_of_lerobot_is_told_with_its_last_line(tmp_path):
    args = [lerobot_peers.sys.executable, "-c", "import sys; print('one'); sys.exit('no such dataset')"]
    with pytest.raises(RuntimeError, match=r"see .*run.log: no such dataset$"):
        lerobot_peers._run(args, tmp_path / "run.log", tmp_path)


@pytest.mark.parametrize("arm", lerobot_peers.PEERS)
def test_lerobot_takes_the_flags_of_every_peer(arm, tmp_path):
    """Parsed by LeRobot's own parser."""
    if lerobot_peers.PEERS[arm].kind == "smolvla":
        pytest.importorskip("num2words", reason="./run setup peers")
    import draccus
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.policies.act.configuration_act import ACTConfig  # noqa: F401 (registers the type)
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig  # noqa: F401
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig  # noqa: F401

    peer = lerobot_peers.PEERS[arm]
    args = lerobot_peers.command(peer, tmp_path, tmp_path / "run", 100, batch_size=4, seed=1)
    config = draccus.parse(TrainPipelineConfig, args=args)
    assert (config.policy.type, config.steps, config.seed, config.save_freq) == (peer.kind, 100, 1, 0)
    assert config.policy.n_action_steps == 4 and not config.policy.push_to_hub


def test_smolvla_with_random_weights_is_lerobots_and_plays_offline(tmp_path):
    """Saved as LeRobot saves it, with another decision for other words; and refused in one line when what it names is
    gone."""
    pytest.importorskip("num2words", reason="./run setup peers")
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    from policies.load import load_policy
    from vla.core.types import Observation

    vlm = smolvla.write_random_vlm(tmp_path / "vlm", "small")
    config = SmolVLAConfig(
        device="cpu", push_to_hub=False, vlm_model_name=str(vlm), num_vlm_layers=2, chunk_size=6, n_action_steps=3,
        resize_imgs_with_padding=(96, 96), num_steps=2,
        input_features={
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
    )  # fmt: skip
    policy, folder = get_policy_class("smolvla")(config), tmp_path / "policy"
    stats = {
        name: {"mean": torch.full((dim,), 0.5), "std": torch.full((dim,), 2.0)}
        for name, dim in (("observation.state", 8), ("action", 4))
    }
    policy.save_pretrained(folder)
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    rng = np.random.default_rng(0)
    pictures = {"front": rng.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)}
    state = rng.normal(size=(2, 8)).astype(np.float32)
    ours = load_policy(folder)
    assert (ours.spec.chunk_size, ours.spec.n_action_steps, ours.spec.observations) == (6, 3, 1)
    chunk = ours.act(Observation(pictures, state, ["pick up the red cube"] * 2))
    torch.manual_seed(0)
    batch = {
        "observation.images.front": torch.from_numpy(pictures["front"]).permute(0, 3, 1, 2) / 255,
        "observation.state": torch.from_numpy(state),
        "task": ["pick up the red cube"] * 2,
    }
    theirs = [post(policy.eval().select_action(pre(batch))).numpy() for _ in range(3)]
    np.testing.assert_allclose(chunk[:, :3], np.stack(theirs, 1), atol=1e-4)
    ours.reset()
    other = ours.act(Observation(pictures, state, ["push the button", "pick up the red cube"]))
    assert np.abs(other - chunk)[0].max() > 10 * np.abs(other - chunk)[1].max()
    vlm.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="is not all that its policy needs") as problem:
        load_policy(folder)
    assert "\n" not in str(problem.value)
