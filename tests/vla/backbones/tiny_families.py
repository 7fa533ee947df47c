"""Tiny random checkpoints of every family, written by `save_pretrained` as their makers would, and their own inputs."""

from __future__ import annotations

import numpy as np
import torch
import transformers as hf
from PIL import Image

from vla.backbones.prismatic import PrismaticConfig, PrismaticForConditionalGeneration
from vla.backbones.tiny import train_tokenizer

WORDS = "pick up the red cube and put it on the blue plate"
MARKERS = ("<image>", "<fake_token_around_image>", "<global-img>", "<img>", "</img>", "<vs>", "<ve>", "<bos>")
LAYERS = 3

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
SIGLIP = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
)


def make_tokenizer(bos: bool = False):
    tokenizer = train_tokenizer([WORDS] * 40, vocab_size=400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    if bos:
        from tokenizers.processors import TemplateProcessing

        first = tokenizer.convert_tokens_to_ids("<bos>")
        tokenizer.bos_token = "<bos>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", first)]
        )
    return tokenizer


def _rope(kind: str = "default", **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


def _llava(text, ids, vision, **more):
    return hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ids["<image>"], image_token_id=ids["<image>"], **more
    )


def config_of(family: str, vocab_size: int, ids: dict[str, int]):
    text = dict(TEXT, vocab_size=vocab_size, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    image = ids["<image>"]
    if family == "llava":
        vision = hf.CLIPVisionConfig(**{**SIGLIP, "num_hidden_layers": 3}, projection_dim=24)
        return _llava(hf.LlamaConfig(**text), ids, vision)
    if family == "llava-siglip":
        return _llava(
            hf.Qwen2Config(**text),
            ids,
            hf.SiglipVisionConfig(**SIGLIP),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    if family in ("smolvlm", "idefics3"):
        kind = {"smolvlm": hf.SmolVLMConfig, "idefics3": hf.Idefics3Config}[family]
        vision = {**SIGLIP, "image_size": 64, "patch_size": 8}
        return kind(
            vision_config=vision,
            text_config=hf.LlamaConfig(**text),
            image_token_id=image,
            scale_factor=2,
            pad_token_id=0,
        )
    markers = dict(image_token_id=image, video_token_id=1, vision_start_token_id=ids["<vs>"])
    markers["vision_end_token_id"] = ids["<ve>"]
    if family == "qwen2_5_vl":
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=14)
        vision |= dict(spatial_merge_size=2, window_size=56, fullatt_block_indexes=[1])
        text["rope_parameters"] = _rope(mrope_section=[1, 1, 2])
        return hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **markers)
    if family == "qwen3_vl":
        vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=14)
        vision |= dict(spatial_merge_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
        text["rope_parameters"] = _rope(mrope_section=[2, 1, 1], mrope_interleaved=True)
        return hf.Qwen3VLConfig(vision_config=vision, text_config=text, **markers)
    if family in ("paligemma", "paligemma2"):
        kind = {"paligemma": hf.GemmaConfig, "paligemma2": hf.Gemma2Config}[family]
        if family == "paligemma2":
            text["sliding_window"] = 20
        return hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**SIGLIP, vision_use_head=False, projection_dim=32),
            text_config=kind(**text),
            image_token_index=image,
            projection_dim=32,
        )
    if family == "gemma3":
        text |= dict(sliding_window=20, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
        return hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
            text_config=hf.Gemma3TextConfig(**text),
            mm_tokens_per_image=4,
            image_token_index=image,
            boi_token_index=ids["<vs>"],
            eoi_token_index=ids["<ve>"],
        )
    if family == "internvl":
        vision = hf.InternVLVisionConfig(**{**SIGLIP, "image_size": [56, 56], "patch_size": [14, 14]})
        return hf.InternVLConfig(
            vision_config=vision, text_config=hf.Qwen2Config(**text), image_token_id=image, downsample_ratio=0.5
        )
    if family == "prismatic":
        dino = dict(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
        )
        return PrismaticConfig(
            hf.Dinov2WithRegistersConfig(**dino, num_register_tokens=4),
            hf.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
            hf.Qwen2Config(**text),
        )
    raise AssertionError(family)


MODELS = {
    "llava": hf.LlavaForConditionalGeneration,
    "llava-siglip": hf.LlavaForConditionalGeneration,
    "smolvlm": hf.SmolVLMForConditionalGeneration,
    "idefics3": hf.Idefics3ForConditionalGeneration,
    "qwen2_5_vl": hf.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": hf.Qwen3VLForConditionalGeneration,
    "paligemma": hf.PaliGemmaForConditionalGeneration,
    "paligemma2": hf.PaliGemmaForConditionalGeneration,
    "gemma3": hf.Gemma3ForConditionalGeneration,
    "internvl": hf.InternVLForConditionalGeneration,
    "prismatic": PrismaticForConditionalGeneration,
}
PROCESSORS = {
    "llava": hf.CLIPImageProcessor,
    "llava-siglip": hf.SiglipImageProcessor,
    "smolvlm": hf.SmolVLMImageProcessor,
    "idefics3": hf.Idefics3ImageProcessor,
    "qwen2_5_vl": hf.Qwen2VLImageProcessor,
    "qwen3_vl": hf.Qwen2VLImageProcessor,
    "paligemma": hf.SiglipImageProcessor,
    "paligemma2": hf.SiglipImageProcessor,
    "gemma3": hf.Gemma3ImageProcessor,
    "internvl": hf.GotOcr2ImageProcessor,
}
"""Prismatic's pixels have no class in the library."""
BOS = ("llava", "paligemma", "paligemma2", "gemma3")


def write_checkpoint(family: str, folder):
    """A folder as on the hub, random weights large enough that every mistake shows."""
    tokenizer = make_tokenizer(bos=family in BOS)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in MARKERS}
    torch.manual_seed(0)
    model = MODELS[family](config_of(family, len(tokenizer), ids)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if "embed" in name else parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family in PROCESSORS:
        options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
        PROCESSORS[family](**options).save_pretrained(folder)
    return folder


def own_pixels(family: str, images: np.ndarray, folder) -> dict[str, torch.Tensor]:
    """The library's own preprocessing of images (M, S, S, 3) that have the right size already."""
    pictures = [Image.fromarray(image) for image in images]
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    options = {"do_resize": False, "return_tensors": "pt"}
    if family in ("smolvlm", "idefics3"):
        # one row of pictures: one observation
        options["max_image_size"] = {"longest_edge": images.shape[1]}
        out = processor([pictures], do_image_splitting=False, do_pad=False, **options)
        return {"pixel_values": out["pixel_values"]}
    if family in ("qwen2_5_vl", "qwen3_vl"):
        out = processor(pictures, patch_size=14, **options)
        return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}
    if family == "llava":
        options["do_center_crop"] = False
    return {"pixel_values": processor(pictures, **options)["pixel_values"]}
