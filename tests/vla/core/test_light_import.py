"""A policy's start leaves out what `transformers` imports and never calls; nothing that was left out is missing later.
`vla bench startup` has the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

LOAD = """
import sys
from vla.backbones.hub import load
backbone = load("tiny")
heavy = {"scipy.optimize", "torch._dynamo", "sympy", "triton", "torchvision.models", "torchvision.ops", "torch.onnx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""

USE = """
import torch, torchvision, transformers
from scipy.optimize import linear_sum_assignment, minimize
from transformers import masking_utils
from transformers.loss import loss_for_object_detection
from torchvision.transforms.v2._geometry import box_iou

rows, columns = loss_for_object_detection.linear_sum_assignment([[1.0, 2.0], [0.0, 3.0]])
assert (list(rows), list(columns)) == ([0, 1], [1, 0]) and minimize and linear_sum_assignment
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.4).tolist() == [0]
assert box_iou(boxes, boxes)[0, 1] == 0.5
assert torchvision.models.resnet18 and torchvision.datasets.MNIST
try:
    torchvision.nothing
    raise SystemExit("torchvision has no such attribute")
except AttributeError as error:
    assert "nothing" in str(error)
assert "torch._dynamo" in sys.modules  # torchvision.ops imports it
with masking_utils.TransformGetItemToIndex():
    assert torch.arange(3)[torch.tensor(1)] == 1
"""

DECORATE = """
import sys, torch
from vla.backbones.light_import import light_import
compiled = []
with light_import():
    @torch.compiler.disable
    def by_hand(x):
        compiled.append(torch.compiler.is_compiling())
        return x + 1
    @torch.compiler.disable(recursive=False)
    def by_hand_too(x):
        compiled.append(torch.compiler.is_compiling())
        return x + 1
    @torch.compiler.allow_in_graph
    def whole(x):
        return x + 1
    disable = torch.compiler.disable
assert torch.compiler.disable is not disable
assert by_hand(1) == by_hand_too(1) == 2 and compiled == [False, False] and "torch._dynamo" not in sys.modules
out = torch.compile(lambda x: by_hand(by_hand_too(x)) * 2, backend="eager")(torch.zeros(2))
assert out.tolist() == [4.0, 4.0] and compiled == [False] * 4, compiled
from torch._dynamo import trace_rules
assert trace_rules.is_callable_allowed(whole)
"""

NAMES = """
import json, transformers
print(json.dumps(sorted(transformers._class_to_module.items())))
print(json.dumps([transformers.utils.is_torch_available(), transformers.utils.is_vision_available(),
    transformers.utils.import_utils._is_package_available("PIL", True),
    transformers.utils.import_utils._is_package_available("torch", True)]))
"""


def run(program: str) -> str:
    """Run `program` in a process of its own and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def light():
    """The words of a process that loaded a policy, told transformers' names and used what had been left out."""
    return run(LOAD + NAMES + USE)


def test_what_a_policy_leaves_out_is_there_when_it_is_used(light):
    assert light


def test_decorators_of_the_compiler_take_effect_when_it_is_imported():
    run(DECORATE)


def test_transformers_offers_the_same_names_from_the_same_modules(light):
    assert light == run(NAMES)
    assert len(json.loads(light.splitlines()[0])) > 1000
