"""Overlapping multi-scale convolutions: pictures -> features at strides 4, 8 and 16, the shape of MobileNetV2.

The layers are those of MobileNetV2 (Sandler et al. 2018) up to stride 16, with its names, so that weights trained on
ImageNet can be read into them. Once trained, batch normalisation is folded into the convolutions (`Stem.fold`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (24, 32, 96)
"""Channels of the features at strides 4, 8 and 16."""
STRIDES = (4, 8, 16)
_PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
"""MobileNetV2's table up to stride 16: expansion, channels, blocks, stride of the first block."""
_TAPS = (3, 6, 13)
"""The blocks whose outputs are read."""

FINE_CHANNELS = sum(CHANNELS)
"""Channels of `fine_features`."""

Taps = tuple[Tensor, Tensor, Tensor]


class Stem(nn.Module):
    """Pictures (M, 3, S, S), normalised as for ImageNet -> features at three scales: see `CHANNELS`."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_convolution(3, 32, 3, stride=2)]
        width = 32
        for expansion, channels, count, stride in _PLAN:
            for k in range(count):
                blocks.append(_Block(width, channels, stride if k == 0 else 1, expansion))
                width = channels
        self.features = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> Taps:
        """Features (M, C, S / stride, S / stride) at strides 4, 8 and 16."""
        x, found = pixels.contiguous(memory_format=torch.channels_last), []
        for number, block in enumerate(self.features):
            x = block(x)
            if number in _TAPS:
                found.append(x)
        fine, middle, coarse = found
        return fine, middle, coarse

    def read_imagenet(self, weights: Mapping[str, Tensor]) -> None:
        """Take over a MobileNetV2's weights by name; its layers beyond stride 16 are left out. ValueError if they do
        not fit."""
        kept = {name: weights[name] for name in self.state_dict() if name in weights}
        missing = self.state_dict().keys() - kept.keys()
        if missing:
            raise ValueError(f"these are no weights of MobileNetV2: {min(missing)} is missing")
        self.load_state_dict(kept)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply every batch normalisation into the convolution before it. Nothing changes in evaluation mode."""
        for parent in [module for module in self.modules() if isinstance(module, nn.Sequential)]:
            for k in range(len(parent) - 1):
                conv, norm = parent[k], parent[k + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    parent[k], parent[k + 1] = _folded(conv, norm), nn.Identity()


class _Block(nn.Module):
    """MobileNetV2's inverted residual: widen, convolve each channel by itself, narrow without a nonlinearity."""

    def __init__(self, width: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.shortcut = stride == 1 and width == channels
        hidden = width * expansion
        widen = _layers(width, hidden, 1) if expansion > 1 else []
        depthwise = _layers(hidden, hidden, 3, stride=stride, groups=hidden)
        narrow = [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*widen, *depthwise, *narrow)

    def forward(self, x: Tensor) -> Tensor:
        """Features (M, C, H, W)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


def fine_features(taps: Taps) -> Tensor:
    """Features (M, `FINE_CHANNELS`, S / 4, S / 4): the coarser ones repeated."""
    fine = taps[0]
    coarser = [F.interpolate(tap, size=fine.shape[-2:], mode="nearest") for tap in taps[1:]]
    return torch.cat([fine, *coarser], 1)


def _layers(width: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(width, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]


def _convolution(width: int, channels: int, kernel: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(*_layers(width, channels, kernel, stride=stride))


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    assert isinstance(conv.padding, tuple) and norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    out = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
    )
    out.weight.copy_(conv.weight * scale[:, None, None, None])
    assert out.bias is not None
    out.bias.copy_(norm.bias - norm.running_mean * scale)
    return out.to(conv.weight.device, conv.weight.dtype)
