"""A reward classifier in LeRobot's own format, saved by LeRobot and read as somebody who rewards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.rewards.classifier.configuration_classifier import RewardClassifierConfig
from lerobot.rewards.classifier.modeling_classifier import Classifier
from lerobot.rewards.classifier.processor_classifier import make_classifier_processor
from transformers import ResNetConfig, ResNetModel

from bascule.practice.classifiers import judge_of, told_apart
from policies.lerobot.reward_classifier import load_reward_classifier
from rl.rewards.success_classifier import SuccessClassifier
from vla.core.types import Observation

KEY = "observation.images.front"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(sizes).save_pretrained(folder)
    return folder


def bright(folder: Path, encoder: Path, *, sign: float = 1.0) -> Classifier:
    """A classifier, saved by LeRobot, that says `done` of pictures that are bright (or, by `sign`, of dark ones)."""
    feature = PolicyFeature(FeatureType.VISUAL, (3, 128, 128))
    config = RewardClassifierConfig(
        model_name=str(encoder), num_cameras=1, latent_dim=16, hidden_dim=16, input_features={KEY: feature},
        output_features={}, device="cpu",
    )  # fmt: skip
    torch.manual_seed(1)
    model = Classifier(config).eval()
    stats = {KEY: {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)}}
    before, _ = make_classifier_processor(config, stats)
    with torch.no_grad():  # its last layer, such that bright and dark are on two sides of a half
        head = model.classifier_head
        hidden = [
            head[:-1](
                model._get_encoder_output(
                    before({KEY: torch.full((1, 3, 128, 128), v)})[KEY], "observation_images_front"
                )
            )
            for v in (0.1, 0.9)
        ]
        across = (hidden[1] - hidden[0])[0]
        head[-1].weight.copy_(sign * 20 * across[None] / across.square().sum())
        head[-1].bias.copy_(-(head[-1].weight @ (hidden[0] + hidden[1])[0]) / 2)
    model.save_pretrained(folder)
    before.save_pretrained(folder)
    return model


def shown(*brightness: int, size: int = 128) -> Observation:
    picture = np.array(brightness, np.uint8)[:, None, None, None].repeat(size, 1).repeat(size, 2).repeat(3, 3)
    return Observation({"front": picture}, np.zeros((len(brightness), 1), np.float32), [""] * len(brightness))


def test_it_says_what_lerobot_says(tmp_path: Path, encoder: Path) -> None:
    bright(tmp_path, encoder)
    read = load_reward_classifier(tmp_path)
    assert read.cameras == ("front",)
    assert read(shown(25, 230)).tolist() == [False, True]
    assert read(shown(25, 230, size=64)).tolist() == [False, True]  # a square picture of another size
    with pytest.raises(ValueError, match="reads camera 'front', shown are wrist"):
        read(Observation({"wrist": shown(0).images["front"]}, np.zeros((1, 1), np.float32), [""]))


def test_the_task_and_its_undo_have_one_each(tmp_path: Path, encoder: Path) -> None:
    bright(tmp_path / "a", encoder)
    bright(tmp_path / "b", encoder, sign=-1.0)

    class Two:
        num_envs, forward = 2, np.array([True, False])

    judge = judge_of([tmp_path / "a", tmp_path / "b"], "small", ("front", "wrist"))(Two())
    judge.begin(np.arange(2))
    nothing = torch.zeros(2, 0), np.zeros(2, bool)
    assert judge.verdict(shown(230, 230), *nothing).tolist() == [False, False]  # not twice in a row yet
    assert judge.verdict(shown(230, 25), *nothing).tolist() == [True, False]
    assert judge.verdict(shown(230, 25), *nothing).tolist() == [True, True]
    assert told_apart([tmp_path / "a"]) != told_apart([tmp_path / "b"]) and told_apart([]) is None


def test_classifiers_that_cannot_reward_are_one_line(tmp_path: Path, encoder: Path) -> None:
    bright(tmp_path / "a", encoder)
    SuccessClassifier(4, 8).save(tmp_path / "ours", "tiny")
    for folders, message in (
        ([tmp_path / "none"], "is not a folder of a classifier"),
        ([tmp_path / "a"], "give --classifier two of them"),
        ([tmp_path / "a", tmp_path / "ours"], "give --classifier two of them"),
        ([tmp_path / "ours", tmp_path / "ours"], "takes one classifier of ours"),
        ([tmp_path / "ours"], "features of the backbone 'tiny', this policy's is 'small'"),
    ):
        with pytest.raises(ValueError, match=message):
            judge_of(folders, "small", ("front",))
    with pytest.raises(ValueError, match="reads camera 'front', there are top"):
        judge_of([tmp_path / "a", tmp_path / "a"], "small", ("top",))
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold the classifier's weights"):
        load_reward_classifier(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"model_name": str(tmp_path / "gone")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="name a local folder of it as model_name"):
        load_reward_classifier(tmp_path / "a")
