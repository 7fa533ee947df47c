"""Image augmentation: random zoom and shift, brightness, contrast, saturation, hue. Batched, on the images' device.

What is drawn follows from (seed, step) alone and is drawn on the CPU, so a resumed run, another device or a batch
spread over processes sees the same pictures. The whole picture is among the zooms: evaluation needs no crop of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.processing.config import AugmentConfig

_DRAWS = 7


def draw_augmentation(batch_size: int, views: int, seed: int) -> Tensor:
    """(B, V, 7) uniform numbers in [-1, 1): what `augment` does with each picture."""
    return torch.rand(batch_size, views, _DRAWS, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def augment(images_BVHWC: Tensor, draws_BV7: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (B, V, H, W, 3) -> the same, changed as `draws_BV7` says. All-zero strengths change nothing."""
    b, v, h, w, _ = images_BVHWC.shape
    draws = draws_BV7.to(images_BVHWC.device).flatten(0, 1)
    zoom, x, y, bright, contrast, saturation, hue = draws.unbind(1)
    pixels = images_BVHWC.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    if config.crop < 1:
        side = 1 - (1 - config.crop) * (zoom + 1) / 2
        zero = torch.zeros_like(side)
        frame = torch.stack([side, zero, x * (1 - side), zero, side, y * (1 - side)], 1).view(-1, 2, 3)
        grid = F.affine_grid(frame, [b * v, 3, h, w], align_corners=False)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    pixels = _colours(pixels, bright, contrast, saturation, hue, config)
    pixels = pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).reshape(b, v, h, w, 3)


def _colours(
    pixels: Tensor, bright: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, config: AugmentConfig
) -> Tensor:
    """One affine map of RGB per picture: hue and saturation in YIQ (grey stays grey), contrast about the mean grey."""
    angle = 2 * math.pi * config.hue * hue
    scale = 1 + config.saturation * saturation
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    to_yiq = pixels.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    gain = (1 + config.contrast * contrast)[:, None, None, None]
    grey = torch.einsum("bchw,c->b", pixels, to_yiq[0])[:, None, None, None] / pixels[0, 0].numel()
    pixels = torch.einsum("bij,bjhw->bihw", matrix, pixels)
    return (pixels - grey) * gain + grey + config.brightness * bright[:, None, None, None]
