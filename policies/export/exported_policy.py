"""Exported policies: one graph for onnxruntime or torch, with its processor, statistics and tokenizer. No transformers.

An ONNX policy needs numpy, onnxruntime and tokenizers only. `policies.export.exporter` writes what is read here.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.core.checkpoint import CONFIG, STATS, checkpoint_files, read_config, reading_config
from vla.core.config import decode
from vla.core.types import ActionChunk, Observation, Prefix
from vla.model.config import MemoryConfig
from vla.model.memory.recall import EpisodeMemory
from vla.processing.batch import ModelInput
from vla.processing.cameras.camera_map import CameraMap
from vla.processing.preprocess import Preprocessor, ProcessorConfig
from vla.processing.stats import Stats
from vla.runtime.locks import refuse_foreign
from vla.runtime.machine import half_of_the_cores

Format = Literal["onnx", "torch", "aoti"]
Precision = Literal["float32", "bfloat16", "int8"]
Graph = Callable[[dict[str, NDArray]], list[NDArray]]
"""Inputs by name, in the order of `INPUTS` -> normalised actions (B, C, A); of a policy that remembers also the rows to
keep of these decisions (B, K) and the keys of their frames (B, S)."""
GRAPHS: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2", "aoti": "model.aoti.pt2"}
TOKENIZER = "tokenizer/tokenizer.json"
INPUTS = ("images", "token_ids", "token_mask", "proprio", "depth", "intrinsics", "extrinsics")
"""Input names of exported graphs, in the order of `ModelInput`'s fields; the last three of policies that read depth."""
MEMORY = "memory"
"""The input after them, of policies that remember: rows of earlier decisions (B, M, K + 1)."""


@dataclass(frozen=True)
class Parity:
    """The error of an exported graph against the model it came from: random observations, normalised actions."""

    observations: int
    max_error: float
    mean_error: float


@dataclass(frozen=True)
class ExportConfig:
    """The entry "export" of an exported folder's `config.json`."""

    format: Format
    precision: Precision
    chunk_size: int
    n_action_steps: int
    parity: Parity
    """Errors against the model in float32."""
    source: str
    """SHA-256 of the weights that were exported."""
    processor: str | None = None
    """For "aoti": the CPU capability its machine code needs; None for other formats."""
    memory: MemoryConfig | None = None
    """Which earlier decisions it looks at again; None for a policy that remembers none."""
    row_width: int = 0
    """K, numbers kept of a decision."""


class FileTokenizer:
    """A tokenizer.json read by the `tokenizers` library, called as Hugging Face's are."""

    def __init__(self, data: bytes, *, pad_token_id: int = 0) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_token_id = pad_token_id

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}


class ExportedPolicy:
    """A `vla.core.types.Policy` around an exported graph. Each observation decides alone, unless the policy remembers:
    then the memory of the episode in each environment is kept here, and `reset` clears it."""

    def __init__(self, config: ExportConfig, processor: Preprocessor, graph: Graph) -> None:
        self.config, self.processor = config, processor
        spec, memory = processor.policy_spec(config.chunk_size, config.n_action_steps), config.memory
        self.spec = spec if memory is None else replace(spec, memory_frames=memory.frames)
        self._memory = None if memory is None else EpisodeMemory(memory, config.n_action_steps)
        self._graph = graph

    @staticmethod
    def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> ExportedPolicy:
        """The policy in a folder that `vla export` wrote; its files are verified first.

        `threads` that one decision may use; None: half of the machine's cores, since a control loop needs some too.
        ValueError naming the file that is missing or changed.
        """
        whole, config, processor, graph = read_folder(folder, threads)
        if "heatmap" in whole:
            raise ValueError(f"{os.fspath(folder)} answers by heat-maps: `policies.load.load_policy` loads it")
        return ExportedPolicy(config, processor, graph)

    def look_through(self, cameras: CameraMap) -> None:
        """See `vla.processing.preprocess.Preprocessor.look_through`."""
        self.processor.look_through(cameras)
        self.spec = replace(self.spec, cameras=tuple(filter(None, self.processor.config.cameras)))

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget the episodes in these environments (all when None)."""
        if self._memory is not None:
            self._memory.reset(env_ids)

    def predict(self, obs: Observation) -> NDArray[np.float32]:
        """Normalised actions (B, chunk_size, action width) of the whole chunk. FloatingPointError if not finite."""
        inputs = feed(self.processor.arrays(obs).without_padding())
        if self._memory is None:
            (action,) = self._graph(inputs)
        else:
            envs = obs.environments
            recalled = self._memory.read(envs.tolist(), self.config.row_width)
            action, rows, keys = self._graph({**inputs, MEMORY: recalled})
            live = np.ones(len(envs), bool) if obs.live is None else obs.live
            self._memory.add(envs[live].tolist(), rows[live], keys[live])
        if not np.isfinite(action).all():
            raise FloatingPointError("the model's action is not finite: its weights or inputs are damaged")
        return action

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, chunk_size, A) in environment units."""
        return self.processor.unnormalise_action(self.predict(obs), obs.proprio)


def read_folder(
    folder: str | os.PathLike[str], threads: int | None
) -> tuple[dict[str, Any], ExportConfig, Preprocessor, Graph]:
    """The whole config.json of an exported folder, and what it holds. ValueError as `ExportedPolicy.load`."""
    whole = read_config(folder)
    if not is_exported(whole):
        raise ValueError(f"{os.fspath(folder)} is no exported policy: `vla export` makes one")
    with reading_config(folder):
        config = decode(ExportConfig, whole["export"])
        processor_config = decode(ProcessorConfig, whole["processor"])
    name = GRAPHS[config.format]
    files = {wanted: _read(folder, wanted) for wanted in (name, STATS, TOKENIZER)}
    stats = Stats.from_dict(json.loads(files[STATS]))
    tokenizer = FileTokenizer(files[TOKENIZER], pad_token_id=whole["pad_token_id"])
    with reading_config(folder):
        processor = Preprocessor(processor_config, stats, tokenizer)
    graph = load_graph(config, files[name], threads=threads or half_of_the_cores())
    return whole, config, processor, graph


def is_exported(config: dict[str, Any]) -> bool:
    """True if `config`, a folder's config.json, belongs to an exported policy."""
    return "export" in config


def refuse_others(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """ValueError if an export of `checkpoint` to `out` would overwrite it, or anything that is not an export."""
    if Path(checkpoint).resolve() == Path(out).resolve():
        raise ValueError(f"{os.fspath(out)} is the checkpoint itself: choose another --out")
    refuse_foreign(out)
    if (Path(out) / CONFIG).exists() and not is_exported(read_config(out)):
        raise ValueError(f"{os.fspath(out)} is a checkpoint: choose another --out")


def feed(inp: ModelInput[NDArray]) -> dict[str, NDArray[Any]]:
    """A graph's inputs by name."""
    return dict(zip(INPUTS, map(np.ascontiguousarray, inp.arrays), strict=False))


def load_graph(config: ExportConfig, data: bytes, *, threads: int) -> Graph:
    """The graph in an exported folder."""
    if config.format == "onnx":
        return onnx_graph(data, threads=threads)
    if config.format == "torch":
        return torch_graph(data, threads=threads)
    return aoti_graph(data, threads=threads, made_for=config.processor)


def onnx_graph(data: bytes, *, threads: int) -> Graph:
    """`data` of an ONNX file, run by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as problem:
        raise ValueError("an ONNX policy needs onnxruntime: pip install 'bascule[export]'") from problem
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait must sleep: a control loop shares these cores, and spinning would take them from it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def torch_graph(data: bytes, *, threads: int) -> Graph:
    """`data` of a torch.export package. `threads` hold for the whole process: torch has no others.

    Weights must lie in it as plain bytes: an archive that would be unpickled is refused. The graph itself is still
    code that torch runs; load it from where you would load a program.
    """
    _refuse_pickles(data)
    import torch

    with quietly():
        return _of_tensors(torch.export.load(io.BytesIO(data)).module(), threads=threads)


def aoti_graph(data: bytes, *, threads: int, made_for: str | None) -> Graph:
    """`data` of an AOTInductor package, whose code is for processors of the kind `made_for`; `threads` as above."""
    from policies.export.aot_inductor import load_package

    with quietly():
        return _of_tensors(load_package(data, made_for=made_for), threads=threads)


def _of_tensors(module: Callable[..., Any], *, threads: int) -> Graph:
    import torch

    torch.set_num_threads(threads)

    def run(inputs: dict[str, NDArray]) -> list[NDArray]:
        with torch.inference_mode():
            results = module(*map(torch.from_numpy, inputs.values()))
            return [result.numpy() for result in (results if isinstance(results, tuple | list) else (results,))]

    return run


@contextmanager
def quietly() -> Iterator[None]:
    """The exporters and their readers report every step, and warn of their own deprecations."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _refuse_pickles(data: bytes) -> None:
    """ValueError for a torch.export archive that holds anything pickled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                name = info.filename
                if name.endswith("_config.json") and b'"use_pickle": true' in archive.read(info):
                    raise ValueError(f"{GRAPHS['torch']} holds pickled tensors ({name}): export the policy again")
                legacy = name.endswith((".pt", ".pkl")) or "/custom_obj" in name
                if legacy and info.file_size:
                    raise ValueError(f"{GRAPHS['torch']} holds a pickle ({name}): export the policy again")
    except zipfile.BadZipFile as problem:
        raise ValueError(f"{GRAPHS['torch']} is not a torch.export package: {problem}") from None


def _read(folder: str | os.PathLike[str], name: str) -> bytes:
    files = checkpoint_files(folder, name)
    if name not in files:
        raise ValueError(f"{Path(folder) / name} is missing: run `vla export` again")
    return files[name]
