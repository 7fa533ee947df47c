"""Networks as graphs: traced by torch.export, and written for onnxruntime, torch or AOTInductor."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from policies.export.aot_inductor import compile_package
from policies.export.aot_inductor import processor as processor_kind
from policies.export.exported_policy import (
    GRAPHS,
    Format,
    Graph,
    Precision,
    aoti_graph,
    onnx_graph,
    quietly,
    torch_graph,
)

OPSET = 20
MAX_BATCH = 4096
_ONNX_MAX_BYTES = 2**31 - 2**20  # protobuf's limit


@dataclass(frozen=True)
class Network:
    """A module with all that tracing it needs."""

    module: nn.Module
    example: tuple[Tensor, ...]
    shapes: tuple[dict[int, Any], ...]
    """For each input, its dimensions of any size (`torch.export.Dim`)."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def write(network: Network, format: Format, precision: Precision) -> tuple[bytes, Graph]:
    """The network's graph as a file, and as it will run from there. ValueError for what cannot be traced or written."""
    if format == "onnx":
        return _onnx(network, precision)
    return _torch(network) if format == "torch" else _aoti(network)


@torch.no_grad()
def trace(network: Network) -> ExportedProgram:
    """The network as a graph of tensor operations. ValueError for one that cannot be."""
    network.module.eval().requires_grad_(False)
    try:
        # Conditions on sizes that the tracer cannot prove (large VLMs' masks have some) are checked when it runs.
        return torch.export.export(
            network.module,
            network.example,
            dynamic_shapes={"inputs": network.shapes},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as problem:  # the tracer has many errors, each pages long
        reason = " ".join(str(problem).split())[:1000]
        raise ValueError(f"this backbone cannot be exported ({type(problem).__name__}): {reason}") from problem


def _onnx(network: Network, precision: Precision) -> tuple[bytes, Graph]:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as problem:
        raise ValueError(f"exporting to ONNX needs {problem.name}: pip install 'bascule[export]'") from problem
    weights = sum(parameter.nbytes for parameter in network.module.parameters())
    if weights > _ONNX_MAX_BYTES:
        raise ValueError(f"{weights / 2**30:.1f} GiB of weights do not fit into an ONNX file: use --format torch")
    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder, GRAPHS["onnx"])
        program = torch.onnx.export(
            trace(network),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
        if precision == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            model = onnx.load(path)
            del model.graph.value_info[:]  # the exporter's notes on shapes, some of which are wrong
            quantize_dynamic(model, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
        data = path.read_bytes()
    return data, onnx_graph(data, threads=1)


def _torch(network: Network) -> tuple[bytes, Graph]:
    with quietly():
        program = trace(network)
        program._example_inputs = None  # they would be pickled
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    data = buffer.getvalue()
    return data, torch_graph(data, threads=torch.get_num_threads())


def _aoti(network: Network) -> tuple[bytes, Graph]:
    with quietly():
        data = compile_package(trace(network))
    return data, aoti_graph(data, threads=torch.get_num_threads(), made_for=processor_kind())
