"""Perturbed sensors: noise, a shaking camera with motion blur, compressed pictures."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from envs.perturb.perturbation import Perturbation, axis_rng

Pictures = NDArray[np.uint8]

_PIXEL_NOISE, _PROPRIO_NOISE = 30.0, 0.01
_SHAKE, _BLUR = 0.035, 0.06
"""Largest shift of a picture and length of its blur at severity 1, as shares of its side."""
_BEST_QUALITY, _WORST_QUALITY = 60, 8
"""JPEG's, at severity 0+ and 1."""


def observed(perturbation: Perturbation, images: Pictures, seed: int, step: int) -> Pictures:
    """The images (..., H, W, 3) of control step `step` as the cameras report them; the same array at severity 0."""
    images = _shaken(perturbation, images, seed, step)
    images = _noisy(perturbation, images, seed, step)
    return _compressed(perturbation, images, seed)


def noisy_proprio(
    perturbation: Perturbation, proprio_P: NDArray[np.float32], seed: int, step: int
) -> NDArray[np.float32]:
    """One environment's proprio (P,) of control step `step` with Gaussian noise; the very same array at severity 0."""
    s = perturbation.severity("noise", seed)
    if s == 0.0:
        return proprio_P
    noise = axis_rng(seed, "noise", step, 1).normal(0.0, s * _PROPRIO_NOISE, proprio_P.shape)
    return (proprio_P + noise).astype(np.float32)


def _noisy(perturbation: Perturbation, images: Pictures, seed: int, step: int) -> Pictures:
    s = perturbation.severity("noise", seed)
    if s == 0.0:
        return images
    noise = axis_rng(seed, "noise", step, 0).normal(0.0, s * _PIXEL_NOISE, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def _shaken(perturbation: Perturbation, images: Pictures, seed: int, step: int) -> Pictures:
    """A camera that turns a little between steps moves its whole picture; while it turns, it blurs it along the way.

    Every camera swings about its place on a path of its own, the sum of two sines.
    """
    s = perturbation.severity("motion", seed)
    if s == 0.0:
        return images
    pictures = images.reshape(-1, *images.shape[-3:])
    out = np.empty_like(pictures)
    for view, picture in enumerate(pictures):
        rng = axis_rng(seed, "motion", view)
        speed, phase = rng.uniform(0.3, 1.3, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
        share = np.sin(speed * step + phase).mean(0)  # (right, down), -1..1
        heading = np.cos(speed * step + phase).mean(0)
        side = min(picture.shape[:2])
        out[view] = _moved(picture, s * _SHAKE * side * share, s * _BLUR * side * heading)
    return out.reshape(images.shape)


def _moved(picture: Pictures, shift: NDArray[np.float64], way: NDArray[np.float64]) -> Pictures:
    """The picture (H, W, 3) shifted by whole pixels (right, down), averaged over the points of `way` (pixels)."""
    steps = int(np.ceil(np.abs(way).max())) + 1
    total = np.zeros(picture.shape, np.float64)
    height, width = picture.shape[:2]
    for share in np.linspace(-0.5, 0.5, steps) if steps > 1 else (0.0,):
        right, down = np.rint(shift + share * way).astype(int)
        rows = np.clip(np.arange(height) - down, 0, height - 1)  # beyond the edge, the edge again
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        total += picture[np.ix_(rows, columns)]
    return np.rint(total / steps).astype(np.uint8)


def _compressed(perturbation: Perturbation, images: Pictures, seed: int) -> Pictures:
    s = perturbation.severity("compression", seed)
    if s == 0.0:
        return images
    quality = round(_BEST_QUALITY + s * (_WORST_QUALITY - _BEST_QUALITY))
    out = np.empty_like(images)
    for at in np.ndindex(images.shape[:-3]):
        buffer = io.BytesIO()
        Image.fromarray(images[at]).save(buffer, "jpeg", quality=quality)
        out[at] = np.asarray(Image.open(buffer))
    return out
