"""Perturbations: eight ways in which test episodes differ from training episodes, each a severity from 0 to 1.

The axes are LIBERO-plus's questions (Fei et al. 2025). Every draw is a pure function of the episode's seed, the
axis and the severity; a larger severity goes further in the same direction, and 0 leaves every number as it was. A knob
may also be a range to draw the severity from: domain randomisation (Tobin et al. 2017), for demonstrations or RL.

Everything here is an array or an episode, so that every backend can apply it, through `envs.perturb.episode_source`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.perturb.distractors import MAX_DISTRACTORS, add_distractors, painted, scatter, things
from envs.perturb.rewording import reword
from envs.seeds import Stream
from envs.tabletop.episodes import WORKSPACE_X, WORKSPACE_Y, Episode
from envs.tabletop.initial_state import Start
from envs.tabletop.scene import SceneIndex
from vla.core.config import unknown

Severity = float | tuple[float, float]
"""0 (as trained) .. 1, or the range from which every episode draws its own."""

_ORBIT_RAD, _TILT_RAD, _DISTANCE = 0.6, 0.2, 0.15
_MOUNT_RAD, _MOUNT_M, _FOVY = 0.12, 0.008, 0.10
_LIGHT_RAD, _LIGHT_GAIN, _LIGHT_TINT, _AMBIENT_GAIN = 0.9, 0.6, 0.25, 0.5
_HUE, _VALUE = 0.035, 0.2
_STRETCH, _SHIFT_M, _YAW = 0.35, 0.03, 0.4
_JOINTS_RAD = np.array([0.35, 0.25, 0.25, 0.25, 0.25, 0.3, 0.4])
_START_X, _START_Y, _START_Z = (0.36, 0.70), 0.25, 0.13
"""Bounds of the hand's first position, m."""
_PIXEL_NOISE, _PROPRIO_NOISE = 30.0, 0.01
PATTERNS = ("checks", "stripes", "grain", "planks")
"""Table textures, as materials `pattern_NAME` in models that were built for the texture axis."""


@dataclass(frozen=True)
class Perturbation:
    """Severity per axis of the differences between perturbed and plain episodes."""

    camera: Severity = 0.0
    """The fixed camera orbits its view point (34 degrees, 15% in distance); a mounted one is turned and moved."""
    light: Severity = 0.0
    """Direction (50 degrees), brightness and tint of the lights."""
    texture: Severity = 0.0
    """Colour and pattern of table and floor; hues of objects, within their names."""
    distractors: Severity = 0.0
    """Up to five things of shapes and sizes that no instruction names."""
    layout: Severity = 0.0
    """Things stand up to 35% further apart than in any demonstration, and are turned by as much more."""
    robot: Severity = 0.0
    """The arm starts up to 0.4 rad per joint from its home."""
    instruction: Severity = 0.0
    """Words and forms that no phrasing of the suites has."""
    noise: Severity = 0.0
    """On images (standard deviation 30 of 255) and proprioception (0.01 in its units)."""

    def problem(self) -> str | None:
        """A sentence about an impossible severity, or None."""
        for axis in AXES:
            low, high = self.range_of(axis)
            if 0.0 <= high < low <= 1.0:
                return f"perturbation {axis} must go from its lower to its higher end: {axis}={high:g}:{low:g}"
            if not 0.0 <= low <= high <= 1.0:
                return f"perturbation {axis} must lie in 0..1, got {getattr(self, axis)}"
        return None

    def range_of(self, axis: str) -> tuple[float, float]:
        """Least and largest severity of an axis."""
        value = getattr(self, axis)
        return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else (float(value), float(value))

    def on(self, axis: str) -> bool:
        """True if any episode is perturbed along `axis`."""
        return self.range_of(axis)[1] > 0.0

    def severity(self, axis: str, seed: int) -> float:
        """The severity of axis `axis` in the episode that `seed` means."""
        low, high = self.range_of(axis)
        if low == high:
            return low
        rng = np.random.default_rng([seed, Stream.PERTURB_SEVERITY, AXES.index(axis)])
        return float(rng.uniform(low, high))

    def any(self) -> bool:
        """True if any axis is active."""
        return any(self.on(axis) for axis in AXES)

    def words(self) -> str:
        """The active axes as `parse` reads them: "camera=0.5 light=0:1"."""
        ranges = [(axis, *self.range_of(axis)) for axis in AXES if self.on(axis)]
        return " ".join(f"{axis}={low:g}" + (f":{high:g}" if high > low else "") for axis, low, high in ranges)


AXES: tuple[str, ...] = tuple(field.name for field in fields(Perturbation))


def parse(words: Iterable[str]) -> Perturbation:
    """ "camera=0.5", "light=0:1" -> Perturbation. ValueError with the nearest axis, or what a severity may be."""
    values: dict[str, Severity] = {}
    for word in words:
        axis, _, text = word.partition("=")
        if axis not in AXES:
            raise ValueError(unknown(axis, AXES, "perturbation"))
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(f"perturbation {word!r} must be {axis}=SEVERITY or {axis}=FROM:TO, from 0 to 1")
        values[axis] = numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    perturbation = Perturbation(**values)
    if problem := perturbation.problem():
        raise ValueError(problem)
    return perturbation


def _rng(seed: int, axis: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, Stream.PERTURB, AXES.index(axis), *more])


# ---------------------------------------------------------------------- the episode
def perturb_episode(perturbation: Perturbation, episode: Episode) -> Episode:
    """The episode with its layout stretched and its instruction reworded."""
    if (s := perturbation.severity("layout", episode.seed)) > 0:
        episode = _stretched(episode, s)
    if (s := perturbation.severity("instruction", episode.seed)) > 0:
        words = [AXES.index("instruction"), Stream.PERTURB, episode.seed]
        episode = replace(
            episode,
            instruction=reword(episode.instruction, words, s),
            swapped_instruction=reword(episode.swapped_instruction, words, s),
        )
    return episode


def _stretched(episode: Episode, s: float) -> Episode:
    """Positions scaled about the workspace's centre: nothing comes closer to anything, and left stays left. Fixtures
    need room of their own, so a scene with fixtures is only shifted, as a whole."""
    rng = _rng(episode.seed, "layout")
    centre = np.array([np.mean(WORKSPACE_X), np.mean(WORKSPACE_Y)])
    scale = 1.0 + _STRETCH * s * (not episode.fixtures)
    shift = s * _SHIFT_M * rng.uniform(-1, 1, 2) * bool(episode.fixtures)

    def moved(x: float, y: float) -> tuple[float, float]:
        at = centre + scale * (np.array([x, y]) - centre) + shift
        return float(at[0]), float(at[1])

    turn = 1.0 + _YAW * s
    return replace(
        episode,
        poses=tuple((*moved(x, y), yaw * turn) for x, y, yaw in episode.poses),
        plate_xy=tuple(moved(x, y) for x, y in episode.plate_xy),
        fixtures=tuple((*moved(x, y), yaw) for x, y, yaw in episode.fixtures),
    )


# ---------------------------------------------------------------------- model and first state
def edit_spec(perturbation: Perturbation, spec: mujoco.MjSpec) -> None:
    """Add to a scene what the active axes need: things to scatter, materials for the table. Nothing else changes."""
    if perturbation.on("distractors"):
        add_distractors(spec)
    if perturbation.on("texture"):
        for name in PATTERNS:
            pixels = pattern_pixels(name)
            texture = spec.add_texture(name=f"pattern_{name}", type=mujoco.mjtTexture.mjTEXTURE_2D)
            texture.height, texture.width, texture.nchannel = pixels.shape
            texture.data = pixels.tobytes()
            spec.add_material(name=f"pattern_{name}").textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"pattern_{name}"


def perturb_start(
    perturbation: Perturbation, start: Start, episode: Episode, model: mujoco.MjModel, index: SceneIndex
) -> Start:
    """The first state with the arm elsewhere and distractors on the table. `model`: compiled after `edit_spec`."""
    seed = episode.seed
    if (s := perturbation.severity("robot", seed)) > 0:
        qpos = start.qpos.copy()
        qpos[index.arm_qpos] += s * _arm_offset(start, model, index, _rng(seed, "robot"))
        start = replace(start, qpos=qpos)
    if perturbation.on("distractors"):
        count = round(MAX_DISTRACTORS * perturbation.severity("distractors", seed))
        start = scatter(start, episode, model, index, count, _rng(seed, "distractors"))
    return start


def _arm_offset(
    start: Start, model: mujoco.MjModel, index: SceneIndex, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(7,) rad of severity 1: the first draw that leaves the hand above everything and within the workspace."""
    data = mujoco.MjData(model)
    for offset in _JOINTS_RAD * rng.uniform(-1, 1, (200, 7)):
        data.qpos[:] = start.qpos
        data.qpos[index.arm_qpos] += offset
        mujoco.mj_kinematics(model, data)
        x, y, z = data.site_xpos[index.grip_site]
        if _START_X[0] < x < _START_X[1] and abs(y) < _START_Y and z > _START_Z:
            return offset
    return np.zeros(7)


# ---------------------------------------------------------------------- what a camera sees
def model_fields(
    perturbation: Perturbation, model: mujoco.MjModel, geom_rgba: NDArray[np.float32], seed: int
) -> dict[str, NDArray]:
    """Values of MjModel's fields for one world, in their own shapes; only those that an active axis touches.

    `geom_rgba` (ngeom, 4): the world's colours before. "headlight" (2, 3) is the head light's ambient and diffuse. None
    of them touches physics. `model` is the plain one: its fields are the values at severity 0.
    """
    found: dict[str, NDArray] = {}
    if perturbation.on("camera"):
        found |= _cameras(model, perturbation.severity("camera", seed), _rng(seed, "camera"))
    if perturbation.on("light"):
        found |= _lights(model, perturbation.severity("light", seed), _rng(seed, "light"))
    if perturbation.on("distractors"):
        found["geom_rgba"] = geom_rgba = painted(model, geom_rgba, _rng(seed, "distractors", 1))
    if perturbation.on("texture"):
        found |= _surfaces(model, geom_rgba, perturbation.severity("texture", seed), _rng(seed, "texture"))
    return found


def _turn(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """(3, 3) rotation about a unit axis. Rodrigues' formula."""
    quat, matrix = np.empty(4), np.empty(9)
    mujoco.mju_axisAngle2Quat(quat, np.asarray(axis, np.float64), angle)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


def _cameras(model: mujoco.MjModel, s: float, rng: np.random.Generator) -> dict[str, NDArray]:
    pos, quat, fovy = model.cam_pos.copy(), model.cam_quat.copy(), model.cam_fovy.copy()
    for camera in range(model.ncam):
        # Drawn alike for every camera, so that one camera's kind does not change another's numbers.
        sign, amount, axis = rng.choice([-1.0, 1.0], 3), rng.uniform(0.5, 1.0, 3), rng.normal(size=(2, 3))
        a, b, c = s * sign * amount
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        if s == 0.0:
            continue
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, quat[camera])
        rotation = matrix.reshape(3, 3)
        if model.cam_bodyid[camera] == 0:  # fixed in the world: around the point of the table that it looks at
            ahead = -rotation[:, 2]
            pivot = pos[camera] - ahead * pos[camera, 2] / min(ahead[2], -0.1)
            turn = _turn(np.array([0.0, 0.0, 1.0]), a * _ORBIT_RAD) @ _turn(rotation[:, 0], b * _TILT_RAD)
            pos[camera] = pivot + (1.0 + c * _DISTANCE) * turn @ (pos[camera] - pivot)
        else:
            turn = _turn(axis[0], a * _MOUNT_RAD)
            pos[camera] += b * _MOUNT_M * axis[1]
            fovy[camera] *= 1.0 + c * _FOVY
        mujoco.mju_mat2Quat(quat[camera], (turn @ rotation).ravel())
    return {"cam_pos": pos, "cam_quat": quat, "cam_fovy": fovy}


def _lights(model: mujoco.MjModel, s: float, rng: np.random.Generator) -> dict[str, NDArray]:
    direction, diffuse = model.light_dir.copy(), model.light_diffuse.copy()
    for light in range(model.nlight):
        azimuth, tilt = rng.uniform(0, 2 * np.pi), s * _LIGHT_RAD * rng.uniform(0.5, 1.0)
        direction[light] = _turn(np.array([np.cos(azimuth), np.sin(azimuth), 0.0]), tilt) @ direction[light]
    gain = 1.0 + s * _LIGHT_GAIN * rng.uniform(-1, 1)
    tint = 1.0 + s * _LIGHT_TINT * rng.uniform(-1, 1, 3)
    headlight = np.stack([model.vis.headlight.ambient, model.vis.headlight.diffuse])
    headlight = headlight * (1.0 + s * _AMBIENT_GAIN * rng.uniform(-1, 0.6)) * tint
    return {"light_dir": direction, "light_diffuse": diffuse * gain * tint, "headlight": headlight}


def _surfaces(
    model: mujoco.MjModel, geom_rgba: NDArray[np.float32], s: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    rgba, material = geom_rgba.copy(), model.geom_matid.copy()
    arena = np.flatnonzero(model.geom_bodyid == 0)
    for geom in arena:
        # Pale or dull, so that nothing on it disappears.
        other = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.45), rng.uniform(0.3, 0.95))
        rgba[geom, :3] += s * (np.array(other) - rgba[geom, :3])
    table = model.geom("table").id
    pattern, chance = PATTERNS[rng.integers(len(PATTERNS))], rng.uniform()
    found = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MATERIAL, f"pattern_{pattern}")
    if chance < s:
        material[table] = found
    hue, value = s * _HUE * rng.uniform(-1, 1), 1.0 + s * _VALUE * rng.uniform(-1, 0.5)
    for geom in things(model) if s > 0 else ():
        h, saturation, v = colorsys.rgb_to_hsv(*rgba[geom, :3].tolist())
        rgba[geom, :3] = colorsys.hsv_to_rgb((h + hue) % 1.0, saturation, min(1.0, v * value))
    return {"geom_rgba": rgba, "geom_matid": material}


def pattern_pixels(name: str, size: int = 128) -> NDArray[np.uint8]:
    """(size, size, 3) grey pattern that a surface's colour tints."""
    y, x = np.mgrid[:size, :size] / size
    if name == "checks":
        level = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    elif name == "stripes":
        level = 0.5 + 0.5 * np.sin(2 * np.pi * 8 * (x + 0.5 * y))
    elif name == "grain":
        level = np.random.default_rng(7).uniform(size=(size // 4, size // 4)).repeat(4, 0).repeat(4, 1)
    elif name == "planks":
        rows = (y * 8).astype(int)
        level = np.random.default_rng(8).uniform(0.2, 1.0, 8)[rows] * (np.abs(y * 8 % 1 - 0.5) < 0.46)
    else:
        raise ValueError(unknown(name, PATTERNS, "pattern"))
    return np.repeat((255 * (0.55 + 0.45 * level)).astype(np.uint8)[..., None], 3, axis=2)


# ---------------------------------------------------------------------- sensors
def noisy_images(perturbation: Perturbation, images: NDArray[np.uint8], seed: int, step: int) -> NDArray[np.uint8]:
    """The images (..., uint8) of control step `step` with Gaussian noise; the very same array at severity 0."""
    s = perturbation.severity("noise", seed)
    if s == 0.0:
        return images
    noise = _rng(seed, "noise", step, 0).normal(0.0, s * _PIXEL_NOISE, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def noisy_proprio(
    perturbation: Perturbation, proprio_P: NDArray[np.float32], seed: int, step: int
) -> NDArray[np.float32]:
    """One environment's proprio (P,) of control step `step` with Gaussian noise; the very same array at severity 0."""
    s = perturbation.severity("noise", seed)
    if s == 0.0:
        return proprio_P
    noise = _rng(seed, "noise", step, 1).normal(0.0, s * _PROPRIO_NOISE, proprio_P.shape)
    return (proprio_P + noise).astype(np.float32)
