"""SmolVLA's architecture with random weights: what stands for its vision-language model where there is no model hub.

LeRobot builds SmolVLA around a folder with the model's configuration, image processor and tokenizer. Its published one
(SmolVLM2-500M) comes from a hub; here the folder is written with the same layers, the tokenizer of our own backbone,
and pictures in their own size instead of 512 pixels. What it learns then, it learns from the demonstrations alone.
"""

from __future__ import annotations

import os
from pathlib import Path

PICTURE, PATCH, MERGED = 96, 8, 2
"""Side of the pictures and of a patch in pixels; patches to a side that become one token. 36 tokens a picture."""
SIZES = {
    # SmolVLM2-500M's; LeRobot takes the first 16 of its layers of text.
    "published": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "text": {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5},
        "layers": 16,
    },
    "small": {
        "vision": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3},
        "text": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2},
        "layers": 4,
    },
}
_MARKERS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
}


def write_random_vlm(folder: Path, size: str) -> Path:
    """Write the folder that LeRobot's `vlm_model_name` takes, for a model of one of `SIZES`: no weights, which LeRobot
    then draws itself. A folder that is there is left as it is."""
    import transformers

    from vla.backbones.hub import load

    if (folder / "config.json").is_file():
        return folder
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=load("small").tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=_MARKERS,
    )  # fmt: skip
    parts = SIZES[size]
    text = transformers.LlamaConfig(
        **parts["text"], num_hidden_layers=parts["layers"], head_dim=64, vocab_size=len(words),
        max_position_embeddings=512, pad_token_id=words.pad_token_id, bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    config = transformers.SmolVLMConfig(
        vision_config={**parts["vision"], "image_size": PICTURE, "patch_size": PATCH}, text_config=text,
        image_token_id=words.convert_tokens_to_ids(_MARKERS["image_token"]), scale_factor=MERGED,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    config.save_pretrained(made)
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(), tokenizer=words,
        video_processor=transformers.SmolVLMVideoProcessor(),
    )  # fmt: skip
    processor.save_pretrained(made)
    os.replace(made, folder)
    return folder
