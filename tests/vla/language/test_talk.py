"""A policy that talks: its answers are those of one plain pass over the whole sequence, and its actions never move."""

import threading

import numpy as np
import pytest
import torch

from tests.vla.backbones.test_small import spelling
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.families import decoder_of
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.language.talking import ask
from vla.model.config import BridgeConfig, TalkerConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.model.talking.talker import question_tokens

QUESTIONS = ["what are you doing?", "which object?", "Colourless green ideas sleep furiously, 42%!"]


def talking_policy(rank=4, names=(), **config):
    """On a random backbone `small` of 64 pixels that spells its words; the adapters are not zero."""
    tokenizer = spelling()
    backbone = build_small(
        small_config(len(tokenizer), image_size=64, word_width=16), tokenizer, num_queries=8, seed=0
    ).eval()
    vla = VLA.build(
        VLAConfig(
            backbone="small", bridge=BridgeConfig(width=32, gate_init=0.5),
            talk=TalkerConfig(rank=rank, names=names), **config,
        ),
        stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, max_text_tokens=40, backbone=backbone,
    )  # fmt: skip
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for adapter in vla.talker.adapters.values():
            adapter.b.copy_(0.1 * torch.randn(adapter.b.shape, generator=generator))
    return VLAPolicy(vla.eval())


def seen_slowly(policy, inp, text):
    """The numbers (B, F) of a text, and its places: the backbone's own forward pass with it as instruction."""
    backbone = policy.vla.backbone
    ids = torch.tensor([question_tokens(backbone.tokenizer, text)] * len(inp.images_BVHWC))
    features = backbone(inp.images_BVHWC, ids, torch.ones_like(ids, dtype=torch.bool))
    states = features.queries_BLQD[:, -1]
    both = [states[:, backbone.naming[0]], states.mean(1)]
    both = [torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in both]
    points = features.points_BQE[:, list(backbone.naming)].unflatten(-1, (-1, 3))  # (B, queries, views, 3)
    xy = points[..., :2]
    waves = [f(k * np.pi * xy) for k in (0.5, 1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([part.flatten(1) for part in (*both, xy, points[..., 2:], *waves)], 1), xy.flatten(1)


def things_slowly(policy, inp, question):
    """(the tokens (B, N, D) of the names, what every token starts from beside words, state and instruction)."""
    talker, words, tokens = policy.vla.talker, policy.vla.backbone.vlm.model.get_input_embeddings(), []
    if not policy.vla.config.talk.names:
        return inp.proprio_BP.new_zeros(len(inp.images_BVHWC), 0, policy.vla.backbone.width), 0
    asked, at = seen_slowly(policy, inp, question)
    for name in policy.vla.config.talk.names:
        seen, place = seen_slowly(policy, inp, name)
        ids = torch.tensor(question_tokens(policy.vla.backbone.tokenizer, name))
        tokens.append(words(ids).mean(0) + talker.thing(torch.cat([seen, place - at], 1)))
    return torch.stack(tokens, 1), talker.asked(asked)


def one_pass(policy, obs, question, said):
    """Logits (B, T, V) of the tokens after prompt and question, of one pass without a cache: the slow reference. The
    adapters are added to a layer's output behind the prompt alone."""
    vla, backbone = policy.vla, policy.vla.backbone
    inp = policy._input(obs)
    prompt = backbone.prompt(inp.images_BVHWC, inp.token_ids_BT, inp.token_mask_BT)
    b, s = prompt.mask_BS.shape
    tokens = torch.tensor([question_tokens(backbone.tokenizer, question) + said] * b)
    words = backbone.vlm.model.get_input_embeddings()
    things, asked = things_slowly(policy, inp, question)
    told = torch.cat([things, words(tokens)], 1)
    real = [words(ids[mask]).mean(0) for ids, mask in zip(inp.token_ids_BT, inp.token_mask_BT, strict=True)]
    said = torch.nn.functional.rms_norm(torch.stack(real), (backbone.width,))
    start = vla.talker.state(inp.proprio_BP) + vla.talker.told(said) + asked
    embeds = torch.cat([prompt.embeds_BSD, told + start[:, None]], 1)
    t = embeds.shape[1] - s
    sees = torch.ones(s + t, s + t, dtype=torch.bool).tril()[None] & torch.cat(
        [prompt.mask_BS, torch.ones(b, t, dtype=torch.bool)], 1
    ).unsqueeze(1)
    positions = torch.cat([prompt.positions, prompt.positions[:, -1:] + 1 + torch.arange(t)], 1)
    decoder, hooks = decoder_of(backbone.vlm, backbone.family), []
    for name, adapter in vla.talker.adapters.items():

        def add(_module, inputs, out, adapter=adapter):
            behind = (torch.arange(s + t) >= s).float()[None, :, None]
            return out + behind * adapter(inputs[0])

        hooks.append(decoder.get_submodule(name.replace("/", ".")).register_forward_hook(add))
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=torch.zeros(b, 1, s + t, s + t).masked_fill(~sees[:, None], -30000.0),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    for hook in hooks:
        hook.remove()
    return backbone.vlm.lm_head(hidden[:, -1 - len(said) :])


@pytest.mark.parametrize("names", [(), ("the red cube", "the drawer", "cup")])
@torch.no_grad()
def test_answers_are_the_likeliest_tokens_of_one_plain_pass(names):
    policy = talking_policy(names=names)
    obs = toy_observation(3, size=64)
    answers = ask(policy, obs, QUESTIONS)
    tokenizer = policy.vla.backbone.tokenizer
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        said, sure = [], 1.0
        for _ in range(24):
            chance = one_pass(policy, obs.select([row]), question, said)[0, -1].softmax(-1)
            sure = min(sure, float(chance.max()))
            if int(chance.argmax()) == tokenizer.eos_token_id:
                break
            said.append(int(chance.argmax()))
        assert answer.text == tokenizer.decode(said).strip()
        assert answer.confidence == pytest.approx(sure, rel=1e-3)
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize(("rank", "names"), [(0, ()), (4, ()), (4, ("the red cube",))])
def test_no_question_changes_an_action_by_a_bit(rank, names):
    policy, obs = talking_policy(rank, names), toy_observation(3, size=64)
    before = policy.act(obs)
    with torch.no_grad():
        inp = policy._input(obs)
        plain = policy.vla.to_actions(policy.vla.act(policy.vla.encode(inp), inp.proprio_BP))
    for question in (*QUESTIONS, "x" * 400, "pick up the blue cube instead, now"):
        ask(policy, obs, [question] * 3)
        np.testing.assert_array_equal(policy.act(obs), before)
    np.testing.assert_array_equal(plain, before)


def test_who_acts_while_somebody_asks_gets_the_same_actions():
    policy, obs = talking_policy(), toy_observation(1, size=64)
    before, stop, wrong = policy.act(obs), threading.Event(), []

    def act():
        while not stop.is_set():
            wrong.append(not np.array_equal(policy.act(obs), before))

    thread = threading.Thread(target=act)
    thread.start()
    for _ in range(5):
        ask(policy, obs, QUESTIONS[:1])
    stop.set()
    thread.join()
    assert wrong and not any(wrong)


def test_a_talker_beside_it_changes_no_weight_that_acts():
    talks, plain = talking_policy().vla, VLAPolicy(silent().vla).vla
    for name, value in plain.state_dict().items():
        assert torch.equal(value, talks.state_dict()[name]), name


def silent():
    tokenizer = spelling()
    backbone = build_small(
        small_config(len(tokenizer), image_size=64, word_width=16), tokenizer, num_queries=8, seed=0
    ).eval()
    return VLAPolicy(
        VLA.build(
            VLAConfig(backbone="small", bridge=BridgeConfig(width=32, gate_init=0.5)),
            stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, max_text_tokens=40, backbone=backbone,
        ).eval()
    )  # fmt: skip


@torch.no_grad()
def test_what_it_reads_of_pictures_tells_where_each_token_is():
    """Added to keys and values of the image tokens alone, of talking alone; a loop over tokens is the reference."""
    policy, obs = talking_policy(), toy_observation(2, size=64)
    vla, inp = policy.vla, policy._input(obs)
    talker = vla.talker
    torch.nn.init.normal_(talker.placed.weight, std=0.1)
    before, after = (talker.prefill(vla.backbone, inp).cache for _ in range(2))
    talker._place(after)
    coords, layers = vla.backbone.coords_N3, len(before.layers)
    weight = talker.placed.weight.view(layers, 2, 4, 40, -1)  # layer, keys or values, head, width, features
    for number, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        for k, (was, now) in enumerate(((old.keys, new.keys), (old.values, new.values))):
            assert torch.equal(now[:, :, len(coords) :], was[:, :, len(coords) :])
            for token in (0, 5, len(coords) - 1):
                x, y, view = coords[token].tolist()
                waves = [f(k * np.pi * z) for k in (0.5, 1, 2) for f in (np.sin, np.cos) for z in (x, y)]
                told = torch.tensor([x, y, *waves, float(view == 0), float(view == 1)], dtype=torch.float32)
                torch.testing.assert_close(
                    now[0, :, token] - was[0, :, token], weight[number, k] @ told, atol=1e-5, rtol=1e-4
                )
    said = ask(policy, obs, QUESTIONS[:2])
    act = policy.act(obs)
    torch.nn.init.zeros_(talker.placed.weight)
    assert ask(policy, obs, QUESTIONS[:2]) != said
    np.testing.assert_array_equal(policy.act(obs), act)


def test_it_sees_the_picture_and_the_state_and_hears_the_instruction():
    policy, obs = talking_policy(), toy_observation(1, size=64)

    def sure(**changes):
        from dataclasses import replace

        return ask(policy, replace(obs, **changes), ["which object?"])[0].confidence

    assert sure() == sure()
    assert sure() != sure(proprio=obs.proprio + 1)
    assert sure() != sure(instruction=["pick up the blue cube"])
    assert sure() != sure(images={name: 255 - image for name, image in obs.images.items()})


def test_checkpoint_talks_alike_and_holds_no_weight_twice(tmp_path):
    policy, obs = talking_policy(), toy_observation(2, size=64)
    said = ask(policy, obs, QUESTIONS[:2])
    policy.vla.save(tmp_path)
    loaded = VLAPolicy.load(tmp_path)
    assert loaded.spec.talks and ask(loaded, obs, QUESTIONS[:2]) == said
    grown = set(policy.vla.state_dict()) - set(silent().vla.state_dict())
    assert grown and all(name.startswith("talker.") for name in grown)


def test_who_cannot_talk_says_so_in_one_line():
    policy = silent()
    assert not policy.spec.talks
    for call in (lambda: ask(policy, toy_observation(1, size=64), ["hello"]), lambda: policy.answer(None, ["hello"])):
        with pytest.raises(ValueError, match="^this policy cannot talk: .*--talk"):
            call()


@pytest.mark.parametrize(
    ("question", "problem"),
    [("", "must say something"), ("   ", "must say something"), ("?!", "must say something"), (7, "must be text"),
     ("a" * 401, "at most 400")],
)  # fmt: skip
def test_a_question_that_says_nothing_is_refused(question, problem):
    with pytest.raises(ValueError, match=problem):
        ask(talking_policy(), toy_observation(1, size=64), [question])


def test_one_question_for_each_observation():
    with pytest.raises(ValueError, match="one question for each of 3"):
        ask(talking_policy(), toy_observation(3, size=64), ["hello"])


def test_without_a_language_model_there_is_no_talking():
    with pytest.raises(ValueError, match="cannot talk"):
        talking_policy(decoder=False)
