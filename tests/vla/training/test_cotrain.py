"""Language beside the actions: the questions' gradient arrives, is resumed exactly, and teaches what actions do not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import SPEC
from tests.vla.training.resuming import assert_resumes_exactly
from tests.vla.training.test_learning_backbone import TINY_FULL, tiny_demos
from tests.vla.training.test_train import CONFIG, fresh, metrics, weights
from vla.training.grounding.loss import scene_loss
from vla.training.language_cotraining import LanguageTask
from vla.training.train import build_vla, train
from vla.training.train_config import LanguageConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def grounding_set(folder, scenes=24):
    """Squares of three colours, in the format of `vla ground-data`: five to point at, then two to answer."""
    rng, folder = np.random.default_rng(0), folder / "ground"
    folder.mkdir()
    images = np.full((scenes, 2, 84, 84, 3), 120, np.uint8)
    points = np.full((scenes, 5, 2, 9), np.nan, np.float32)
    questions = []
    for scene in range(scenes):
        asked = []
        for slot, colour in enumerate(rng.permutation(list(COLOURS))):
            y, x = rng.integers(0, 5, 2) * 12 + 6
            images[scene, :, y : y + 12, x : x + 12] = COLOURS[colour]
            uv = np.array([(x + 6) / 42 - 1, (y + 6) / 42 - 1, 1.0])
            points[scene, slot, 0] = [*rng.normal(size=3) * 0.1, *uv, *uv]
            asked.append([f"pick up the {colour} cube", ""])
        points[scene, 3:] = points[scene, :2]
        asked += asked[:2]
        asked.append(["is there a red cube", "yes"])
        asked.append(["is there a yellow cube", "no"])
        questions.append(asked)
    np.save(folder / "images.npy", images)
    np.save(folder / "points.npy", points)
    np.save(folder / "grip.npy", np.zeros((scenes, 3), np.float32))
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return grounding_set(tmp_path_factory.mktemp("data"))


def config(ground, **changes):
    language = LanguageConfig(data=str(ground), weight=0.5, scenes=4)
    return replace(TINY_FULL, language=language, steps=6, save_every=3, lr=1e-3, warmup_steps=0, log_every=1, **changes)


def policy(cfg):
    return build_vla(cfg, tiny_demos(), action_spec=SPEC)


@torch.no_grad()
def answer_loss(vla, ground):
    """On fixed questions: words only, no reader."""
    task = LanguageTask(LanguageConfig(data=str(ground), scenes=8), vla.backbone, seed=0)
    _, row = scene_loss(vla.backbone, task.reader, task._scenes, *task.draw(123), task._questions)
    return row["answer_loss"]


def test_both_are_trained_and_resumed_exactly(ground, tmp_path):
    cfg = config(ground, ema_decay=0.5, accumulate=2)
    before = weights(policy(cfg))
    straight = assert_resumes_exactly(cfg, policy, tiny_demos(), tmp_path)
    lines = metrics(tmp_path / "b")
    assert [line["language_loss"] for line in lines] == [line["language_loss"] for line in metrics(tmp_path / "a")]
    assert all(line["language_loss"] > 0 for line in lines)
    # The answers' layer is used by the questions only: it learns, so their gradient arrives.
    head = "backbone.vlm.model.language_model.embed_tokens.weight"
    assert not torch.equal(before[head], weights(straight)[head])


def test_words_are_learnt_with_it_and_not_without(ground, tmp_path):
    data, with_it = tiny_demos(), replace(config(ground, backbone_lr=1.0), steps=12)
    after = []
    for name, cfg in (("with", with_it), ("without", replace(with_it, language=None))):
        vla = policy(cfg)
        train(cfg, vla, data, tmp_path / name)
        after.append(answer_loss(vla, ground))
    assert after[0] < 0.5 < 1.5 < after[1]  # 0.37 and 2.8 when written; 3.3 before


def test_what_cannot_be_asked_is_said(ground, tmp_path):
    learning = replace(CONFIG.model, freeze_backbone=False)
    cfg = replace(CONFIG, model=learning, language=LanguageConfig(data=str(ground)))
    with pytest.raises(ValueError, match="language questions need the embedded backbone"):
        train(cfg, fresh(cfg), tiny_demos(), tmp_path)
    with pytest.raises(ValueError, match="is no grounding set; make one with `vla ground-data"):
        train(config(tmp_path / "nowhere"), policy(config(ground)), tiny_demos(), tmp_path)
    with pytest.raises(ValueError, match="language and checkpointing are for a backbone that learns"):
        train(replace(cfg, model=CONFIG.model), fresh(), tiny_demos(), tmp_path)
