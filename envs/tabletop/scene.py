"""Scenes: one MjSpec composed from `sim_configs/` (arena + robot) and primitive objects. No task knowledge here.

Costs that shaped it (measured, 84 px, software EGL): one shadow-casting light 26x, 150k triangles 5-10x, MSAA 2x. So:
no shadows, convex-hull meshes, primitives for objects, `offsamples=0`. Elliptic friction cone with impratio 10: in
the pyramidal cone a held cube slides out of the fingers within 20 s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from envs.tabletop.shapes import FIXTURES, KINDS, PANEL_Y_M, add_parts
from vla.core.paths import SIM_CONFIGS

if TYPE_CHECKING:  # imported where a model is built: suites are listed without it
    import mujoco

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.62, 0.15),
    "blue": (0.10, 0.22, 0.88),
    "yellow": (0.92, 0.80, 0.08),
    "purple": (0.55, 0.12, 0.66),
}
REST_HEIGHT_M: dict[str, float] = {name: kind.rest_m for name, kind in KINDS.items()}
"""Height of the centre above the table when the object stands on it."""
PARKING_M = (0.5, -0.25, -0.36)
"""Unused objects wait on the floor under the table, out of every camera's sight; spread along y."""
FLOATING_M = (0.5, -0.35, -0.2)
"""Their place in the air instead, carried by `envs.tabletop.initial_state`, in scenes with `parked_float`."""
HOME_QPOS = (0.0, 0.2, 0.0, -2.2, 0.0, 2.4, 2.356)
"""Hand straight down in the orientation that the controller holds: any other home would turn the wrist camera by 90
degrees during the first second."""
FINGER_OPEN_M = 0.04


@dataclass(frozen=True)
class SceneConfig:
    """The contents of a scene. `objects` are slots with a fixed shape; colours and poses are drawn per episode."""

    name: str = "tabletop"
    robot: str = "panda"
    objects: tuple[str, ...] = ("cube", "cube", "can", "brick")
    num_plates: int = 2
    fixtures: tuple[str, ...] = ()
    """Kinds of `envs.tabletop.shapes.FIXTURES`, each once, in every episode; plates come on top."""
    parked_float: bool = False
    """Objects that take no part hang in the air instead of lying on the floor: no contacts, so no cost."""
    control_hz: float = 20.0


SCENES: dict[str, SceneConfig] = {
    "tabletop": SceneConfig(),
    "row": SceneConfig(objects=("cube", "cube", "cube"), num_plates=1, fixtures=("bowl",), parked_float=True),
    "shapes": SceneConfig(
        objects=("cube", "ball", "bottle", "mug", "arch", "pyramid", "brick", "domino"),
        num_plates=0,
        fixtures=("box",),
        parked_float=True,
    ),
    "counter": SceneConfig(
        objects=("cube", "cube", "brick", "can"),
        num_plates=1,
        fixtures=("bowl", "zone", "cabinet", "button"),
        parked_float=True,
    ),
    "tray": SceneConfig(objects=("cube", "cube"), num_plates=0, fixtures=("tray", "zone"), parked_float=True),
    "panel": SceneConfig(objects=("cube",), num_plates=0, fixtures=tuple(PANEL_Y_M), parked_float=True),
}


@dataclass(frozen=True)
class SceneIndex:
    """Addresses into MjModel / MjData, resolved once. An entity is an object slot, then a plate, then a fixture."""

    object_body: np.ndarray  # (K,) body ids
    object_qpos: np.ndarray  # (K,) first qpos address of each free joint
    fixture_mocap: np.ndarray  # (F,) mocap ids of plates, then fixtures
    fixture_height: np.ndarray  # (F,) height of a standing fixture's body origin above the table, m
    place_body: np.ndarray  # (P,) bodies that things are put on or in: plates, then fixtures with a place
    place_height: np.ndarray  # (P,) of the place's floor above the body origin, m
    place_radius: np.ndarray  # (P,) m
    place_entity: np.ndarray  # (P,) entity that each place belongs to
    joint_qpos: np.ndarray  # (J,) qpos addresses of drawers and buttons
    joint_dof: np.ndarray  # (J,)
    joint_travel: np.ndarray  # (J,) position that means open or pressed, m
    joint_entity: np.ndarray  # (J,)
    handle_site: np.ndarray  # (J,) sites where a hand takes hold
    colored_geom: np.ndarray  # (C,) geoms whose colour the episode draws
    colored_entity: np.ndarray  # (C,) entity whose colour each has
    arm_qpos: np.ndarray  # (7,)
    arm_dof: np.ndarray  # (7,)
    finger_qpos: np.ndarray  # (2,)
    grip_site: int
    cameras: tuple[str, ...]
    camera_ids: tuple[int, ...]


def parking_pos(slot: int, *, floating: bool = False) -> tuple[float, float, float]:
    """(3,) position of object `slot` while it takes no part in an episode, m."""
    if floating:
        return (FLOATING_M[0], FLOATING_M[1] + 0.1 * slot, FLOATING_M[2])
    return (PARKING_M[0], PARKING_M[1] + 0.15 * slot, PARKING_M[2])


def fixture_names(config: SceneConfig) -> list[tuple[str, str]]:
    """(body name, kind) of every plate and fixture, in the order of `SceneIndex.fixture_mocap`."""
    return [(f"plate{m}", "plate") for m in range(config.num_plates)] + [(kind, kind) for kind in config.fixtures]


def place_names(config: SceneConfig) -> list[tuple[str, str]]:
    """(body name, kind) of everything that things are put on or in, in the order of `SceneIndex.place_body`."""
    return [(name, kind) for name, kind in fixture_names(config) if FIXTURES[kind].place]


def joint_names(config: SceneConfig) -> list[tuple[str, str]]:
    """(body name of the fixture, kind) of everything articulated, in the order of `SceneIndex.joint_qpos`."""
    return [(name, kind) for name, kind in fixture_names(config) if FIXTURES[kind].joint]


def _require(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"scene file {path} is missing: reinstall bascule, or restore it from git")
    return str(path)


def robot_spec(name: str) -> mujoco.MjSpec:
    """MjSpec of a robot of `sim_configs/robots`."""
    import mujoco

    folder = SIM_CONFIGS / "robots" / name
    spec = mujoco.MjSpec.from_file(_require(folder / f"{name}.xml"))
    for mesh in spec.meshes:  # absolute, because attaching to another spec loses this one's meshdir
        mesh.file = _require(folder / "assets" / Path(mesh.file).name)
    spec.meshdir = ""
    return spec


def compose(config: SceneConfig) -> mujoco.MjSpec:
    """MjSpec of the arena with the robot attached and the objects added, ready to compile."""
    spec = arena(config)
    robot = robot_spec(config.robot)
    frame = spec.worldbody.add_frame()
    spec.attach(robot, frame=frame, prefix="")
    furnish(spec, config)
    return spec


def arena(config: SceneConfig) -> mujoco.MjSpec:
    """MjSpec of table, light and fixed camera alone."""
    import mujoco

    return mujoco.MjSpec.from_file(_require(SIM_CONFIGS / "scenes" / f"{config.name}.xml"))


def furnish(spec: mujoco.MjSpec, config: SceneConfig) -> None:
    """Add the scene's objects, plates and fixtures."""
    for k, kind in enumerate(config.objects):
        body = spec.worldbody.add_body(name=f"object{k}", pos=list(parking_pos(k, floating=config.parked_float)))
        body.add_freejoint(name=f"object{k}")
        add_parts(body, f"object{k}", KINDS[kind].parts, mass=0.1, rolls=KINDS[kind].rolls)
    for m, (name, kind) in enumerate(fixture_names(config)):
        pos = [PARKING_M[0] + 0.2, PARKING_M[1] + 0.15 * m, PARKING_M[2]]
        body = spec.worldbody.add_body(name=name, mocap=True, pos=pos)
        fixture = FIXTURES[kind]
        add_parts(body, name, fixture.parts)
        if fixture.joint:
            fixture.joint(body, f"{name}_part")
            spec.add_exclude(bodyname1=name, bodyname2=f"{name}_part")


@dataclass(frozen=True)
class RobotNames:
    """Names of a robot's moving parts in a model. The defaults are those of `sim_configs/robots`."""

    arm: tuple[str, ...] = tuple(f"joint{i + 1}" for i in range(7))
    fingers: tuple[str, str] = ("finger_joint1", "finger_joint2")
    grip_site: str = "grip_site"


def index_of(model: mujoco.MjModel, config: SceneConfig, names: RobotNames = RobotNames()) -> SceneIndex:
    """Addresses of everything that the environment moves or reads."""

    def bodies(names: list[str]) -> np.ndarray:
        return np.array([model.body(n).id for n in names], dtype=np.int64)

    objects = [f"object{k}" for k in range(len(config.objects))]
    fixtures, places, joints = fixture_names(config), place_names(config), joint_names(config)
    order = [*objects, *(name for name, _ in fixtures)]
    moving = [f"{name}_part" for name, _ in joints]
    # What is put into a drawer goes along with it.
    inside = [f"{name}_part" if FIXTURES[kind].joint else name for name, kind in places]
    arm = [model.joint(n).id for n in names.arm]
    slides = [model.joint(n).id for n in moving]
    colored = [(geom, order.index(name)) for name in order for geom in _own_geoms(model, name)]
    cameras = ("front", "wrist")
    return SceneIndex(
        object_body=bodies(objects),
        object_qpos=np.array([model.jnt_qposadr[model.joint(n).id] for n in objects]),
        fixture_mocap=np.array([model.body(n).mocapid[0] for n, _ in fixtures], dtype=np.int64),
        fixture_height=np.array([FIXTURES[kind].foot_m for _, kind in fixtures]),
        place_body=bodies(inside),
        place_height=np.array([FIXTURES[kind].place[0] - FIXTURES[kind].foot_m for _, kind in places]),
        place_radius=np.array([FIXTURES[kind].place[1] for _, kind in places]),
        place_entity=np.array([order.index(name) for name, _ in places], dtype=np.int64),
        joint_qpos=model.jnt_qposadr[slides].astype(np.int64),
        joint_dof=model.jnt_dofadr[slides].astype(np.int64),
        joint_travel=np.array([FIXTURES[kind].travel_m for _, kind in joints]),
        joint_entity=np.array([order.index(name) for name, _ in joints], dtype=np.int64),
        handle_site=np.array([model.site(f"{n}_handle").id for n in moving], dtype=np.int64),
        colored_geom=np.array([geom for geom, _ in colored], dtype=np.int64),
        colored_entity=np.array([entity for _, entity in colored], dtype=np.int64),
        arm_qpos=model.jnt_qposadr[arm],
        arm_dof=model.jnt_dofadr[arm],
        finger_qpos=np.array([model.jnt_qposadr[model.joint(n).id] for n in names.fingers]),
        grip_site=model.site(names.grip_site).id,
        cameras=cameras,
        camera_ids=tuple(model.camera(c).id for c in cameras),
    )


def _own_geoms(model: mujoco.MjModel, name: str) -> list[int]:
    """Geoms of body `name` and of its moving part that have no colour of their own."""
    import mujoco

    default = np.array([0.5, 0.5, 0.5, 1.0])
    ids = [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, n) for n in (name, f"{name}_part")]
    return [g for g in range(model.ngeom) if model.geom_bodyid[g] in ids and np.allclose(model.geom_rgba[g], default)]


def build(
    config: SceneConfig, edit: Callable[[mujoco.MjSpec], None] | None = None
) -> tuple[mujoco.MjModel, SceneIndex]:
    """Compiled model and the addresses of everything the environment moves or reads. `edit` may add to the scene."""
    spec = compose(config)
    if edit is not None:
        edit(spec)
    model = spec.compile()
    model.vis.quality.offsamples = 0
    return model, index_of(model, config)
