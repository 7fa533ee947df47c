"""The backbone `small`: its stem, words and tokens, and that it trains, is saved and loaded like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.vla.backbones.square_scenes import write_set
from vla.backbones.features import mishearing
from vla.backbones.hub import load as load_backbone
from vla.backbones.small.create import build_small
from vla.backbones.small.model import WordTable, small_config
from vla.backbones.small.stem import CHANNELS, FINE_CHANNELS, STRIDES, Stem
from vla.backbones.small.vocabulary import more_words, whole_words
from vla.backbones.small.word_vectors import word_vectors
from vla.backbones.smollm import weights_file
from vla.training.grounding.pretrain import pretrain
from vla.training.optim import checkpoint_layers
from vla.training.train_config import PretrainConfig


def spelling() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: as many tokens as there are bytes, and two more."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocabulary |= {c: k + 3 for k, c in enumerate(sorted(alphabet))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")


@pytest.fixture
def small():
    tokenizer = spelling()
    config = small_config(len(tokenizer), image_size=64, word_width=16)
    return build_small(config, tokenizer, num_queries=8, seed=0).eval()


def seen(backbone, seed=0, count=2, size=64, text="pick up the red cube"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 2, size, size, 3), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([backbone.tokenizer(text, add_special_tokens=False)["input_ids"]]).expand(count, -1)
    with torch.no_grad():
        return backbone(images, ids, ids > 0)


def test_layers_that_are_recomputed_have_the_same_gradients(small):
    """Recomputing the layers in the backward pass (`vla train --checkpointing`) gives the same gradients."""
    runs, images = [], torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    ids = torch.tensor([small.tokenizer("pick up", add_special_tokens=False)["input_ids"]] * 2)
    small.train().vlm.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        torch.manual_seed(0)  # words are heard with noise
        small.zero_grad()
        small(images, ids, ids > 0).queries_BLQD.square().mean().backward()
        return {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(runs) == 1
    with checkpoint_layers(small, True):
        again = gradients()
    assert len(runs) == 3 and again.keys() == plain.keys() and "queries" in plain
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    gradients()
    assert len(runs) == 4


def test_folding_changes_nothing_and_leaves_no_normalisation():
    torch.manual_seed(1)
    stem = Stem()
    for module in stem.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if trained
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    stem.eval()
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        before = stem(pixels)
        stem.fold()
        after = stem(pixels)
    assert [tuple(t.shape) for t in before] == [
        (3, c, 64 // s, 64 // s) for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in stem.modules())


def test_imagenet_weights_are_read_by_name_and_others_refused():
    source, target = Stem(), Stem()
    weights = {**source.state_dict(), "features.17.conv.0.weight": torch.zeros(1)}  # a deeper layer: left out
    target.read_imagenet(weights)
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())
    with pytest.raises(ValueError, match="no weights of MobileNetV2"):
        target.read_imagenet({"conv1.weight": torch.zeros(1)})


def test_a_picture_token_sees_its_place_at_every_stride(small):
    """A dot moves the token of its own cell most, and the features of the second look at its own place."""
    images = torch.full((1, 2, 64, 64, 3), 128, dtype=torch.uint8)
    spotted = images.clone()
    spotted[:, 0, 20:23, 37:40] = 255  # row 1, column 2 of 4 x 4 cells; row 5, column 9 of 16 x 16
    with torch.no_grad():
        plain, other = (small.look(small.normalise(x)) for x in (images, spotted))
    change = (plain.tokens - other.tokens).norm(dim=-1)[0]
    assert int(change.argmax()) == 1 * 4 + 2
    assert plain.fine.shape == (2, FINE_CHANNELS, 16, 16)
    fine = (plain.fine - other.fine)[0, : CHANNELS[0]].norm(dim=0)
    assert abs(int(fine.argmax()) // 16 - 5) <= 1 and abs(int(fine.argmax()) % 16 - 9) <= 1


def test_any_text_is_spelled_and_read(small):
    points = {text: seen(small, text=text).queries_BLQD for text in ("pick up teh yelow bar", "把红色方块拿起来", "🟥")}
    assert all(bool(p.isfinite().all()) for p in points.values())
    first, *others = [p[0, -1] for p in points.values()]
    assert all(not torch.allclose(first, other) for other in others)


def test_features_have_the_shape_of_any_backbone(small):
    out = seen(small)
    assert out.raw_BLND.shape == (2, 4, 32, 160) and out.queries_BLQD.shape == (2, 4, 8, 160)
    assert out.points_BQE.shape == (2, 8, 6) and out.coords_NE.shape == (32, 3)


def test_it_is_saved_and_loaded_like_any_backbone(small, tmp_path):
    small.save(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert torch.allclose(seen(small).points_BQE, seen(loaded).points_BQE, atol=3e-2), "weights are in half precision"
    assert loaded.vlm.lm_head.weight is loaded.vlm.get_input_embeddings().weight
    assert loaded.tokenizer("räum auf")["input_ids"] == small.tokenizer("räum auf")["input_ids"]


def test_its_words_are_saved_in_eight_bits_and_stay_when_saved_again(small, tmp_path):
    small.save(tmp_path / "once")
    stored = load_file(tmp_path / "once" / "model.safetensors")["vlm.model.language_model.embed_tokens.weight"]
    assert stored.dtype == torch.int8
    once = load_backbone(str(tmp_path / "once"))
    before, after = (b.vlm.get_input_embeddings().weight for b in (small, once))
    assert 0 < (before - after).abs().max() <= before.abs().max() / 254 + 1e-3
    once.save(tmp_path / "twice")
    twice = load_backbone(str(tmp_path / "twice")).vlm.get_input_embeddings().weight
    assert torch.allclose(after, twice, atol=1e-6)


def test_a_folded_one_is_saved_and_loaded_too(small, tmp_path):
    before = seen(small).points_BQE
    small.vlm.fold()
    assert torch.allclose(before, seen(small).points_BQE, atol=1e-4)
    small.save(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in loaded.modules())
    assert torch.allclose(before, seen(loaded).points_BQE, atol=3e-2)


def test_every_part_of_it_learns(small):
    small.train()
    for layer in (small.sharp.taken[1], small.sharp.alike):  # zero at first: what is before them learns a step later
        torch.nn.init.normal_(layer.weight, std=0.1)
    images = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    ids = torch.tensor([small.tokenizer("pick up")["input_ids"]]).expand(2, -1)
    out = small(images, ids, ids > 0)
    logits = small.vlm.lm_head(out.raw_BLND[:, -1])
    assert logits.shape == (2, 32, len(small.tokenizer))
    (out.points_BQE.sum() + out.queries_BLQD.square().sum() + logits.logsumexp(-1).sum()).backward()
    silent = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["vlm.model.language_model.embed_tokens.weight"], (
        "the words stay where the language model has them"
    )


def test_words_are_heard_with_noise_while_it_learns_and_only_then(small):
    ids = torch.tensor([[3, 4]])
    words = small.vlm.get_input_embeddings()
    small.train()
    assert not torch.equal(words(ids), words(ids))
    with torch.no_grad():
        assert torch.equal(words(ids), words(ids)), "a frozen backbone"
    small.eval()
    assert torch.equal(words(ids), words(ids))


def test_a_word_is_misheard_alike_throughout_an_episode_and_nowhere_else(small):
    ids = torch.tensor([[3, 4, 3]]).expand(3, -1)
    table = small.vlm.get_input_embeddings()
    with torch.no_grad():
        words = table.misheard(ids, 1.0, torch.tensor([7, 7, 8])) - table(ids)
        again = table.misheard(ids[:1], 1.0, torch.tensor([7])) - table(ids[:1])
        twice = table.misheard(ids[:1], 2.0, torch.tensor([7])) - table(ids[:1])
    assert torch.equal(words[0], words[1]) and torch.allclose(words[0], again[0], atol=1e-5)
    assert not torch.allclose(words[0], words[2]) and not torch.allclose(words[0, 0], words[0, 1])
    assert torch.allclose(words[0, 0], words[0, 2]), "the same word twice in a sentence"
    assert torch.allclose(twice, 2 * again, atol=1e-5) and again.abs().max() > 0

    plain = seen(small)
    with mishearing(small, (1.0, torch.tensor([7, 8]))):
        noisy = seen(small)
    assert torch.equal(noisy.raw_BLND, plain.raw_BLND), "the picture comes before the words"
    assert not torch.allclose(noisy.queries_BLQD, plain.queries_BLQD)
    with mishearing(small, (0.0, torch.tensor([7, 8]))):
        assert torch.equal(seen(small).queries_BLQD, plain.queries_BLQD)
    with pytest.raises(RuntimeError), mishearing(small, (1.0, torch.tensor([7, 8]))):
        raise RuntimeError
    assert torch.equal(seen(small).queries_BLQD, plain.queries_BLQD), "afterwards, and after an error"


def test_some_words_are_heard_as_another_one_that_means_the_same():
    torch.manual_seed(0)
    table = WordTable(500, 6, 6, meaning=2)
    table.widen = torch.nn.Identity()
    ids = torch.arange(500)[:, None]
    with torch.no_grad():
        table.weight.mul_(100)  # the noise, of sizes near 1, does not hide another word
        own = table.weight[:, None]
    heard = table.train()(ids)
    misheard = table.misheard(ids, 0.0, torch.zeros(500, dtype=torch.int64))
    for rows in (heard, misheard):
        elsewhere = (rows - own)[..., :4].abs().amax(-1) > 20
        assert 0.1 < elsewhere.float().mean() < 0.2
        assert ((rows - own)[..., 4:].abs() < 20).all(), "what it means stays"
    assert torch.equal(misheard, table.misheard(ids, 0.0, torch.zeros(500, dtype=torch.int64)))
    assert not torch.equal(misheard, table.misheard(ids, 0.0, torch.ones(500, dtype=torch.int64))), "another episode"
    with torch.no_grad():
        assert torch.equal(table.eval()(ids), own)


def test_a_backbone_without_noise_on_its_words_says_so():
    backbone = load_backbone("tiny")
    with (
        pytest.raises(ValueError, match="word_noise is for the backbone 'small'"),
        mishearing(backbone, (1.0, torch.zeros(1))),
    ):
        pass
    with mishearing(backbone, (0.0, torch.zeros(1))):
        pass


def test_words_start_where_the_language_model_has_them():
    try:
        weights_file()
    except ValueError:
        pytest.skip("needs the extra smollm")
    names = ("red", "vermilion", "blue", "navy", "grab", "take", "fetch", "plate", "bowl", "drawer")
    table, tokenizer = word_vectors(12, only=names)
    assert table.shape == (len(tokenizer), 12) and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
    token = {word: k for k, word in whole_words(tokenizer).items() if word in names}
    assert set(token) == set(names) and len(whole_words(tokenizer)) > 25_000
    assert "vermilion" in more_words() and len(tokenizer("two vermilion cups")["input_ids"]) == 3
    rows = torch.nn.functional.normalize(table[torch.tensor([token[name] for name in names]), 4:], dim=1)
    kinds = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    alike = rows @ rows.T
    same = (kinds[:, None] == kinds) & ~torch.eye(len(names), dtype=torch.bool)
    assert alike[same].mean() > alike[kinds[:, None] != kinds].mean() + 0.1
    first, second = tokenizer("grab grab")["input_ids"]
    assert first == second, "the first word is spelled like any other"
    assert np.isclose(table[:, :4].square().mean(), 1.0, atol=0.05)


def test_the_shipped_words_spell_every_text_and_know_those_of_the_list():
    tokenizer = load_backbone("small").tokenizer
    for text in ("pick up teh größe 好 🙂", "PICK UP", "x<y", "aquamarine/teal", "\u00e9\u0301"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).removeprefix(" ") == text
    found = set(whole_words(tokenizer).values())
    assert set(more_words()) <= found
    spelled = [len(ids) for ids in tokenizer(sorted(found))["input_ids"]]
    assert max(spelled) == 1


def test_a_pretraining_that_was_stopped_goes_on_to_the_same(small, tmp_path):
    """Stopped after its second checkpoint and resumed, it ends with the weights of a run that was left alone."""
    data = write_set(tmp_path / "set", 24)
    small.save(tmp_path / "untrained")
    config = PretrainConfig(minutes=60, max_steps=5, batch_scenes=4, num_processes=1, holdout=8, save_every=2)
    initial = tmp_path / "untrained"

    def weights(out):
        return load_file(tmp_path / out / "model.safetensors")

    pretrain(config, data, tmp_path / "whole", initial=initial)

    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, data, tmp_path / "parts", initial=initial, on_step=stop)
    with pytest.raises(ValueError, match="--resume"):
        pretrain(config, data, tmp_path / "parts", initial=initial)
    steps = []
    done = pretrain(
        config, data, tmp_path / "parts", initial=initial, resume=True, on_step=lambda r: steps.append(r["step"])
    )
    assert steps == [5] and done["steps"] == 5
    whole, parts = weights("whole"), weights("parts")
    assert whole.keys() == parts.keys() and not any("running_mean" in name for name in whole)  # folded
    assert all(torch.allclose(whole[name].float(), parts[name].float(), atol=2e-3) for name in whole)
    with pytest.raises(ValueError, match="finished backbone"):
        pretrain(config, data, tmp_path / "parts", initial=initial, resume=True)
