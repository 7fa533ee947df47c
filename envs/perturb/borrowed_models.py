"""Randomised looks of models that another package compiled (robosuite, Meta-World).

The axes that need nothing added to a scene: camera, light, and the colours and patterns of surfaces, from the same
draws as the tabletop's training. A pattern takes the place of a material's picture. Pictures are sent to the renderer
small: one of 1181 pixels takes it 80 ms on a CPU, one of 128 takes 1 ms. Nothing here touches physics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from envs.perturb.appearance import cameras, lights, shift_hues, surface_draw
from envs.perturb.distractors import things
from envs.perturb.patterns import surface_pixels
from envs.perturb.perturbation import Perturbation, axis_rng

BORROWED_AXES = ("camera", "light", "texture", "noise", "compression")
"""Axes that other packages' scenes can be randomised in; noise and compression are `envs.perturb.sensors`'."""
_FIELDS = (
    "cam_pos", "cam_quat", "cam_fovy", "cam_pos0", "cam_mat0", "light_dir", "light_diffuse", "geom_rgba", "geom_matid",
)  # fmt: skip
_DEFAULT_RGBA = (0.5, 0.5, 0.5, 1.0)
"""A geom of this colour has its material's."""
_PICTURE = mujoco.mjtTextureRole.mjTEXROLE_RGB
_OWN_PX = 256
"""Largest width of a surface's own picture while the model is randomised."""
_SKY_PX = 16


def borrowed_problem(perturbation: Perturbation, suite: str) -> str | None:
    """A sentence about a randomisation that no picture of the suite would show, or None."""
    if perturbation.draws != "train":
        return f"suite {suite!r} can be randomised for training, not perturbed for tests: those are for the tabletop"
    if perturbation.any() and not any(map(perturbation.on, BORROWED_AXES)):
        return f"suite {suite!r} can be randomised in {', '.join(BORROWED_AXES)}, not in: {perturbation.words()}"
    return None


class BorrowedLooks:
    """The looks of one model, which remembers its own."""

    def __init__(self, model: mujoco.MjModel, surfaces: Sequence[str], table_z_m: float) -> None:
        """`surfaces`: bodies that are table, floor and walls, where the model has them; `table_z_m`: the table's top,
        around which fixed cameras turn."""
        self._model, self._table_z = model, table_z_m
        self._plain = {name: getattr(model, name).copy() for name in _FIELDS}
        self._headlight = np.stack([model.vis.headlight.ambient, model.vis.headlight.diffuse])
        bodies = [k for k in range(model.nbody) if model.body(k).name in surfaces]
        self._surfaces: dict[int, list[int]] = {}
        """Geoms by what they share: a material, or, below 0, nothing."""
        for geom in np.flatnonzero(np.isin(model.geom_bodyid, bodies)):
            material = int(model.geom_matid[geom])
            self._surfaces.setdefault(material if material >= 0 else -1 - int(geom), []).append(int(geom))
        textures = {int(model.mat_texid[material, _PICTURE]) for material in self._surfaces if material >= 0} - {-1}
        self._sky = [int(texture) for texture in np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)]
        self._pictures = {texture: self._picture(texture).copy() for texture in sorted({*textures, *self._sky})}
        """The model's own pictures (H, W, channels) of the surfaces and of the sky."""
        self._small = {texture: _reduced(pixels) for texture, pixels in self._pictures.items()}
        self._shown: dict[int, str] = {}
        """The patterns that textures have now: "" for their own pictures made small, "#rrggbb" for a colour."""

    def restore(self) -> list[int]:
        """Put back all that was the model's own; returns the textures to send to the renderer again."""
        renewed = sorted(self._shown)
        self._restore_fields()
        for texture in renewed:
            self._show(texture, self._pictures[texture])
        self._shown.clear()
        return renewed

    def _restore_fields(self) -> None:
        model = self._model
        for name, values in self._plain.items():
            getattr(model, name)[:] = values
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = self._headlight

    def wear(self, perturbation: Perturbation, seed: int) -> list[int]:
        """Look as training's draws of `seed` have it; returns the textures to send to the renderer again."""
        model = self._model
        if not perturbation.on("texture"):
            renewed = self.restore()
        else:
            self._restore_fields()
            renewed = self._paint(perturbation.severity("texture", seed), axis_rng(seed, "texture"))
        if perturbation.on("camera"):
            self._turn_cameras(perturbation.severity("camera", seed), axis_rng(seed, "camera"))
        if perturbation.on("light"):
            found = lights(model, perturbation.severity("light", seed), axis_rng(seed, "light"), train=True)
            model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = found.pop("headlight")
            for name, values in found.items():
                getattr(model, name)[:] = values
        return renewed

    def _turn_cameras(self, s: float, rng: np.random.Generator) -> None:
        model, plain = self._model, self._plain
        found = cameras(model, s, rng, train=True, table_z_m=self._table_z)
        # A tracking camera keeps its first rotation, and its first offset from its body.
        for camera in np.flatnonzero(model.cam_mode != mujoco.mjtCamLight.mjCAMLIGHT_FIXED):
            before, after = (_matrix(quats[camera]) for quats in (plain["cam_quat"], found["cam_quat"]))
            first = plain["cam_mat0"][camera].reshape(3, 3)
            model.cam_mat0[camera] = (after @ before.T @ first).ravel()
            model.cam_pos0[camera] += found["cam_pos"][camera] - plain["cam_pos"][camera]
        for name, values in found.items():
            getattr(model, name)[:] = values

    def _paint(self, s: float, rng: np.random.Generator) -> list[int]:
        """Colours and patterns for the surfaces, a colour for the sky, hues for what moves; returns the textures that
        changed."""
        model, patterns = self._model, dict.fromkeys(self._pictures, "")
        for material, geoms in self._surfaces.items():
            colour, pattern = surface_draw(s, rng)
            texture = int(model.mat_texid[material, _PICTURE]) if material >= 0 else -1
            if pattern is not None and texture >= 0:
                patterns[texture] = pattern
                model.geom_rgba[geoms, :3] = 1.0 if colour is None else colour
            elif colour is not None:
                model.geom_matid[geoms] = -1
                model.geom_rgba[geoms, :3] = colour
        for texture in self._sky:
            if (colour := surface_draw(s, rng)[0]) is not None:
                patterns[texture] = "#" + bytes(int(255 * part) for part in colour).hex()
        movable = things(model)
        coloured = (model.geom_rgba != _DEFAULT_RGBA).any(1) | (model.geom_matid < 0)
        of_material = movable[~coloured[movable]]
        rgba = model.geom_rgba.copy()
        rgba[of_material] = model.mat_rgba[model.geom_matid[of_material]]
        shift_hues(movable, rgba, s, rng)
        model.geom_rgba[:] = rgba
        renewed = [texture for texture, name in patterns.items() if self._shown.get(texture) != name]
        for texture in renewed:
            name = patterns[texture]
            self._show(texture, _pattern(name) if name else self._small[texture])
        self._shown = patterns
        return renewed

    def _picture(self, texture: int) -> NDArray[np.uint8]:
        """(H, W, channels) view of a texture's pixels as it is now."""
        model = self._model
        shape = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
        return model.tex_data[model.tex_adr[texture] :][: np.prod(shape)].reshape(shape)

    def _show(self, texture: int, pixels: NDArray[np.uint8]) -> None:
        """Give a texture this picture, at most as large as its own; a cube's is one face or six below each other."""
        model = self._model
        height, width, _ = self._pictures[texture].shape
        pixels = pixels[:height, :width]
        model.tex_height[texture], model.tex_width[texture] = pixels.shape[:2]
        self._picture(texture)[..., : pixels.shape[2]] = pixels


@cache
def _pattern(name: str) -> NDArray[np.uint8]:
    """The picture of a pattern of training, or of a colour "#rrggbb"."""
    if name.startswith("#"):
        return np.tile(np.frombuffer(bytes.fromhex(name[1:]), np.uint8), (_SKY_PX, _SKY_PX, 1))
    return surface_pixels(name)


def _reduced(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture, `_OWN_PX` wide at most."""
    height, width, channels = picture.shape
    if width <= _OWN_PX or channels not in (3, 4):
        return picture
    small = Image.fromarray(picture).resize((_OWN_PX, round(height * _OWN_PX / width)), Image.Resampling.BOX)
    return np.asarray(small)


def _matrix(quat: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.empty(9)
    mujoco.mju_quat2Mat(out, quat)
    return out.reshape(3, 3)
