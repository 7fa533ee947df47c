"""Scenes: one MjSpec composed from `sim_configs/` (arena + robot) and primitive objects. No task knowledge here.

Costs that shaped it (measured, 84 px, software EGL): one shadow-casting light 26x, 150k triangles 5-10x, MSAA 2x. So:
no shadows, convex-hull meshes, primitives for objects, `offsamples=0`. Elliptic friction cone with impratio 10: in
the pyramidal cone a held cube slides out of the fingers within 20 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

SIM_CONFIGS = Path(__file__).resolve().parent.parent / "sim_configs"

OBJECT_KINDS: tuple[str, ...] = ("cube", "can", "brick")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.62, 0.15),
    "blue": (0.10, 0.22, 0.88),
    "yellow": (0.92, 0.80, 0.08),
    "purple": (0.55, 0.12, 0.66),
}
# Half sizes in metres (cylinder: radius, half height).
_GEOMS: dict[str, tuple[mujoco.mjtGeom, tuple[float, float, float]]] = {
    "cube": (mujoco.mjtGeom.mjGEOM_BOX, (0.02, 0.02, 0.02)),
    "can": (mujoco.mjtGeom.mjGEOM_CYLINDER, (0.018, 0.034, 0.0)),
    "brick": (mujoco.mjtGeom.mjGEOM_BOX, (0.034, 0.014, 0.014)),
}
REST_HEIGHT_M: dict[str, float] = {"cube": 0.02, "can": 0.034, "brick": 0.014}
"""Height of the centre above the table when the object stands on it."""
PLATE_RADIUS_M = 0.055
PLATE_THICKNESS_M = 0.008
PARKING_M = (0.5, -0.25, -0.36)
"""Unused objects wait on the floor under the table, out of every camera's sight; spread along y."""
HOME_QPOS = (0.0, 0.2, 0.0, -2.2, 0.0, 2.4, 2.356)
"""Hand straight down in the orientation that the controller holds: any other home would turn the wrist camera by 90
degrees during the first second."""
FINGER_OPEN_M = 0.04


@dataclass(frozen=True)
class SceneConfig:
    """What stands in the world. `objects` are slots with a fixed shape; colours and poses are drawn per episode."""

    name: str = "tabletop"
    robot: str = "panda"
    objects: tuple[str, ...] = ("cube", "cube", "can", "brick")
    num_plates: int = 2
    control_hz: float = 20.0


SCENES: dict[str, SceneConfig] = {"tabletop": SceneConfig()}


@dataclass(frozen=True)
class SceneIndex:
    """Addresses into MjModel / MjData, resolved once."""

    object_body: np.ndarray  # (K,) body ids
    object_geom: np.ndarray  # (K,) geom ids
    object_qpos: np.ndarray  # (K,) first qpos address of each free joint
    plate_mocap: np.ndarray  # (M,) mocap ids
    plate_geom: np.ndarray  # (M,) geom ids
    arm_qpos: np.ndarray  # (7,)
    arm_dof: np.ndarray  # (7,)
    finger_qpos: np.ndarray  # (2,)
    grip_site: int
    cameras: tuple[str, ...]
    camera_ids: tuple[int, ...]


def parking_pos(slot: int) -> tuple[float, float, float]:
    """Where object `slot` waits while it takes no part in an episode."""
    return (PARKING_M[0], PARKING_M[1] + 0.15 * slot, PARKING_M[2])


def _require(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"scene file {path} is missing: reinstall bascule, or restore it from git")
    return str(path)


def _robot_spec(name: str) -> mujoco.MjSpec:
    folder = SIM_CONFIGS / "robots" / name
    spec = mujoco.MjSpec.from_file(_require(folder / f"{name}.xml"))
    for mesh in spec.meshes:  # absolute, because attaching to another spec loses this one's meshdir
        mesh.file = _require(folder / "assets" / Path(mesh.file).name)
    spec.meshdir = ""
    return spec


def compose(config: SceneConfig) -> mujoco.MjSpec:
    """MjSpec of the arena with the robot attached and the objects added, ready to compile."""
    spec = mujoco.MjSpec.from_file(_require(SIM_CONFIGS / "scenes" / f"{config.name}.xml"))
    robot = _robot_spec(config.robot)
    frame = spec.worldbody.add_frame()
    spec.attach(robot, frame=frame, prefix="")
    for k, kind in enumerate(config.objects):
        shape, size = _GEOMS[kind]
        body = spec.worldbody.add_body(name=f"object{k}", pos=list(parking_pos(k)))
        body.add_freejoint(name=f"object{k}")
        body.add_geom(
            name=f"object{k}",
            type=shape,
            size=list(size),
            mass=0.1,
            condim=4,
            friction=[1.0, 0.02, 0.0001],
            solref=[0.01, 1.0],
        )
    for m in range(config.num_plates):
        body = spec.worldbody.add_body(
            name=f"plate{m}", mocap=True, pos=[PARKING_M[0] + 0.2, PARKING_M[1] + 0.15 * m, PARKING_M[2]]
        )
        body.add_geom(
            name=f"plate{m}",
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[PLATE_RADIUS_M, PLATE_THICKNESS_M / 2, 0],
            friction=[1.0, 0.02, 0.0001],
        )
    return spec


def build(config: SceneConfig) -> tuple[mujoco.MjModel, SceneIndex]:
    """Compiled model and the addresses of everything the environment moves or reads."""
    model = compose(config).compile()
    model.vis.quality.offsamples = 0
    objects = [f"object{k}" for k in range(len(config.objects))]
    plates = [f"plate{m}" for m in range(config.num_plates)]
    joints = [f"joint{i + 1}" for i in range(7)]
    cameras = ("front", "wrist")
    index = SceneIndex(
        object_body=np.array([model.body(n).id for n in objects]),
        object_geom=np.array([model.geom(n).id for n in objects]),
        object_qpos=np.array([model.jnt_qposadr[model.joint(n).id] for n in objects]),
        plate_mocap=np.array([model.body(n).mocapid[0] for n in plates], dtype=np.int64),
        plate_geom=np.array([model.geom(n).id for n in plates], dtype=np.int64),
        arm_qpos=np.array([model.jnt_qposadr[model.joint(n).id] for n in joints]),
        arm_dof=np.array([model.jnt_dofadr[model.joint(n).id] for n in joints]),
        finger_qpos=np.array([model.jnt_qposadr[model.joint(f"finger_joint{i}").id] for i in (1, 2)]),
        grip_site=model.site("grip_site").id,
        cameras=cameras,
        camera_ids=tuple(model.camera(c).id for c in cameras),
    )
    return model, index
