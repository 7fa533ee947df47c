"""`vla export` of a policy that answers by heat-maps: a look as one graph, held to the model on random views."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from policies.export.aot_inductor import processor as processor_kind
from policies.export.exported_policy import GRAPHS, ExportConfig, Format, Precision
from policies.export.exporter import checked, parity_of, random_instruction, standalone
from policies.export.graphs import MAX_BATCH, Network, write
from policies.export.heatmap_policy import KEY, LOOK_INPUTS, LOOK_OUTPUTS
from vla.core.checkpoint import MODEL, read_config, save_files
from vla.core.config import encode
from vla.model.heatmap.config import VIEWS
from vla.model.heatmap.model import HeatmapModel
from vla.model.heatmap.policy import HeatmapPolicy
from vla.model.heatmap.volume import log_volume
from vla.processing.batch import trimmed_text
from vla.processing.preprocess import Preprocessor
from vla.processing.text import made_up


class Look(nn.Module):
    """The exported module: from views to where the hand should go."""

    def __init__(self, model: HeatmapModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs in the order of `LOOK_OUTPUTS`, for inputs in the order of `LOOK_INPUTS`."""
        return self.model.answer(*inputs)


def export_heatmap(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    precision: Precision = "float32",
    n_action_steps: int | None = None,
    observations: int = 100,
    seed: int = 0,
) -> ExportConfig:
    """Write the policy in `checkpoint` to the folder `out`, checked on so many random looks, as
    `policies.export.exporter.export` does. ValueError for what cannot be exported so.

    The error is that of the heat-maps' logits, of the verdicts where graph and model find the same place, and, where
    they do not, by how much the graph's is less likely by the model's own heat-maps.
    """
    tokenizer_files = checked(checkpoint, out, format=format, precision=precision, observations=observations)
    if precision == "bfloat16":
        raise ValueError("a policy with heat-maps is exported in float32 or, as onnx, in int8: leave --precision out")
    policy = HeatmapPolicy.load(checkpoint)
    chunk_size = policy.spec.chunk_size
    if n_action_steps not in (None, chunk_size):
        raise ValueError(
            f"a policy with heat-maps executes its chunks whole: leave --n-action-steps out ({chunk_size})"
        )
    processor, pad = standalone(policy.processor, tokenizer_files)
    look = Look(policy.model).eval()
    data, graph = write(_network(policy, look), format, precision)
    errors = []
    with made_up(), torch.no_grad():
        for inputs in _random_looks(policy, processor, observations, seed=seed):
            heat, place, verdicts = (part.numpy() for part in look(*map(torch.from_numpy, inputs)))
            found = graph(dict(zip(LOOK_INPUTS, inputs, strict=True)))
            errors.append(_errors(heat, place, verdicts, *found, inputs[-2], inputs[-1]))
    parity = parity_of(errors, precision)
    config = ExportConfig(
        format=format, precision=precision, chunk_size=chunk_size, n_action_steps=chunk_size, parity=parity,
        source=read_config(checkpoint)["checkpoint"]["files"][MODEL],
        processor=processor_kind() if format == "aoti" else None,
    )  # fmt: skip
    save_files(
        out,
        config={
            "export": encode(config), KEY: encode(policy.model.config), "processor": encode(processor.config),
            "pad_token_id": pad,
        },
        stats=processor.stats.to_dict(),
        files={GRAPHS[format]: data, **tokenizer_files},
    )  # fmt: skip
    return config


def _network(policy: HeatmapPolicy, look: Look) -> Network:
    """A look, for any batch and any length of the instruction."""
    limit = policy.processor.text_limit
    batch, text, length = Dim("batch", min=1, max=MAX_BATCH), Dim("text", min=1, max=limit), min(7, limit)
    side = policy.model.config.workspace.resolution
    example = (
        torch.zeros(2, len(VIEWS), side, side, 3, dtype=torch.uint8),
        torch.zeros(2, length, dtype=torch.int64),
        torch.ones(2, length, dtype=torch.bool),
        torch.zeros(2, 3),
        torch.zeros(2, policy.model.state_dim),
        torch.zeros(2, 3),
        torch.ones(2),
    )
    shapes = ({0: batch}, {0: batch, 1: text}, {0: batch, 1: text}, *({0: batch},) * 4)
    return Network(look, example, shapes, LOOK_INPUTS, LOOK_OUTPUTS)


def _random_looks(
    policy: HeatmapPolicy, processor: Preprocessor, count: int, *, seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Inputs of so many single looks, whole and zoomed: coarse noise as views, words as instructions, a hand
    somewhere in the workspace."""
    rng = np.random.default_rng(seed)
    workspace = policy.model.config.workspace
    side = workspace.resolution
    for index in range(count):
        cells = rng.integers(0, 256, (1, len(VIEWS), 12, 12, 3), dtype=np.uint8)
        at = np.arange(side) * 12 // side
        views = cells[:, :, at[:, None], at]
        words = trimmed_text(*processor.token_arrays([random_instruction(processor, rng)]))
        half = workspace.half_m / (workspace.zoom if index % 2 else 1.0)
        hand, centre = (np.array(workspace.centre_m) + rng.uniform(-1, 1, (2, 1, 3)) * workspace.half_m).astype(
            np.float32
        )
        state = rng.uniform(-1.2, 1.2, (1, policy.model.state_dim)).astype(np.float32)
        yield tuple(map(np.ascontiguousarray, (views, *words, hand, state, centre, np.full(1, half, np.float32))))


def _errors(
    heat: np.ndarray, place: np.ndarray, verdicts: np.ndarray, heat_2: np.ndarray, place_2: np.ndarray,
    verdicts_2: np.ndarray, centre: np.ndarray, half: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Differences of one look's outputs, as `export_heatmap` judges them."""
    apart = np.abs(heat - heat_2).ravel()
    if np.abs(place - place_2).max() < 1e-5:
        return np.concatenate([apart, np.abs(verdicts - verdicts_2).ravel()])
    volume = log_volume(torch.from_numpy(heat).flatten(2).softmax(-1).view(heat.shape))[0].numpy()
    cell = np.floor((place_2 - centre + half[:, None]) / (2 * half[:, None]) * heat.shape[-1]).astype(int)[0]
    return np.append(apart, volume.max() - volume[tuple(cell)])
