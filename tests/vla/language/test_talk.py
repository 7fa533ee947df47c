"""A policy that talks: its answers are those of one plain pass over the whole sequence, and its actions never move."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from tests.vla.backbones.test_small import spelling
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.families import decoder_of
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.core.config import load_json, save_json
from vla.language.talking import ask
from vla.model.config import BridgeConfig, TalkerConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.model.stored import TALKER
from vla.model.talking import speech
from vla.model.talking.talker import TURN_WEIGHT, Asked, question_tokens
from vla.model.talking.things import look_for, padded

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
    """The numbers (B, F) of a text: the backbone's own forward pass with it as instruction."""
    backbone = policy.vla.backbone
    ids = torch.tensor([question_tokens(backbone.tokenizer, text)] * len(inp.images_BVHWC))
    features = backbone(inp.images_BVHWC, ids, torch.ones_like(ids, dtype=torch.bool))
    states = features.queries_BLQD[:, -1]
    both = [states[:, backbone.naming[0]], states.mean(1)]
    both = [F.layer_norm(x, x.shape[-1:]) for x in both]
    points = features.points_BQE[:, list(backbone.naming)].unflatten(-1, (-1, 3))  # (B, queries, views, 3)
    xy = points[..., :2]
    waves = [f(k * np.pi * xy) for k in (0.5, 1, 2) for f in (torch.sin, torch.cos)]
    fine = backbone.look(backbone.normalise(inp.images_BVHWC)).fine.unflatten(0, (-1, backbone.num_views))
    there = torch.stack(
        [torch.stack([pixel_at(fine[b, v], *xy[b, 0, v].tolist()) for v in range(2)]) for b in range(len(xy))]
    )
    there = F.layer_norm(there, there.shape[-1:])
    return torch.cat([part.flatten(1) for part in (*both, xy, points[..., 2:], *waves, there)], 1)


def pixel_at(picture, x, y):
    """The features (C,) of a picture (C, h, w) at a place in [-1, 1], between the four nearest pixels; none beyond."""
    _, h, w = picture.shape
    x, y, found = (x + 1) * w / 2 - 0.5, (y + 1) * h / 2 - 0.5, 0
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < h and 0 <= j < w:
                found = found + (1 - abs(y - i)) * (1 - abs(x - j)) * picture[:, i, j]
    return found


def scene_slowly(policy, inp, instruction, question, start):
    """(what the decoder reads of names and instruction (B, N + 1, K), what the question finds (B, D), which names the
    answer has (B, N, 4))."""
    talker, backbone = policy.vla.talker, policy.vla.backbone
    words, seen, meant = backbone.vlm.model.get_input_embeddings(), [], []
    for name in policy.vla.config.talk.names:
        seen.append(seen_slowly(policy, inp, name))
        meant.append(words(torch.tensor(question_tokens(backbone.tokenizer, name))).mean(0))
    told, asked = seen_slowly(policy, inp, instruction), seen_slowly(policy, inp, question)
    things = torch.stack(seen, 1)
    said = words(torch.tensor(question_tokens(backbone.tokenizer, question))).mean(0).expand(len(told), 1, -1)
    scene = talker.scene(torch.stack(meant), things, told, start)
    sought = talker.scene.seek(asked[:, None], said, things, told, scene)
    return sought.read_BQNK[:, 0], sought.found_BQD[:, 0], sought.turn_BQNR[:, 0]


def one_pass(policy, obs, question, said):
    """Logits (B, T, V) of the tokens after prompt and question, which are read at once, one observation by itself: the
    slow reference. The adapters are added to a layer's output behind the prompt alone."""
    vla, backbone = policy.vla, policy.vla.backbone
    inp = policy._input(obs)
    prompt, cache = backbone.prompt(inp.images_BVHWC, inp.token_ids_BT, inp.token_mask_BT), DynamicCache()
    decoder, hooks = decoder_of(backbone.vlm, backbone.family), []
    decoder(
        inputs_embeds=prompt.embeds_BSD, attention_mask=prompt.mask, position_ids=prompt.positions,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    tokens = torch.tensor([question_tokens(backbone.tokenizer, question) + said])
    words = backbone.vlm.model.get_input_embeddings()
    meant = words(inp.token_ids_BT[inp.token_mask_BT]).mean(0, keepdim=True)
    start = vla.talker.state(inp.proprio_BP) + vla.talker.told(F.rms_norm(meant, (backbone.width,)))
    seen = prompt.mask_BS
    if vla.config.talk.names:
        seen[:, : backbone._prefix] = False  # the patches: things stand in their stead
        scene, found, _ = scene_slowly(policy, inp, obs.instruction[0], question, start)
        start = start + found
        seen = torch.cat([seen, torch.ones(1, scene.shape[1], dtype=torch.bool)], 1)
        read = scene.view(1, scene.shape[1], len(cache.layers), 2, 4, 40)
        for number, layer in enumerate(cache.layers):
            layer.keys = torch.cat([layer.keys, read[:, :, number, 0].transpose(1, 2)], 2)
            layer.values = torch.cat([layer.values, read[:, :, number, 1].transpose(1, 2)], 2)
    t = tokens.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()[None]
    sees = torch.cat([seen[:, None].expand(-1, t, -1), causal], 2)
    for name, adapter in vla.talker.adapters.items():

        def add(_module, inputs, out, adapter=adapter):
            return out + adapter(inputs[0])

        hooks.append(decoder.get_submodule(name.replace("/", ".")).register_forward_hook(add))
    hidden = decoder(
        inputs_embeds=words(tokens) + start[:, None],
        attention_mask=torch.zeros(sees.shape)[:, None].masked_fill(~sees[:, None], -30000.0),
        position_ids=prompt.positions[:, -1:] + 1 + torch.arange(t),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1 - len(said) :]
    for hook in hooks:
        hook.remove()
    return backbone.vlm.lm_head(hidden)


@pytest.mark.parametrize("names", [(), ("the red cube", "the drawer", "cup")])
@torch.no_grad()
def test_answers_are_the_likeliest_tokens_of_one_plain_pass(names, monkeypatch):
    longest = 3 if names else 8  # the reference looks for every name again at each token
    monkeypatch.setattr(speech, "LONGEST_ANSWER", longest)
    policy = talking_policy(names=names)
    obs = toy_observation(3, size=64)
    answers = ask(policy, obs, QUESTIONS)
    tokenizer = policy.vla.backbone.tokenizer
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        said, sure = [], 1.0
        for _ in range(longest):
            chance = one_pass(policy, obs.select([row]), question, said)[0, -1].softmax(-1)
            sure = min(sure, float(chance.max()))
            if int(chance.argmax()) == tokenizer.eos_token_id:
                break
            said.append(int(chance.argmax()))
        assert answer.text == tokenizer.decode(said).strip()
        assert answer.confidence == pytest.approx(sure, rel=1e-3)
    assert len({answer.text for answer in answers}) > 1


@torch.no_grad()
def test_the_loss_of_questions_in_one_row_is_that_of_each_by_itself():
    """Their answers' tokens, read one by one, among the words that are said; and which names each answer has."""
    policy, obs = talking_policy(names=("the red cube", "cup")), toy_observation(2, size=64)
    vla, tokenizer = policy.vla, policy.vla.backbone.tokenizer
    asked = [[("which object?", "cup"), ("what now", "ab")], [("is it", "ab"), ("where", "cup and the red cube")]]
    turns = torch.tensor([[[0, 1], [0, 0]], [[0, 0], [2, 1]]])  # of "the red cube" and "cup"
    rows, losses, answers, named = [], [], set(), 0.0
    for k, pairs in enumerate(asked):
        row = []
        for number, (question, answer) in enumerate(pairs):
            q, a = question_tokens(tokenizer, question), [*question_tokens(tokenizer, answer), tokenizer.eos_token_id]
            answers |= set(a)
            labels = [-1] * (len(q) - 1) + a
            row += [(*x, number, place) for place, x in enumerate(zip([*q, *a[:-1]], labels, strict=True))]
            logits = one_pass(policy, obs.select([k]), question, a[:-1])[0]
            losses.append((logits, a))
            inp = policy._input(obs.select([k]))
            meant = vla.backbone.vlm.model.get_input_embeddings()(inp.token_ids_BT[inp.token_mask_BT]).mean(0)[None]
            start = vla.talker.state(inp.proprio_BP) + vla.talker.told(F.rms_norm(meant, (vla.backbone.width,)))
            logits_NR = scene_slowly(policy, inp, obs.instruction[k], question, start)[2][0]
            named -= sum(float(logits_NR[n].log_softmax(-1)[turns[k, number, n]]) for n in range(2))
        rows.append(row)
    longest = max(map(len, rows))
    packed = torch.tensor([row + [(0, -1, -1, 0)] * (longest - len(row)) for row in rows])
    ids, labels, number, place = packed.unbind(-1)
    used = torch.tensor(sorted(answers))
    vla.talker.teach(used.flip(0))
    heard = vla.talker.prefill(vla.backbone, policy._input(obs))
    texts = padded([question_tokens(tokenizer, question) for pairs in asked for question, _ in pairs])
    seen = look_for(vla.backbone, heard.looked, texts.unflatten(0, (2, 2)))
    row = Asked(ids, number, place, labels, texts.unflatten(0, (2, 2)), turns)
    loss = vla.talker.loss(vla.backbone, heard, row, seen, smoothing=0.2)
    each = []
    for told, a in losses:
        for row, token in zip(told, a, strict=True):
            log = row[used].log_softmax(-1)
            each.append(-0.8 * log[list(used).index(token)] - 0.2 * log.mean())
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()) + TURN_WEIGHT * named / 4, rel=1e-4)


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


def test_a_talker_of_an_earlier_version_is_taught_again(tmp_path):
    talking_policy().vla.save(tmp_path)
    config = load_json(tmp_path / "config.json")
    assert config.pop("talker") == TALKER
    save_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"taught to talk by an earlier version.* teach it again \(vla train --talk\)"):
        VLAPolicy.load(tmp_path)


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
