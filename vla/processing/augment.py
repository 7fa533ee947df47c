"""Image augmentation: random zoom and shift, colours, textures laid over, blur. Batched, on the images' device.

What is drawn follows from (seed, step) alone and is drawn on the CPU, so a resumed run, another device or a batch
spread over processes sees the same pictures. The whole picture is among the zooms: evaluation needs no crop of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.processing.config import AugmentConfig

_DRAWS, _MORE = 7, 18
_WAVES = 3
_REACH = 3
"""How many standard deviations of its blur a picture is averaged over."""


def draw_augmentation(batch_size: int, views: int, seed: int) -> Tensor:
    """(B, V, 25) uniform numbers in [-1, 1): what `augment` does with each picture."""
    generator = torch.Generator().manual_seed(seed)
    # One after the other: the first are what they were before textures and blur were added.
    drawn = [torch.rand(batch_size, views, count, generator=generator) for count in (_DRAWS, _MORE)]
    return torch.cat(drawn, -1) * 2 - 1


def augment(images_BVHWC: Tensor, draws_BVN: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (B, V, H, W, 3) -> the same, changed as `draws_BVN` says. All-zero strengths change nothing."""
    b, v, h, w, _ = images_BVHWC.shape
    draws = draws_BVN.to(images_BVHWC.device).flatten(0, 1)
    zoom, x, y, bright, contrast, saturation, hue = draws[:, :_DRAWS].unbind(1)
    more = draws[:, _DRAWS:]
    pixels = images_BVHWC.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    if config.crop < 1:
        side = 1 - (1 - config.crop) * (zoom + 1) / 2
        zero = torch.zeros_like(side)
        frame = torch.stack([side, zero, x * (1 - side), zero, side, y * (1 - side)], 1).view(-1, 2, 3)
        grid = F.affine_grid(frame, [b * v, 3, h, w], align_corners=False)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    pixels = _colours(pixels, bright, contrast, saturation, hue, config)
    if config.overlay > 0:
        share = config.overlay * (more[:, 0] + 1)[:, None, None, None] / 2
        pixels = pixels + share * (_textures(more[:, 2:], h, w) - pixels)
    if config.blur > 0:
        pixels = _blurred(pixels, config.blur * max(h, w) * (more[:, 1] + 1) / 2)
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


def _textures(draws_M16: Tensor, height: int, width: int) -> Tensor:
    """Smooth coloured patterns (M, 3, H, W) in 0..1: where waves of random directions add up to more than nothing, one
    colour, elsewhere the other."""
    y = torch.linspace(0, 1, height, device=draws_M16.device)[:, None]
    x = torch.linspace(0, 1, width, device=draws_M16.device)
    waves = draws_M16[:, : 3 * _WAVES].unflatten(1, (_WAVES, 3))
    angle, pace, phase = (part[..., None, None] for part in (math.pi * waves).unbind(-1))
    along = x * torch.cos(angle) + y * torch.sin(angle)
    level = torch.sigmoid(3 * torch.sin((8 + 2 * pace) * math.pi * along + phase).sum(1, keepdim=True))
    one, other = (draws_M16[:, 3 * _WAVES :][:, k : k + 3, None, None] / 2 + 0.5 for k in (0, 3))
    return level * one + (1 - level) * other


def _blurred(pixels: Tensor, deviation_M: Tensor) -> Tensor:
    """Each picture (M, 3, H, W) under a Gaussian of its own standard deviation, px."""
    m, channels, height, width = pixels.shape
    reach = min(math.ceil(_REACH * float(deviation_M.max())), height - 1, width - 1)
    if reach < 1:
        return pixels
    steps = torch.arange(-reach, reach + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = torch.exp(-0.5 * (steps / deviation_M.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(pixels.reshape(1, m * channels, height, width), (reach,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=m * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=m * channels)
    return flat.view(m, channels, height, width)
