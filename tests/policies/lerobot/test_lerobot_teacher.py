"""Policies that LeRobot itself trained, as teachers: ACT by its decoder's output, others by their actions."""

import json
import shutil

import numpy as np
import pytest
import torch

from bascule.main import main
from bascule.teachers import load_teacher
from policies.lerobot.teacher import LeRobotTeacher
from tests.policies.lerobot.test_bascule_policy import dataset, lerobot_train, pretrained  # noqa: F401 (a fixture)
from vla.data.lerobot_dataset import load_dataset
from vla.model.model import VLA
from vla.training.distillation.student import teacher_latents

ACT = (
    "--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.chunk_size=4",
    "--policy.n_action_steps=4", "--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=32",
    "--policy.n_encoder_layers=1", "--policy.n_vae_encoder_layers=1", "--policy.latent_dim=4",
    "--policy.pretrained_backbone_weights=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def act(dataset, tmp_path_factory):  # noqa: F811
    """The `pretrained_model` folder of four steps of `lerobot-train --policy.type=act`."""
    out = tmp_path_factory.mktemp("act") / "out"
    budget = ("--steps=4", "--batch_size=4", "--log_freq=1", "--save_freq=4", "--num_workers=0", "--env_eval_freq=0")
    lerobot_train(*ACT, "--dataset.repo_id=local/toy", f"--dataset.root={dataset}", f"--output_dir={out}", *budget)
    return pretrained(out)


def own_actions(folder, demos):
    """The actions that LeRobot's own pipeline makes of these frames, spelled out."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config).eval()
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    batch = {f"observation.images.{c}": torch.from_numpy(i).permute(0, 3, 1, 2) / 255 for c, i in demos.images.items()}
    batch |= {"observation.state": torch.from_numpy(demos.proprio), "task": list(demos.instruction)}
    with torch.no_grad():
        return after(policy.predict_action_chunk(before(batch))).numpy()


def decoded(teacher, latents):
    linear = torch.nn.functional.linear(latents, teacher.decoder.tensors["weight"], teacher.decoder.tensors["bias"])
    return linear.double().numpy() * teacher.decoder.half + teacher.decoder.centre


def test_the_latent_of_act_is_what_its_action_head_reads(act, dataset):  # noqa: F811
    demos, teacher = load_dataset(dataset), load_teacher(act)
    assert isinstance(teacher, LeRobotTeacher) and teacher.chunk_size == 4
    assert teacher.decoder.reads == "step" and teacher.decoder.width == 32
    latents = teacher_latents(teacher, demos, batch_size=7)
    assert latents.shape == (demos.num_frames, 4, 32) and latents.flatten(0, 1).std(0).max() > 1e-3
    np.testing.assert_allclose(decoded(teacher, latents), own_actions(act, demos), rtol=1e-4, atol=1e-5)


def test_a_policy_without_such_a_layer_teaches_its_actions(act, dataset, monkeypatch):  # noqa: F811
    from lerobot.policies.act.modeling_act import ACTPolicy

    plain = ACTPolicy.predict_action_chunk
    monkeypatch.setattr(ACTPolicy, "predict_action_chunk", lambda self, batch: torch.tanh(plain(self, batch)))
    teacher, demos = LeRobotTeacher(act), load_dataset(dataset)
    assert teacher.decoder.width == 3
    latents = teacher_latents(teacher, demos)
    np.testing.assert_allclose(decoded(teacher, latents), own_actions(act, demos), rtol=1e-4, atol=1e-5)


def test_vla_train_learns_from_act_and_needs_it_no_more(act, dataset, tmp_path, capsys):  # noqa: F811
    folder, out = shutil.copytree(act, tmp_path / "act"), tmp_path / "student"
    arguments = ["train", "--dataset", str(dataset), "--recipe", "smoke", "--steps", "8", "--teacher", str(folder)]
    assert main([*arguments, "--out", str(out)]) == 2
    assert "give --chunk-size 4" in capsys.readouterr().err
    arguments += ["--chunk-size", "4"]
    assert main([*arguments, "--align-steps", "3", "--out", str(out)]) == 0
    told = json.loads((out / "train.json").read_text())
    assert told["distillation"] == {"teacher": str(folder), "align_steps": 3}
    shutil.rmtree(folder)
    vla = VLA.load(out)
    assert vla.config.distilled.width == 32 and vla.head.decoder.weight.shape == (3, 32)
    demos = load_dataset(dataset)
    actions = vla.predict(vla.processor.prepare(demos.observation(slice(0, 2))))
    assert actions.shape == (2, 4, 3) and np.isfinite(actions).all()


def test_demonstrations_that_it_cannot_read_are_refused(act, dataset):  # noqa: F811
    from dataclasses import replace

    teacher, demos = LeRobotTeacher(act), load_dataset(dataset)
    first = next(iter(demos.images))
    with pytest.raises(ValueError, match="a state of 4 components, the demonstrations' has 3"):
        teacher.latents(replace(demos, proprio=demos.proprio[:, :3]), slice(0, 2))
    small = {camera: images[:, ::2, ::2] for camera, images in demos.images.items()}
    with pytest.raises(ValueError, match="pictures of 84x84 .*, these are 42x42"):
        teacher.latents(replace(demos, images=small), slice(0, 2))
    with pytest.raises(ValueError, match=f"reads camera '{first}'"):
        teacher.latents(replace(demos, images={"other": demos.images[first]}), slice(0, 2))


def test_the_state_is_brought_into_the_teachers_order_by_name(act, dataset, tmp_path, capsys):  # noqa: F811
    from dataclasses import replace

    teacher, demos = LeRobotTeacher(act), load_dataset(dataset)
    order = [2, 0, 3, 1]
    names = tuple(demos.proprio_names[i] for i in order)
    other = replace(demos, proprio=demos.proprio[:, order], proprio_names=names)
    unnamed = replace(demos, proprio=other.proprio)
    right, wrong = teacher.latents(demos, slice(0, 4)), teacher.latents(unnamed, slice(0, 4))
    assert (right - wrong).abs().max() > 1e-3
    torch.testing.assert_close(teacher.latents(other, slice(0, 4)), right)
    assert "reordered by name" in capsys.readouterr().err
    assert teacher.action_names == demos.action_names
    with pytest.raises(ValueError, match="the teacher does not fit: .* other components"):
        teacher.latents(replace(demos, proprio_names=tuple("wxyz")), slice(0, 4))
    with pytest.raises(ValueError, match="the teacher does not fit: .* Hz"):
        teacher.latents(replace(demos, fps=2 * demos.fps), slice(0, 4))
    run = json.loads((act / "train_config.json").read_text())
    run["dataset"]["root"] = str(tmp_path / "gone")
    folder = shutil.copytree(act, tmp_path / "moved")
    (folder / "train_config.json").write_text(json.dumps(run))
    LeRobotTeacher(folder).latents(other, slice(0, 4))
    assert f"taken for {', '.join(names)}, in this order" in " ".join(capsys.readouterr().err.split())


def test_a_policy_that_reads_several_frames_is_refused(act, tmp_path):
    folder = shutil.copytree(act, tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    config["type"] = "diffusion"
    for name in list(config):
        if name not in ("type", "input_features", "output_features", "device"):
            del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reads 2 frames at once"):
        load_teacher(folder)
