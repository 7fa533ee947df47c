"""How perturbed scenes look: cameras, lights, surfaces. Values of MjModel's fields, one world at a time.

Training draws (`Perturbation.draws` is "train") and test draws are disjoint: no training episode has a camera orbit, a
light direction, a colour or a pattern of the table that a test at half severity or more has.
"""

from __future__ import annotations

import colorsys

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.perturb.distractors import add_distractors, painted, things
from envs.perturb.patterns import MATERIALS, PATTERNS, TRAINING, pattern_pixels, surface_pixels
from envs.perturb.perturbation import Perturbation, axis_rng

_ORBIT_RAD, _TILT_RAD, _DISTANCE = 0.6, 0.2, 0.15
_MOUNT_RAD, _MOUNT_M, _FOVY = 0.12, 0.008, 0.10
_LIGHT_RAD, _LIGHT_GAIN, _LIGHT_TINT, _AMBIENT_GAIN = 0.9, 0.6, 0.25, 0.5
_HUE, _VALUE = 0.035, 0.2
_QUIET = 0.24
"""A test at half severity or more turns, tilts and moves a camera by a quarter of the axis's range at least, each."""
_BEYOND = 1.2
"""Training's ranges of camera and light go this far beyond the test's."""
_SHADOW_MAP_PX, _SHADOW_REACH = 1024, 0.6
"""The shadow map's side, and half of the square that it covers, in extents of the model (1 m)."""
_TABLE_CENTRE, _SUN_M = np.array([0.53, 0.0, 0.0]), 1.0
"""Nearer to the table than it was, the light's depths are fine enough for shadows without stripes."""


def edit_spec(perturbation: Perturbation, spec: mujoco.MjSpec) -> None:
    """Add to a scene what the active axes need: things to scatter, materials for the table. Nothing else changes."""
    if perturbation.on("distractors"):
        add_distractors(spec)
    for name in surfaces_of(perturbation):
        pixels = pattern_pixels(name) if name in PATTERNS else surface_pixels(name)
        texture = spec.add_texture(name=f"pattern_{name}", type=mujoco.mjtTexture.mjTEXTURE_2D)
        texture.height, texture.width, texture.nchannel = pixels.shape
        texture.data = pixels.tobytes()
        spec.add_material(name=f"pattern_{name}").textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"pattern_{name}"
    if perturbation.on("shadows"):
        spec.visual.quality.shadowsize = _SHADOW_MAP_PX
        spec.visual.map.shadowclip = _SHADOW_REACH
        for light in spec.lights:
            light.castshadow = True


def surfaces_of(perturbation: Perturbation) -> tuple[str, ...]:
    """Names of the patterns and materials that these episodes may have, as materials `pattern_NAME` in the model."""
    if perturbation.draws == "train":
        return TRAINING if perturbation.on("texture") else ()
    return (*(PATTERNS if perturbation.on("texture") else ()), *(MATERIALS if perturbation.on("materials") else ()))


def model_fields(
    perturbation: Perturbation, model: mujoco.MjModel, geom_rgba: NDArray[np.float32], seed: int
) -> dict[str, NDArray]:
    """Values of MjModel's fields for one world, in their own shapes; only those that an active axis touches.

    `geom_rgba` (ngeom, 4): the world's colours before. "headlight" (2, 3) is the head light's ambient and diffuse. None
    of them touches physics. `model` is the plain one: its fields are the values at severity 0.
    """
    found: dict[str, NDArray] = {}
    train = perturbation.draws == "train"
    rng = lambda axis, *more: axis_rng(seed, axis, *more)  # noqa: E731
    if perturbation.on("camera"):
        found |= cameras(model, perturbation.severity("camera", seed), rng("camera"), train=train)
    if perturbation.azimuths:
        found |= orbited(model, found, perturbation.azimuth(seed))
    if perturbation.on("light"):
        found |= lights(model, perturbation.severity("light", seed), rng("light"), train=train)
    if perturbation.on("shadows"):
        directions = found.get("light_dir", model.light_dir)
        found |= _shadows(directions, perturbation.severity("shadows", seed), rng("shadows"))
    if perturbation.on("distractors"):
        found["geom_rgba"] = geom_rgba = painted(model, geom_rgba, rng("distractors", 1))
    if perturbation.on("texture"):
        surfaces = _trained_surfaces if train else _surfaces
        found |= surfaces(model, geom_rgba, perturbation.severity("texture", seed), rng("texture"))
    if perturbation.on("materials"):
        rgba = found.get("geom_rgba", geom_rgba)
        found |= _materials(model, rgba, found, perturbation.severity("materials", seed), rng("materials"))
    return found


# ---------------------------------------------------------------------- cameras
def _turn(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """(3, 3) rotation about a unit axis. Rodrigues' formula."""
    quat, matrix = np.empty(4), np.empty(9)
    mujoco.mju_axisAngle2Quat(quat, np.asarray(axis, np.float64), angle)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


def camera_draw(rng: np.random.Generator, *, train: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Azimuth, tilt and distance of a camera's move as shares of their ranges (3,), at severity 1; and two axes (2, 3).

    A test moves by more than half of the range in all three. Training goes further in two of them, and in the third,
    drawn by chance, by less than a test at half severity does.
    """
    sign, amount, axis = rng.choice([-1.0, 1.0], 3), rng.uniform(0.5, 1.0, 3), rng.normal(size=(2, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    if not train:
        return sign * amount, axis
    share = _BEYOND * rng.uniform(-1.0, 1.0, 3)
    share[rng.integers(3)] *= _QUIET / _BEYOND
    return share, axis


def cameras(
    model: mujoco.MjModel, s: float, rng: np.random.Generator, *, train: bool, table_z_m: float = 0.0
) -> dict[str, NDArray]:
    """The cameras' fields at severity `s`; the table that they look at is `table_z_m` high."""
    pos, quat, fovy = model.cam_pos.copy(), model.cam_quat.copy(), model.cam_fovy.copy()
    for camera in range(model.ncam):
        # Drawn alike for every camera, so that one camera's kind does not change another's numbers.
        share, axis = camera_draw(rng, train=train)
        a, b, c = s * share
        if s == 0.0:
            continue
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, quat[camera])
        rotation = matrix.reshape(3, 3)
        if model.cam_bodyid[camera] == 0:  # fixed in the world: around the point of the table that it looks at
            pivot = _looked_at(pos[camera], rotation, table_z_m)
            turn = _turn(np.array([0.0, 0.0, 1.0]), a * _ORBIT_RAD) @ _turn(rotation[:, 0], b * _TILT_RAD)
            pos[camera] = pivot + (1.0 + c * _DISTANCE) * turn @ (pos[camera] - pivot)
        else:
            turn = _turn(axis[0], a * _MOUNT_RAD)
            pos[camera] += b * _MOUNT_M * axis[1]
            fovy[camera] *= 1.0 + c * _FOVY
        mujoco.mju_mat2Quat(quat[camera], (turn @ rotation).ravel())
    return {"cam_pos": pos, "cam_quat": quat, "cam_fovy": fovy}


def _looked_at(position: NDArray[np.float64], rotation: NDArray[np.float64], table_z_m: float) -> NDArray[np.float64]:
    """(3,) m, the point of the table that a camera looks at."""
    ahead = -rotation[:, 2]
    return position - ahead * (position[2] - table_z_m) / min(ahead[2], -0.1)


def orbited(
    model: mujoco.MjModel, found: dict[str, NDArray], azimuth_deg: float, *, table_z_m: float = 0.0
) -> dict[str, NDArray]:
    """Position and orientation of the cameras, those fixed in the world turned about the vertical through the point of
    the table that they look at. `found`: fields that are not the model's own any more."""
    pos, quat = (np.array(found.get(name, getattr(model, name))) for name in ("cam_pos", "cam_quat"))
    turn = _turn(np.array([0.0, 0.0, 1.0]), np.deg2rad(azimuth_deg))
    for camera in np.flatnonzero(model.cam_bodyid == 0):
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, quat[camera])
        rotation = matrix.reshape(3, 3)
        pivot = _looked_at(pos[camera], rotation, table_z_m)
        pos[camera] = pivot + turn @ (pos[camera] - pivot)
        mujoco.mju_mat2Quat(quat[camera], (turn @ rotation).ravel())
    return {"cam_pos": pos, "cam_quat": quat}


# ---------------------------------------------------------------------- lights
def light_draw(rng: np.random.Generator, *, train: bool) -> tuple[float, float]:
    """Azimuth in rad of a light's turn, and its angle as a share of the range at severity 1.

    A test turns by more than half of it. Training turns by less than a test at half severity does, or by more than any.
    """
    azimuth, share = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0)
    if not train:
        return azimuth, share
    return azimuth, rng.uniform(1.02, _BEYOND) if rng.uniform() < 0.4 else rng.uniform(0.0, _QUIET)


def lights(model: mujoco.MjModel, s: float, rng: np.random.Generator, *, train: bool) -> dict[str, NDArray]:
    """The lights' fields at severity `s`."""
    direction, diffuse = model.light_dir.copy(), model.light_diffuse.copy()
    for light in range(model.nlight):
        azimuth, share = light_draw(rng, train=train)
        # In training the angle itself does not shrink with the severity: it would fall among the test's.
        tilt = _LIGHT_RAD * share * (s if not train or share < 0.5 else float(s > 0.5))
        direction[light] = _turn(np.array([np.cos(azimuth), np.sin(azimuth), 0.0]), tilt) @ direction[light]
    gain = 1.0 + s * _LIGHT_GAIN * rng.uniform(-1, 1)
    tint = 1.0 + s * _LIGHT_TINT * rng.uniform(-1, 1, 3)
    headlight = np.stack([model.vis.headlight.ambient, model.vis.headlight.diffuse])
    headlight = headlight * (1.0 + s * _AMBIENT_GAIN * rng.uniform(-1, 0.6)) * tint
    return {"light_dir": direction, "light_diffuse": diffuse * gain * tint, "headlight": headlight}


def _shadows(light_dir: NDArray[np.float64], s: float, rng: np.random.Generator) -> dict[str, NDArray]:
    """Lower the sun by up to 40 degrees, so that shadows are long. The severity says how low."""
    azimuth, tilt = rng.uniform(0, 2 * np.pi), 0.7 * s * rng.uniform(0.6, 1.0)
    direction = light_dir @ _turn(np.array([np.cos(azimuth), np.sin(azimuth), 0.0]), tilt).T
    return {
        "light_dir": direction,
        "light_pos": _TABLE_CENTRE - _SUN_M * direction,
        "light_castshadow": np.full(len(direction), s > 0),
    }


# ---------------------------------------------------------------------- surfaces
def _surfaces(
    model: mujoco.MjModel, geom_rgba: NDArray[np.float32], s: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    rgba, material = geom_rgba.copy(), model.geom_matid.copy()
    for geom in np.flatnonzero(model.geom_bodyid == 0):
        rgba[geom, :3] += s * (surface_colour(rng, train=False) - rgba[geom, :3])
    table = model.geom("table").id
    pattern, chance = PATTERNS[rng.integers(len(PATTERNS))], rng.uniform()
    if chance < s:
        material[table] = _material(model, pattern)
    shift_hues(things(model), rgba, s, rng)
    return {"geom_rgba": rgba, "geom_matid": material}


def _trained_surfaces(
    model: mujoco.MjModel, geom_rgba: NDArray[np.float32], s: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Table and floor each keep their colour or have another, and have a pattern of training or none."""
    rgba, material = geom_rgba.copy(), model.geom_matid.copy()
    for geom in np.flatnonzero(model.geom_bodyid == 0):
        colour, pattern = surface_draw(s, rng)
        if colour is not None:
            rgba[geom, :3] = colour
        if pattern is not None:
            material[geom] = _material(model, pattern)
    shift_hues(things(model), rgba, s, rng)
    return {"geom_rgba": rgba, "geom_matid": material}


def surface_draw(s: float, rng: np.random.Generator) -> tuple[NDArray[np.float64] | None, str | None]:
    """RGB (3,) and pattern that a surface has in training at severity `s`; None where it keeps its own."""
    colour, pattern = surface_colour(rng, train=True), TRAINING[rng.integers(len(TRAINING))]
    coloured, patterned = rng.uniform(size=2) < s * np.array([0.8, 0.6])
    return colour if coloured else None, pattern if patterned else None


def surface_colour(rng: np.random.Generator, *, train: bool) -> NDArray[np.float64]:
    """RGB (3,) of a table or floor. A test's are pale or dull, so that nothing on it disappears; training's are more
    colourful than any of these, or darker, or brighter."""
    if not train:
        return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.45), rng.uniform(0.3, 0.95)))
    hue, kind = rng.uniform(), rng.integers(4)
    if kind < 2:
        saturation, value = rng.uniform(0.47, 0.75), rng.uniform(0.25, 1.0)
    else:
        saturation = rng.uniform(0.0, 0.45)
        value = rng.uniform(0.08, 0.28) if kind == 2 else rng.uniform(0.97, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _materials(
    model: mujoco.MjModel, geom_rgba: NDArray, found: dict[str, NDArray], s: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    """A real-looking surface on the table: at half severity in every episode, and in full colour at severity 1."""
    rgba, material = geom_rgba.copy(), found.get("geom_matid", model.geom_matid).copy()
    name, chance = MATERIALS[rng.integers(len(MATERIALS))], rng.uniform()
    if chance < 2 * s:
        table = model.geom("table").id
        material[table] = _material(model, name)
        rgba[table, :3] += min(1.0, 2 * s) * (1.0 - rgba[table, :3])  # white: the picture's own colours
    return {"geom_rgba": rgba, "geom_matid": material}


def _material(model: mujoco.MjModel, name: str) -> int:
    return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MATERIAL, f"pattern_{name}")


def shift_hues(geoms: NDArray[np.int64], rgba: NDArray[np.float32], s: float, rng: np.random.Generator) -> None:
    """Change hue and brightness of `geoms` alike, within the names of their colours; `rgba` (ngeom, 4) in place."""
    hue, value = s * _HUE * rng.uniform(-1, 1), 1.0 + s * _VALUE * rng.uniform(-1, 0.5)
    for geom in geoms if s > 0 else ():
        h, saturation, v = colorsys.rgb_to_hsv(*rgba[geom, :3].tolist())
        rgba[geom, :3] = colorsys.hsv_to_rgb((h + hue) % 1.0, saturation, min(1.0, v * value))
