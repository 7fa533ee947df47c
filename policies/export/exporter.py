"""`vla export`: a checkpoint -> one graph, for onnxruntime or torch (traced, or compiled by AOTInductor), held to the
model on random observations.

The graph runs from raw pixels, token ids and normalised proprio to normalised actions, for any batch and any length of
the instruction: backbone, second look, bridge, head and the residual of online RL. Around it is
`vla.processing.preprocess`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from policies.export.aot_inductor import need_compiler
from policies.export.aot_inductor import processor as processor_kind
from policies.export.exported_policy import (
    GRAPHS,
    INPUTS,
    MEMORY,
    TOKENIZER,
    ExportConfig,
    ExportedPolicy,
    FileTokenizer,
    Format,
    Parity,
    Precision,
    refuse_others,
)
from policies.export.graphs import MAX_BATCH, Network, write
from vla.core.checkpoint import MODEL, checkpoint_files, read_config, save_files
from vla.core.config import encode
from vla.core.types import Observation
from vla.model.memory.recall import EpisodeMemory, nothing
from vla.model.memory.tokens import remembering
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.batch import ModelInput
from vla.processing.preprocess import Preprocessor
from vla.processing.processor import Processor
from vla.processing.text import made_up, read

MAX_ERROR = 1e-4
"""Largest error allowed in the normalised actions of a float32 export."""
_WORDS = "pick place put push stack lift move the a red green blue yellow cube ball bowl drawer left right on of it to"


class Decision(nn.Module):
    """The exported module: the network between preprocessing and unnormalisation."""

    def __init__(self, vla: VLA) -> None:
        super().__init__()
        self.vla = vla

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The normalised actions (B, C, A) for model inputs in the order of `INPUTS`, B rows each; with a memory as the
        last of them also what to keep of these decisions (`vla.model.memory.tokens.remembering`)."""
        vla, memory = self.vla, self.vla.config.memory
        if memory is None:
            inp = ModelInput(*inputs)
            return vla.act(vla.encode_as_is(inp), inp.proprio_BP)
        inp = ModelInput(*inputs[:-1])
        features, row, key = remembering(vla, vla.encode_as_is(inp), inp, inputs[-1])
        return vla.act(features, inp.proprio_BP), row, key


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    precision: Precision = "float32",
    member: str | None = None,
    n_action_steps: int | None = None,
    observations: int = 100,
    seed: int = 0,
) -> ExportConfig:
    """Write the policy in `checkpoint` to the folder `out`, checked on so many random observations.

    float32 must agree within `MAX_ERROR`, else RuntimeError and nothing is written; bfloat16 (torch, aoti) and int8
    (ONNX, weights quantised, activations at run time) are measured, not judged. ValueError for what cannot be exported.
    """
    tokenizer_files = checked(checkpoint, out, format=format, precision=precision, observations=observations)
    vla = VLA.load(checkpoint, member=member)
    if vla.pool is not None:
        raise ValueError(
            "an exported graph cannot keep a modulator for an episode: serve the checkpoint itself (`vla serve`)"
        )
    steps = VLAPolicy(vla, n_action_steps=n_action_steps).spec.n_action_steps
    vla.backbone_dtype = torch.float32
    processor, pad = standalone(vla.processor, tokenizer_files)
    samples = list(random_observations(processor, observations, seed=seed))
    with made_up():
        expected = list(_normalised(vla, samples, steps))
    if precision == "bfloat16":
        vla.backbone_dtype = torch.bfloat16
    data, graph = write(network_of(vla), format, precision)
    draft = ExportConfig(
        format=format,
        precision=precision,
        chunk_size=vla.chunk_size,
        n_action_steps=steps,
        parity=Parity(observations, 0.0, 0.0),
        source=read_config(checkpoint)["checkpoint"]["files"][MODEL],
        processor=processor_kind() if format == "aoti" else None,
        memory=vla.config.memory,
        row_width=0 if vla.config.memory is None else vla.bridge.memory.row_width,
    )
    policy = ExportedPolicy(draft, processor, graph)
    with made_up():
        errors = [np.abs(policy.predict(obs) - want) for obs, want in zip(samples, expected, strict=True)]
    parity = parity_of(errors, precision)
    config = ExportConfig(**{**vars(draft), "parity": parity})
    save_files(
        out,
        config={"export": encode(config), "processor": encode(processor.config), "pad_token_id": pad},
        stats=processor.stats.to_dict(),
        files={GRAPHS[format]: data, **tokenizer_files},
    )
    return config


def checked(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, format: Format, precision: Precision,
    observations: int,
) -> dict[str, bytes]:  # fmt: skip
    """The tokenizer's files, of a checkpoint that can be exported so as far as can be told without its weights;
    ValueError for another."""
    if precision == {"onnx": "bfloat16"}.get(format, "int8"):
        better = "torch" if precision == "bfloat16" else "onnx"
        raise ValueError(f"{precision} is not available as {format}: use --format {better}")
    if format == "aoti":
        need_compiler()  # said now, not after a minute of other work
    if observations < 1:
        raise ValueError(f"observations must be at least 1, got {observations}")
    tokenizer_files = checkpoint_files(checkpoint, TOKENIZER)
    if not tokenizer_files:
        raise ValueError(f"{os.fspath(checkpoint)} has no {TOKENIZER}: only fast tokenizers can be exported")
    refuse_others(checkpoint, out)
    return tokenizer_files


def parity_of(errors: Sequence[np.ndarray], precision: Precision) -> Parity:
    """The errors of all observations together. RuntimeError for a float32 graph that differs too much."""
    parity = Parity(len(errors), float(max(e.max() for e in errors)), float(np.mean([e.mean() for e in errors])))
    if precision == "float32" and not parity.max_error < MAX_ERROR:
        raise RuntimeError(
            f"the exported graph differs from the model by {parity.max_error:.1e} (limit {MAX_ERROR:.0e}): not written"
        )
    return parity


def standalone(processor: Processor, tokenizer_files: Mapping[str, bytes]) -> tuple[Preprocessor, int]:
    """The processor as an exported folder has it, and the id of padding."""
    # Its own tokenizer, not that of transformers: what will be used later is what is checked now.
    pad = int(getattr(processor.tokenizer, "pad_token_id", None) or 0)
    tokenizer = FileTokenizer(tokenizer_files[TOKENIZER], pad_token_id=pad)
    reads = replace(processor.config, max_text_tokens=processor.text_limit)  # no backbone will say it there
    return Preprocessor(reads, processor.stats, tokenizer), pad


def random_observations(processor: Preprocessor, count: int, *, seed: int) -> Iterator[Observation]:
    """So many single observations: noise as images (some of another size), words as instructions, proprio within and
    beyond its range."""
    rng = np.random.default_rng(seed)
    config = processor.config
    low, high = (np.array(values) for values in (processor.stats.proprio.min, processor.stats.proprio.max))
    for index in range(count):
        size = config.image_size if index % 4 else int(rng.integers(config.image_size // 2, 3 * config.image_size))
        images = {
            camera: rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for camera in config.cameras if camera
        }
        proprio = (low + (high - low) * rng.uniform(-0.2, 1.2, (1, config.proprio_dim))).astype(np.float32)
        views = _random_views(images, rng) if config.depth else {}
        yield Observation(images, proprio, [random_instruction(processor, rng)], **views)


def _random_views(images: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Depth and matrices of these cameras, each at random. A map has four depths, one in each quarter: where a query
    points is known up to rounding, and another pixel must not be another action."""
    depth, inner, outer = {}, {}, {}
    for camera, image in images.items():
        size = image.shape[1]
        quarters = rng.uniform(0.3, 1.5, (1, 2, 2))
        at = np.arange(size) * 2 // size
        depth[camera] = quarters[:, at[:, None], at].astype(np.float32)
        focal = size * rng.uniform(0.8, 1.5)
        inner[camera] = np.array([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]], np.float32)
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        turn *= np.linalg.det(turn)  # a rotation, not a mirror
        outer[camera] = np.eye(4, dtype=np.float32)[None]
        outer[camera][0, :3] = np.concatenate([turn, rng.uniform(-0.3, 0.3, (3, 1))], 1)
    return {"depth": depth, "intrinsics": inner, "extrinsics": outer}


def random_instruction(processor: Preprocessor, rng: np.random.Generator) -> str:
    """An instruction of up to 9 random words, shortened until it fits the policy's token limit."""
    text = [str(word) for word in rng.choice(_WORDS.split(), rng.integers(1, 10))]
    rule, limit = processor.config.text_rule, processor.text_limit
    while len(text) > 1 and read(" ".join(text), processor.tokenizer, rule=rule, limit=limit).cut_after is not None:
        text = text[:-1]
    return " ".join(text)


def _inputs(vla: VLA) -> tuple[str, ...]:
    """Input names of this policy's graph."""
    read = INPUTS if vla.processor.config.depth else INPUTS[:4]
    return read if vla.config.memory is None else (*read, MEMORY)


@torch.no_grad()
def _normalised(vla: VLA, samples: Sequence[Observation], steps: int) -> Iterator[np.ndarray]:
    """The model's actions (1, C, A) in these observations; to a policy that remembers they are one episode, with a
    decision every `steps` control steps."""
    memory = None if vla.config.memory is None else EpisodeMemory(vla.config.memory, steps)
    for obs in samples:
        inp = vla.processor.prepare(obs)
        features = vla.encode(inp)
        if memory is not None:
            recalled = torch.from_numpy(memory.read([0], vla.bridge.memory.row_width))
            features, row, key = remembering(vla, features, inp, recalled)
            memory.add([0], row.numpy(), key.numpy())
        yield vla.act(features, inp.proprio_BP).numpy()


def network_of(vla: VLA) -> Network:
    """The decision, for any batch and any length of the instruction."""
    config = vla.processor.config
    batch, text = Dim("batch", min=1, max=MAX_BATCH), Dim("text", min=1, max=vla.processor.text_limit)
    length = min(7, vla.processor.text_limit)
    views, size = len(config.cameras), config.image_size
    example = (
        torch.zeros(2, views, size, size, 3, dtype=torch.uint8),
        torch.zeros(2, length, dtype=torch.int64),
        torch.ones(2, length, dtype=torch.bool),
        torch.zeros(2, vla.processor.proprio_width),
    )
    shapes = [{0: batch}, {0: batch, 1: text}, {0: batch, 1: text}, {0: batch}]
    if config.depth:
        matrices = (torch.eye(side).expand(2, views, -1, -1).clone() for side in (3, 4))
        example = (*example, torch.ones(2, views, size, size), *matrices)
        shapes += [{0: batch}] * 3
    if vla.config.memory is not None:
        example = (*example, torch.from_numpy(nothing(vla.config.memory, 2, vla.bridge.memory.row_width)))
        shapes.append({0: batch})
    outputs = ("actions", "row", "key")[: 1 if vla.config.memory is None else 3]
    return Network(Decision(vla), example, tuple(shapes), _inputs(vla), outputs)
