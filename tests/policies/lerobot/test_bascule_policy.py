"""Real LeRobot around a real, small VLA: it trains, saves, resumes and loads, and nothing about the policy changes."""

import shutil
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from envs.demos.dataset_writer import WorldFacts, build_dataset, save_episode
from envs.demos.episode import run_episode
from tests.envs.demos import toy_demo_world as toy
from vla.core.checkpoint import load_checkpoint
from vla.core.types import Observation
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

SIZE = 84
POLICY = ("--policy.type=bascule", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.bridge_width=32")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Written by the recorder behind `vla demos`."""
    folder = tmp_path_factory.mktemp("demos")
    world, files = toy.ToyWorld(SIZE), []
    for seed in (0, 1, 2, 4):
        files.append(folder / f"{seed}.parquet")
        save_episode(files[-1], run_episode(world, seed, 0.1))
    facts = WorldFacts(20, toy.SPEC.names, world.proprio_names, toy.CAMERAS, SIZE)
    build_dataset(files, folder / "set", facts)
    return folder / "set"


def lerobot_train(*args):
    """The command `lerobot-train ARGS`, in this process: its imports alone take 10 s."""
    from lerobot.scripts import lerobot_train

    before = sys.argv
    sys.argv = ["lerobot-train", *args]
    try:
        lerobot_train.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    budget = ("--steps=4", "--batch_size=4", "--log_freq=1", "--save_freq=2", "--num_workers=0", "--env_eval_freq=0")
    lerobot_train(*POLICY, "--dataset.repo_id=local/toy", f"--dataset.root={dataset}", f"--output_dir={out}", *budget)
    return out


def pretrained(run, step=4):
    return run / "checkpoints" / f"{step:06d}" / "pretrained_model"


def observation(count=3, seed=0):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8) for camera in toy.CAMERAS}
    return Observation(images, rng.normal(size=(count, 4)).astype(np.float32), ["pick up object 1"] * count)


def batch_of(obs):
    """A frame as LeRobot's dataset and robot loops hand it over: pictures (3, H, W), float in 0..1."""
    images = {f"observation.images.{c}": torch.from_numpy(i).permute(0, 3, 1, 2) / 255 for c, i in obs.images.items()}
    return {**images, "observation.state": torch.from_numpy(obs.proprio), "task": obs.instruction}


def test_the_plugin_has_the_name_that_lerobot_looks_for():
    names = [distribution.metadata["Name"] for distribution in distributions()]
    assert "lerobot_policy_bascule" in names, "not installed: ./run setup"


def test_a_policy_that_lerobot_trained_loads_offline_and_acts_as_ours(run, tmp_path):
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from bascule.catalogue import is_lerobot
    from policies.lerobot.exchange import from_lerobot

    folder = pretrained(run)
    assert is_lerobot(folder) and {"config.json", "model.safetensors", "tokenizer"} <= {
        p.name for p in folder.iterdir()
    }
    theirs = get_policy_class("bascule").from_pretrained(folder)
    ours = VLAPolicy.load(from_lerobot(folder, tmp_path / "ours"))
    assert ours.spec.action_spec.names == toy.SPEC.names and ours.spec.action_spec.control_hz == 20
    obs = observation()
    expected = ours.act(obs)
    np.testing.assert_array_equal(theirs.predict_action_chunk(batch_of(obs)).numpy(), expected)

    # Through the saved pipelines, one action after another, looking again after three of them.
    pre, post = make_pre_post_processors(theirs.config, pretrained_path=str(folder))
    theirs.config.n_action_steps = 3
    later = observation(seed=1)
    played = [post(theirs.select_action(pre(batch_of(obs if step < 3 else later)))).numpy() for step in range(5)]
    np.testing.assert_array_equal(np.stack(played[:3], 1), expected[:, :3])
    np.testing.assert_array_equal(np.stack(played[3:], 1), ours.act(later)[:, :2])
    theirs.reset()
    np.testing.assert_array_equal(post(theirs.select_action(pre(batch_of(obs)))).numpy(), expected[:, 0])


LONG = (
    "take the small red block out of the left drawer and hand it over to the other arm which then puts it down here "
    "on the plate beside the bowl"
)


@pytest.fixture(scope="module")
def long_tasks(dataset, tmp_path_factory):
    """The same demonstrations; one of their tasks has more words than a fresh policy has room for."""
    root = tmp_path_factory.mktemp("long") / "set"
    shutil.copytree(dataset, root)
    path = root / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    column = next(name for name in ("task", "__index_level_0__") if name in table.column_names)
    texts = [LONG, *table.column(column).to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(texts)), path)
    return root


def test_a_task_longer_than_the_default_makes_room_as_vla_train_does(run, long_tasks, tmp_path, caplog):
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy

    from policies.lerobot.configuration_bascule import BasculeConfig
    from policies.lerobot.modeling_bascule import BasculePolicy
    from vla.data.lerobot_dataset import load_dataset
    from vla.training.multi_robot import build_vla
    from vla.training.recipes import smoke

    meta = LeRobotDatasetMetadata("local/toy", root=long_tasks)
    trained = PreTrainedConfig.from_pretrained(pretrained(run))
    trained.pretrained_path, trained.device = pretrained(run), "cpu"
    wanted = build_vla(smoke(), load_dataset(long_tasks)).processor.config.max_text_tokens
    assert wanted > 24
    for config in (BasculeConfig(device="cpu", push_to_hub=False, bridge_width=32), trained):
        policy = make_policy(config, ds_meta=meta)
        assert policy.vla.processor.config.max_text_tokens == wanted
        batch = {**batch_of(observation(count=2)), "action": torch.zeros(2, 8, 3), "task": [LONG, "pick up object 1"]}
        assert torch.isfinite(policy.forward(batch)[0])
        policy.save_pretrained(tmp_path / "saved")
        back = BasculePolicy.from_pretrained(tmp_path / "saved")
        assert torch.equal(back.predict_action_chunk(batch), policy.eval().predict_action_chunk(batch))

    meta.tasks.index = ["word " * 2500, *meta.tasks.index[1:]]
    policy = make_policy(BasculeConfig(device="cpu", push_to_hub=False), ds_meta=meta)
    limit = policy.vla.backbone.text_limit
    assert policy.vla.processor.config.max_text_tokens == limit == 432
    assert "the instruction 'word word" in caplog.text and "cut after 432 tokens" in caplog.text
    meta.tasks.index = ["red/blue", "red blue", *meta.tasks.index[2:]]
    make_policy(BasculeConfig(device="cpu", push_to_hub=False), ds_meta=meta)
    assert "'red blue' and 'red/blue' apart" in caplog.text


def test_training_learnt_and_resuming_is_exact(run, tmp_path):
    start, end = (load_weights(pretrained(run, step)) for step in (2, 4))
    moved = {name.split(".")[1] for name in end if not torch.equal(start[name], end[name])}
    assert moved == {"bridge", "head"}, "a frozen backbone stays as it is"
    config = pretrained(run, 2) / "train_config.json"
    lerobot_train(f"--config_path={config}", "--resume=true", f"--output_dir={tmp_path / 'again'}")
    again = load_weights(pretrained(tmp_path / "again"))
    assert all(torch.equal(again[name], end[name]) for name in end)


def load_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_our_checkpoint_goes_to_lerobot_and_back_unchanged(run, tmp_path):
    from bascule.catalogue import is_lerobot
    from policies.lerobot.exchange import from_lerobot, to_lerobot
    from policies.lerobot.modeling_bascule import BasculePolicy

    ours = from_lerobot(pretrained(run), tmp_path / "ours")
    assert not is_lerobot(ours)
    policy = BasculePolicy.from_pretrained(to_lerobot(ours, tmp_path / "theirs"))
    obs = observation()
    np.testing.assert_array_equal(policy.predict_action_chunk(batch_of(obs)).numpy(), VLAPolicy.load(ours).act(obs))
    assert policy.config.n_action_steps == 8
    back = load_checkpoint(from_lerobot(tmp_path / "theirs", tmp_path / "back"))
    before = load_checkpoint(ours)
    assert back.config == before.config and back.stats == before.stats
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in before.tensors.items())
    fewer = VLA.load(ours)
    fewer.config = replace(fewer.config, n_action_steps=3, backbone_dtype="bfloat16")
    fewer.save(tmp_path / "fewer")
    policy = BasculePolicy.from_pretrained(to_lerobot(tmp_path / "fewer", tmp_path / "theirs-3"))
    assert policy.config.n_action_steps == 3, "as it is played by ours"
    played = VLAPolicy.load(tmp_path / "fewer").act(obs)  # in the precision that ours acts in, too
    np.testing.assert_array_equal(policy.predict_action_chunk(batch_of(obs)).numpy(), played)
    assert VLAPolicy.load(from_lerobot(tmp_path / "theirs-3", tmp_path / "back-3")).spec.n_action_steps == 3


def test_the_loss_is_the_models_and_padding_does_not_count(run):
    from policies.lerobot.modeling_bascule import BasculePolicy

    policy = BasculePolicy.from_pretrained(pretrained(run))
    obs = observation()
    action = torch.from_numpy(np.random.default_rng(5).uniform(-0.4, 0.4, (3, 8, 3)).astype(np.float32))
    pad = torch.zeros(3, 8, dtype=torch.bool)
    pad[:, 5:] = True
    batch = {**batch_of(obs), "action": action, "action_is_pad": pad}
    loss, logs = policy.forward(batch)
    inp = policy.vla.processor.prepare(obs)
    target = policy.vla.processor.normalise_action(action)
    expected, _ = policy.vla.loss(policy.vla.encode(inp), inp.proprio_BP, target, (~pad).float())
    assert loss.item() == expected.item() == logs["loss"]
    wild = torch.where(pad[..., None], 1e3, action)
    assert policy.forward({**batch, "action": wild})[0].item() == loss.item()
    each, _ = policy.forward(batch, reduction="none")
    assert each.shape == (3,) and each.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_real_time_chunking_begins_where_the_old_chunk_is(run):
    from policies.lerobot.modeling_bascule import BasculePolicy

    policy = BasculePolicy.from_pretrained(pretrained(run))
    batch = batch_of(observation(count=1))
    fresh = policy.predict_action_chunk(batch)[0]
    old = torch.zeros(10, 3)
    old[:5] = torch.tensor([0.3, -0.3, 1.0])  # five actions left, filled up with zeros by LeRobot
    joined = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=old)[0]
    assert policy.supports_rtc() and torch.equal(joined[:2], old[:2]) and torch.equal(joined[5:], fresh[5:])
    for step, remains in ((2, 0.75), (3, 0.5), (4, 0.25)):
        weight = remains * np.expm1(remains) / np.expm1(1)
        torch.testing.assert_close(joined[step], weight * old[0] + (1 - weight) * fresh[step])
    first = policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=None)[0]
    assert torch.equal(first, fresh)
    late = policy.predict_action_chunk(batch, inference_delay=20, prev_chunk_left_over=old)[0]
    assert torch.equal(late[:5], old[:5]) and torch.equal(late[5:], fresh[5:])


def test_what_is_missing_is_named(run, tmp_path):
    from policies.lerobot.configuration_bascule import BasculeConfig
    from policies.lerobot.modeling_bascule import BasculePolicy

    policy = BasculePolicy.from_pretrained(pretrained(run))
    for key in ("observation.images.wrist", "observation.state", "task"):
        batch = batch_of(observation())
        del batch[key]
        with pytest.raises(ValueError, match=key):
            policy.predict_action_chunk(batch)
    with pytest.raises(ValueError, match="n_action_steps must be in 1..4"):
        BasculeConfig(device="cpu", chunk_size=4, n_action_steps=5)
    with pytest.raises(ValueError, match="no folder 'tokenizer'"):
        BasculePolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a dataset"):
        BasculePolicy(replace(policy.config, parts=None))


def test_statistics_are_those_of_the_frames_and_switches_keep_their_values(dataset, run):
    from vla.data.lerobot_dataset import load_dataset

    config = pretrained(run)
    from policies.lerobot.modeling_bascule import BasculePolicy, _vector_stats

    stats = BasculePolicy.from_pretrained(config).vla.processor.stats
    expected = load_dataset(Path(dataset)).stats()
    assert stats.frames == expected.frames
    np.testing.assert_allclose(stats.action.mean, expected.action.mean, atol=1e-5)
    np.testing.assert_allclose(stats.proprio.q99, expected.proprio.q99, atol=1e-4)
    values = {"q01": [1.0], "q99": [1.0], "min": [-1.0], "max": [1.0], "mean": [0.998], "std": [(1 - 0.998**2) ** 0.5]}
    assert _vector_stats(values).q01 == (-1.0,)
    with pytest.raises(ValueError, match="lack q01"):
        _vector_stats({name: value for name, value in values.items() if name != "q01"})


def test_a_rare_component_is_scaled_by_its_extremes_as_in_vla_train():
    from policies.lerobot.modeling_bascule import _vector_stats

    values = {"q01": [-2e-5, -1.0], "q99": [3e-5, 1.0], "min": [-4e-5, -4.0], "max": [1.0, 4.0]}
    stats = _vector_stats(values | {"mean": [0.007, 0.0], "std": [0.08, 1.0]})
    assert (stats.q01, stats.q99) == ((-4e-5, -1.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("names", "kept", "found"),
    [
        ({"delta_x": 0, "gripper": 1}, ["delta_x", "gripper"], ["delta_x", "gripper"]),
        ({"gripper": 1, "delta_x": 0}, ["gripper", "delta_x"], ["delta_x", "gripper"]),
        ({"motors": ["waist", "gripper"]}, ["motors"], ["waist", "gripper"]),
        (None, None, ["a0", "a1"]),
    ],
)
def test_nested_names_of_a_dataset_are_its_components(names, kept, found):
    """`kept` is the list that LeRobot's factory makes of them."""
    from types import SimpleNamespace

    from policies.lerobot.modeling_bascule import _action_names

    meta = SimpleNamespace(features={"action": {"names": names, "shape": (2,)}})
    assert _action_names(SimpleNamespace(action_feature_names=kept), meta, 2) == found


def test_pictures_are_converted_exactly_or_refused_by_their_key():
    from policies.lerobot.modeling_bascule import _pixels

    every = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    wanted = every.permute(0, 2, 3, 1).numpy()
    for given in (every, every / 255, (every / 255).half()):
        np.testing.assert_array_equal(_pixels(given, "observation.images.front"), wanted)
    for given, said in ((every.float(), "floats must be in 0..1"), (every.int() + 300, "from 300 to 555")):
        with pytest.raises(ValueError, match=rf"camera 'observation\.images\.front'.*{said}"):
            _pixels(given, "observation.images.front")


def test_a_dataset_in_another_order_is_refused(run, dataset):
    """LeRobot hands its components over by their places: the gripper would be learnt as dx."""
    from types import SimpleNamespace

    from policies.lerobot.modeling_bascule import BasculePolicy

    names = {"action": list(toy.SPEC.names), "observation.state": list(toy.ToyWorld(SIZE).proprio_names)}

    def meta(**changed):
        features = {key: {"shape": (len(value),), "names": value} for key, value in (names | changed).items()}
        return SimpleNamespace(features=features, fps=20, tasks=None)

    assert BasculePolicy.from_pretrained(pretrained(run), dataset_meta=meta())
    for key in names:
        with pytest.raises(ValueError, match="`vla train --init` takes it by name"):
            BasculePolicy.from_pretrained(pretrained(run), dataset_meta=meta(**{key: names[key][::-1]}))
