"""Learning to talk: it is learnt, it moves nothing that acts, it is resumed exactly, and a set that does not fit is
refused."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.backbones.test_small import spelling
from tests.vla.toy_backbone import SPEC
from tests.vla.training.resuming import assert_resumes_exactly
from tests.vla.training.test_learning_backbone import tiny_demos
from tests.vla.training.test_train import assert_bit_equal, metrics, weights
from vla.backbones.hub import load
from vla.backbones.lora import LoRAConfig
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.model.config import BridgeConfig, TalkerConfig, VLAConfig
from vla.model.model import VLA
from vla.training.run_identity import fingerprint, same_data
from vla.training.talking import TalkSet, TalkTask, _turns, examine, talker_for
from vla.training.train import build_vla, train
from vla.training.train_config import TalkConfig, TrainConfig

COLOURS = {"red": (220, 30, 30), "blue": (40, 60, 220)}
CONFIG = TrainConfig(
    model=VLAConfig(backbone="small", bridge=BridgeConfig(width=32, gate_init=0.5), chunk_size=4),
    image_size=64, max_text_tokens=32, steps=6, batch_size=8, warmup_steps=2, log_every=1, save_every=3, num_threads=1,
    lr=2e-3,
)  # fmt: skip


def talk_set(folder, moments=24, **changes):
    """Pictures of one colour, an instruction that names another thing, and a question about each."""
    rng, folder = np.random.default_rng(0), folder / "talk"
    folder.mkdir()
    shown = [list(COLOURS)[k % 2] for k in range(moments)]
    told = [("cube", "can")[k // 2 % 2] for k in range(moments)]
    images = np.stack([np.full((2, 64, 64, 3), COLOURS[colour], np.uint8) for colour in shown])
    np.save(folder / "images.npy", images + rng.integers(0, 20, images.shape, np.uint8))
    np.save(folder / "proprio.npy", rng.normal(size=(moments, 5)).astype(np.float32))
    frames = [
        {
            "suite": "toy", "seed": k, "instruction": f"lift the {thing}",
            "asked": [["colour", "what do you see", colour], ["object", "which object", thing]],
        }
        for k, (colour, thing) in enumerate(zip(shown, told, strict=True))
    ]  # fmt: skip
    about = {"cameras": ["front", "wrist"], "proprio_names": list("abcde"), "frames": frames}
    about |= {"names": ["the red cube", "the can"]} | changes
    (folder / "talk.json").write_text(json.dumps(about))
    return folder


def talks(folder, tuned=None, **changes):
    """A run that learns to talk; `tuned`: changes of the model with which the backbone learns, too."""
    questions = TalkConfig(data=str(folder), moments=8, questions=2, smoothing=0.1)
    model = replace(CONFIG.model, talk=talker_for(folder, learns=bool(tuned)), **(tuned or {}))
    return replace(CONFIG, model=model, talk=replace(questions, **changes.pop("talk", {})), **changes)


def policy(cfg):
    tokenizer = spelling()
    config = small_config(len(tokenizer), image_size=64, word_width=16)
    backbone = build_small(config, tokenizer, num_queries=8, seed=0).eval()
    data = tiny_demos()
    return build_vla(cfg, data, action_spec=SPEC, backbone=backbone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talk_set(tmp_path_factory.mktemp("data"))


def test_it_learns_to_tell_what_it_sees_and_what_it_was_told(folder):
    cfg = talks(folder)
    vla = build_vla(replace(cfg, image_size=None), tiny_demos(), action_spec=SPEC, backbone=load("small"))
    task, data = TalkTask(cfg.talk, vla), TalkSet(folder)
    optimiser = torch.optim.AdamW(vla.talker.parameters(), lr=2e-3)
    for step in range(40):
        optimiser.zero_grad()
        task(None, *task.draw(step)).backward()
        optimiser.step()
    replies = examine(vla, data, range(len(data)))
    assert len(replies) == 2 * len(data) and all(reply.right for reply in replies)
    other = examine(vla, data, range(len(data)), pictures_of=[k ^ 1 for k in range(len(data))])
    right = Counter(reply.kind for reply in other if reply.right)
    assert right == {"object": len(data)}  # the colour is that of the other picture, the object that of the words


def test_a_states_components_are_found_by_name(tmp_path):
    vla, order = policy(talks(talk_set(tmp_path))), [3, 0, 4, 1, 2]
    (tmp_path / "other").mkdir()
    other = talk_set(tmp_path / "other", proprio_names=[*map("abcde".__getitem__, order)])
    np.save(other / "proprio.npy", np.load(other / "proprio.npy")[:, order])
    seen = [TalkTask(talks(folder).talk, vla).observed(np.arange(9)) for folder in (tmp_path / "talk", other)]
    assert torch.equal(seen[0].proprio_BP, seen[1].proprio_BP)
    (tmp_path / "foreign").mkdir()
    foreign = talk_set(tmp_path / "foreign", proprio_names=list("abcdx"))
    with pytest.raises(ValueError, match="reads the state a, b, c, d, e, the set .* reports a, b, c, d, x"):
        TalkTask(talks(foreign).talk, vla)


def test_a_frozen_backbone_learns_the_same_actions_to_the_bit(folder, tmp_path):
    plain, data = policy(CONFIG), tiny_demos()
    train(CONFIG, plain, data, tmp_path / "plain")
    cfg = talks(folder)
    vla = policy(cfg)
    before = weights(vla)
    train(cfg, vla, data, tmp_path / "talks")
    after = weights(vla)
    assert_bit_equal({name: after[name] for name in weights(plain)}, weights(plain))
    learnt = [name for name in after if not torch.equal(after[name], before[name])]
    assert any(name.startswith("talker.adapters.") for name in learnt) and "talker.state.0.weight" in learnt
    assert not any(name.startswith("backbone.") for name in learnt)
    assert all("language_loss" in row for row in metrics(tmp_path / "talks"))
    assert VLA.load(tmp_path / "talks").talker is not None


@pytest.mark.parametrize("tuned", [{"freeze_backbone": False}, {"lora": LoRAConfig(rank=2)}])
def test_a_backbone_that_learns_learns_from_both(folder, tmp_path, tuned):
    moved = {}
    for name, cfg in {
        "both": talks(folder, tuned),
        "actions": replace(CONFIG, model=replace(CONFIG.model, **tuned)),
    }.items():
        vla = policy(replace(cfg, steps=2))
        train(replace(cfg, steps=2), vla, tiny_demos(), tmp_path / name)
        moved[name] = weights(vla)
    decoder = [name for name in moved["actions"] if "self_attn.q_proj" in name]
    assert any(not torch.equal(moved["both"][name], moved["actions"][name]) for name in decoder)
    assert not any(name.startswith("talker.adapters") for name in moved["both"])


def test_it_is_resumed_exactly(folder, tmp_path):
    assert_resumes_exactly(talks(folder, ema_decay=0.5), policy, tiny_demos(), tmp_path)


def test_labels_are_smoothed(folder):
    """The loss is the cross-entropy with a share of the probability on all tokens alike."""
    cfg = talks(folder)
    vla = policy(cfg)
    sharp = TalkTask(replace(cfg.talk, smoothing=0.0), vla)
    smooth = TalkTask(cfg.talk, vla)
    even = TalkTask(replace(cfg.talk, smoothing=0.9999), vla)
    with torch.no_grad():
        a, b, c = (float(task(None, *task.draw(0))) for task in (sharp, smooth, even))
    assert b == pytest.approx(0.9 * a + 0.1 * c, rel=1e-5) and abs(a - c) > 1e-3


def test_the_things_that_an_answer_names_are_told_in_their_order():
    names = ("the red cube", "the can", "the red can", "the drawer")
    assert _turns("nothing", names) == [0, 0, 0, 0]
    assert _turns("reaching for the can", names) == [0, 1, 0, 0]
    assert _turns("the red can and the red cube", names) == [2, 0, 1, 0]
    assert _turns("the drawer and the can and the red cube and the red can", names) == [3, 2, 3, 1]
    assert _turns("the cans", names) == [0, 0, 0, 0]


def test_shuffled_answers_are_those_of_other_questions_of_the_kind(folder):
    data, task = TalkSet(folder), TalkTask(talks(folder, talk={"shuffled": True}).talk, policy(talks(folder)))
    told = [(kind, answer) for frame in data.asked for kind, _, answer in frame]
    given = [
        (kind, answer)
        for frame, answers in zip(data.asked, task._answers, strict=True)
        for (kind, *_), answer in zip(frame, answers, strict=True)
    ]
    assert Counter(given) == Counter(told) and given != told


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"cameras": ["front"]}, "shows the cameras front, the policy reads"), ({}, "no set of questions")],
)
def test_a_set_that_does_not_fit_is_refused(tmp_path, changes, problem):
    folder = talk_set(tmp_path, **changes) if changes else tmp_path
    with pytest.raises(ValueError, match=problem):
        TalkTask(TalkConfig(data=str(folder)), policy(talks(folder)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cfg: replace(cfg, model=CONFIG.model), "has no talker"),
        (lambda cfg: replace(cfg, shard=True, model=replace(cfg.model, freeze_backbone=False)), "a teacher or shard"),
        (lambda cfg: replace(cfg, model=replace(cfg.model, talk=TalkerConfig(rank=0))), "talk.rank above 0"),
        (lambda cfg: replace(cfg, talk=replace(cfg.talk, smoothing=1.0)), "talk.smoothing"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(folder, change, problem):
    assert problem in change(talks(folder)).problem()


def test_what_is_seen_is_kept_for_a_run_in_bfloat16_too(folder):
    cfg = talks(folder)
    vla = policy(replace(cfg, model=replace(cfg.model, backbone_dtype="bfloat16")))
    task = TalkTask(cfg.talk, vla)
    rows, rng = task.draw(0)
    assert torch.isfinite(task(None, rows, rng))
    assert set(task._seen) == set(rows.tolist())


def test_what_is_seen_is_kept_beside_the_set_for_every_run_on_this_backbone(tmp_path):
    cfg = talks(talk_set(tmp_path, moments=4))
    vla = policy(cfg)
    task = TalkTask(cfg.talk, vla)
    with torch.no_grad():
        loss = task(None, *task.draw(0))
    task.keep_sights()
    again = TalkTask(cfg.talk, vla)
    assert set(again._seen) == set(range(4))
    with torch.no_grad():
        assert torch.equal(again(None, *again.draw(0)), loss)
        vla.backbone.queries += 0.1  # another backbone sees something else
    assert not TalkTask(cfg.talk, vla)._seen


def test_a_set_in_the_place_of_another_is_told_from_it(tmp_path):
    data, asked = [tiny_demos()], TalkConfig(data=str(tmp_path))
    (tmp_path / "talk.json").write_text("[1]")
    np.save(tmp_path / "images.npy", np.zeros((40, 1, 4, 4, 3), np.uint8))
    begun = fingerprint(data, asked)
    assert begun == fingerprint(data, asked) and same_data(fingerprint(data), begun), "older runs know of none"
    (tmp_path / "talk.json").write_text("[2]")
    assert not same_data(begun, fingerprint(data, asked))
