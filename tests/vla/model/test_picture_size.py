"""Simulated pictures are as sharp as those a policy was trained on; checkpoints that do not say so get 84 pixels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import envs
from bascule import main as cli
from envs.sim.render_options import pictures_for
from policies.load import picture_size
from policies.serving.policy_slot import PolicySlot
from tests.vla.small_policy import small_policy
from tests.vla.toy_backbone import CAMERAS, SPEC, load_toy, toy_backbone, toy_stats
from tests.vla.training.test_train import CONFIG, demos
from vla.core.compatibility import side_of
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.training.recipes import RECIPES
from vla.training.train import build_vla, train
from vla.training.train_config import TrainConfig


def built(image_size=None, picture_size=None, reads=96):
    backbone = toy_backbone()
    backbone.image_size = reads
    return VLA.build(
        VLAConfig(backbone="toy", bridge=BridgeConfig(width=32), chunk_size=4), stats=toy_stats(), action_spec=SPEC,
        cameras=CAMERAS, image_size=image_size, picture_size=picture_size, backbone=backbone,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "drawn"), [({}, 96), ({"picture_size": 84}, 84), ({"picture_size": 480}, 96), ({"image_size": 64}, 64)]
)
def test_as_the_backbone_reads_but_no_sharper_than_in_training(given, drawn):
    vla = built(**given)
    assert pictures_for(VLAPolicy(vla)) == side_of(vla).picture_size == drawn
    assert PolicySlot(VLAPolicy(vla)).metadata["picture_size"] == drawn


def test_every_recipe_leaves_the_size_to_the_backbone():
    assert TrainConfig().image_size is None and all(make().image_size is None for make in RECIPES.values())


def test_training_pictures_decide_and_an_old_run_resumes(tmp_path):
    """A run that was begun when recipes named the size goes on where they leave it to the backbone."""
    backbone = toy_backbone()
    backbone.image_size = 24
    free = replace(CONFIG, image_size=None, steps=4)
    vla = build_vla(free, demos(), backbone=backbone, action_spec=SPEC)
    assert (vla.processor.config.image_size, vla.processor.config.picture_size) == (24, 16)
    train(replace(free, image_size=24), vla, demos(), tmp_path, resume=False)
    assert train(replace(free, steps=4), vla, demos(), tmp_path, resume=True).step == 4
    with pytest.raises(ValueError, match="image_size=24, not 32"):
        train(replace(free, image_size=32), vla, demos(), tmp_path, resume=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A policy on a backbone `small` that reads 64 pixels, in a folder."""
    return small_policy(tmp_path / "policy")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "POLICY"),
        ("rl", "smoke", "--init", "POLICY", "--out", "OUT"),
        ("view", "tabletop-pick", "--policy", "POLICY", "--animation", "OUT/film.webp"),
    ],
)
def test_commands_draw_them_as_the_policy_reads_them(checkpoint, tmp_path, capsys, monkeypatch, words):
    asked = []

    def make_vec(suite, num_envs, **options):
        asked.append(options["image_size"])
        raise ValueError("far enough")

    monkeypatch.setattr(envs, "make_vec", make_vec)
    words = [word.replace("POLICY", str(checkpoint)).replace("OUT", str(tmp_path)) for word in words]
    assert cli.main(words) == 2 and "far enough" in capsys.readouterr().err
    assert asked == [64] == [picture_size(checkpoint)]


def test_a_checkpoint_from_before_gets_84_pixels(checkpoint):
    assert json.loads((checkpoint / "config.json").read_text())["processor"]["picture_size"] == 64
    vla = VLA.load(checkpoint)
    vla.processor.config = replace(vla.processor.config, picture_size=None)
    vla.save(checkpoint)
    assert picture_size(checkpoint) is None
    assert pictures_for(VLAPolicy.load(checkpoint)) == pictures_for(None) == 84


def test_the_aspect_of_the_training_pictures_is_kept_with_the_checkpoint(tmp_path):
    known = replace(demos(), aspects={CAMERAS[0]: 4 / 3})
    build_vla(CONFIG, known, backbone=toy_backbone(), action_spec=SPEC).save(tmp_path / "policy")
    again = VLA.load(tmp_path / "policy", load_backbone=load_toy).processor.config
    assert again.aspects == (1.333, 0.0) and again.cameras == CAMERAS
