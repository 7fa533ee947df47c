"""LoRA on a backbone (Hu et al. 2021), through `peft`: small matrices learn, the weights under them stand still.

A checkpoint in training holds the adapters; `merge_lora` adds them into the weights, and what remains is a plain
policy: that is what `VLA.load` gives to everyone but the trainer.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # imported where it is used: LoRAConfig is read without torch
    from torch import nn


@dataclass(frozen=True)
class LoRAConfig:
    """Which of a backbone's matrices get an adapter, and its size."""

    rank: int = 16
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: Literal["decoder", "all"] = "decoder"
    """The language model's matrices, or the vision tower's and the projector's too."""
    train_fully: tuple[str, ...] = ("queries", "told", "pointer")
    """Parts of the backbone that are ours, not pre-trained weights to be spared: they train without an adapter."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.rank < 1 or not self.alpha > 0:
            return f"lora rank and alpha must be positive, got {self.rank} and {self.alpha}"
        if not 0 <= self.dropout < 1:
            return f"lora dropout must be in [0, 1), got {self.dropout}"
        return None


_NOT_THE_DECODER = ("vision", "visual", "projector", "connector", "patch")


def lora_targets(backbone: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers that get an adapter. Never a word embedding's transpose (tied output layer)."""
    from torch import nn

    words = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    names = []
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.Linear) or id(module.weight) in words or name.endswith("lm_head"):
            continue
        if name.split(".")[0] in config.train_fully:
            continue
        if config.targets == "decoder" and any(part in name for part in _NOT_THE_DECODER):
            continue
        names.append(name)
    if not names:
        raise ValueError("this backbone has no linear layer for a LoRA adapter; use lora.targets 'all', or no lora")
    return names


def add_lora(backbone: nn.Module, config: LoRAConfig) -> None:
    """Put adapters into `backbone`, in place. They start at zero effect; they and `train_fully` are what trains."""
    if problem := config.problem():
        raise ValueError(problem)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("LoRA needs the package 'peft': install bascule[train]") from None
    if importlib.util.find_spec("torch.distributed.tensor") is not None:
        importlib.import_module("torch.distributed.tensor")  # peft takes it for imported, and torch does so late
    inject_adapter_in_model(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=lora_targets(backbone, config),
        ),
        backbone,
    )
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name.split(".")[0] in config.train_fully)


def merge_lora(backbone: nn.Module) -> None:
    """Add every adapter into the weight under it and take it away, in place. Nothing happens where there is none."""
    adapted = [name for name, module in backbone.named_modules() if hasattr(module, "lora_A")]
    for name in adapted:
        parent_name, _, child = name.rpartition(".")
        parent = backbone.get_submodule(parent_name)
        layer = getattr(parent, child)
        layer.merge(safe_merge=True)
        setattr(parent, child, layer.get_base_layer())
    for attribute in ("peft_config",):  # left on the module by peft; it would say that adapters are there
        if adapted and hasattr(backbone, attribute):
            delattr(backbone, attribute)
