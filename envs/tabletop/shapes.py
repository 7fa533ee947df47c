"""Object shapes: liftable objects (free bodies) and fixtures (plates, containers, drawer, button).

Primitives only, few of them: a contact pair costs more than anything else in a control step. Everything one lifts fits
between the fingers (8 cm) along its local x axis and ends less than 3 cm above where it is held, below the palm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # imported where a model is built: suites are listed without it
    import mujoco

Shape = Literal["box", "cylinder", "sphere", "ellipsoid"]
_BOX: Shape = "box"
_CYLINDER: Shape = "cylinder"
_SPHERE: Shape = "sphere"
_FRICTION = (1.0, 0.02, 0.0001)
_ROLLING_FRICTION = (1.0, 0.02, 0.004)
_DARK, _WOOD, _METAL = (0.16, 0.16, 0.18, 1.0), (0.42, 0.31, 0.22, 1.0), (0.62, 0.63, 0.66, 1.0)

_FRONT_M = -0.055

DRAWER_TRAVEL_M = 0.09
PLATE_RADIUS_M = 0.055
PLATE_THICKNESS_M = 0.008


@dataclass(frozen=True)
class Part:
    """One geom of a body, in the body's frame."""

    shape: Shape
    size: tuple[float, float, float]
    """Half sizes in metres (cylinder: radius, half height; sphere: radius)."""
    pos: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rgba: tuple[float, float, float, float] | None = None
    """None: the colour that the episode gives the thing."""
    yaw: float = 0.0
    solid: bool = True
    """False: only seen."""


@dataclass(frozen=True)
class Kind:
    """A shape that one can lift. Its origin is at half its height, `rest_m` above the table when it stands."""

    parts: tuple[Part, ...]
    rest_m: float
    rolls: bool = False


KINDS: dict[str, Kind] = {
    "cube": Kind((Part(_BOX, (0.02, 0.02, 0.02)),), 0.02),
    "can": Kind((Part(_CYLINDER, (0.018, 0.034, 0.0)),), 0.034),
    "brick": Kind((Part(_BOX, (0.034, 0.014, 0.014)),), 0.014),
    "ball": Kind((Part(_SPHERE, (0.022, 0.0, 0.0)),), 0.022, rolls=True),
    "bottle": Kind(
        (
            Part(_CYLINDER, (0.018, 0.028, 0.0), (0.0, 0.0, -0.007)),
            Part(_CYLINDER, (0.009, 0.007, 0.0), (0.0, 0.0, 0.028), (0.92, 0.92, 0.9, 1.0)),
        ),
        0.035,
    ),
    "mug": Kind(
        (
            Part(_CYLINDER, (0.022, 0.023, 0.0)),
            Part(_BOX, (0.008, 0.004, 0.013), (0.029, 0.0, 0.0)),
            Part(_CYLINDER, (0.018, 0.0004, 0.0), (0.0, 0.0, 0.0232), _DARK, solid=False),
        ),
        0.023,
    ),
    "arch": Kind(
        (
            Part(_BOX, (0.034, 0.013, 0.009), (0.0, 0.0, 0.013)),
            Part(_BOX, (0.008, 0.013, 0.013), (-0.026, 0.0, -0.009)),
            Part(_BOX, (0.008, 0.013, 0.013), (0.026, 0.0, -0.009)),
        ),
        0.022,
    ),
    "pyramid": Kind(
        (
            Part(_BOX, (0.028, 0.028, 0.008), (0.0, 0.0, -0.016)),
            Part(_BOX, (0.019, 0.019, 0.008)),
            Part(_BOX, (0.010, 0.010, 0.008), (0.0, 0.0, 0.016)),
        ),
        0.024,
    ),
    "domino": Kind((Part(_BOX, (0.022, 0.010, 0.030)),), 0.030),
}
LOW_KINDS = frozenset({"cube", "brick"})
"""Kinds of objects that fit into the drawer and let it be closed."""


@dataclass(frozen=True)
class Fixture:
    """A thing that an episode puts somewhere and that stays: a mocap body, perhaps with one joint."""

    parts: tuple[Part, ...]
    place: tuple[float, float] | None = None
    """Height of its floor above the table and radius of what counts as inside, m; None if nothing is put there."""
    foot_m: float = 0.0
    """Height of the body's origin above the table."""
    joint: Callable[[mujoco.MjsBody, str], None] | None = None
    """Adds the moving body called `name`, its joint of that name and a site `name_handle`."""
    travel_m: float = 0.0
    """Joint position that means open, or pressed down."""


def _walls(half: float, height: float, count: int) -> tuple[Part, ...]:
    """`count` upright boards around a floor whose inscribed radius is `half`."""
    turns = [2 * np.pi * k / count for k in range(count)]
    board = (0.004, half * np.tan(np.pi / count) + 0.003, height / 2)
    return tuple(
        Part(_BOX, board, (float(half * np.cos(t)), float(half * np.sin(t)), height / 2), yaw=float(t)) for t in turns
    )


def _drawer(cabinet: mujoco.MjsBody, name: str) -> None:
    import mujoco

    drawer = cabinet.add_body(name=name)
    drawer.add_joint(
        name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, -1, 0], range=[0, DRAWER_TRAVEL_M], limited=True,
        damping=4.0, frictionloss=0.6, armature=0.05,
    )  # fmt: skip
    add_parts(
        drawer,
        name,
        (
            Part(_BOX, (0.052, 0.004, 0.024), (0.0, _FRONT_M, 0.029)),
            Part(_BOX, (0.020, 0.005, 0.020), (0.0, _FRONT_M, 0.071), _METAL),
            Part(_BOX, (0.048, 0.050, 0.002), (0.0, 0.0, 0.007), _WOOD),
            Part(_BOX, (0.003, 0.050, 0.012), (-0.047, 0.0, 0.021), _WOOD),
            Part(_BOX, (0.003, 0.050, 0.012), (0.047, 0.0, 0.021), _WOOD),
            Part(_BOX, (0.048, 0.003, 0.012), (0.0, 0.048, 0.021), _WOOD),
        ),
        mass=0.4,
    )
    drawer.add_site(name=f"{name}_handle", pos=[0, _FRONT_M, 0.076], group=4)


def _button(base: mujoco.MjsBody, name: str) -> None:
    import mujoco

    cap = base.add_body(name=name)
    cap.add_joint(
        name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, 0, -1], range=[0, 0.012], limited=True,
        stiffness=120.0, springref=-0.008, damping=4.0, armature=0.02,
    )  # fmt: skip
    add_parts(cap, name, (Part(_CYLINDER, (0.022, 0.012, 0.0), (0.0, 0.0, 0.026)),), mass=0.05)
    cap.add_site(name=f"{name}_handle", pos=[0, 0, 0.038], group=4)


# A square frame painted on the table: a filled disc would look like a plate.
_MARK = [
    Part(_BOX, (0.006, 0.052, 0.0005), (0.046 * np.cos(t), 0.046 * np.sin(t), 0.0005), yaw=float(t), solid=False)
    for t in np.pi / 2 * np.arange(4)
]

_BUTTON = Fixture((Part(_BOX, (0.030, 0.030, 0.010), (0.0, 0.0, 0.010), _DARK),), joint=_button, travel_m=0.012)
PANEL_Y_M = {"left-button": -0.13, "middle-button": 0.0, "right-button": 0.13}
"""The buttons of a panel, and about where each stands across the table. Nothing shows which one was pressed before."""
FLASH_COLOR = "green"
"""The colour of lamps that flash; in an episode with such lamps nothing else has it."""
PANEL_COLORS = {"left-button": "red", "middle-button": "yellow", "right-button": "blue"}

FIXTURES: dict[str, Fixture] = {
    "plate": Fixture(
        (Part(_CYLINDER, (PLATE_RADIUS_M, PLATE_THICKNESS_M / 2, 0.0)),),
        (PLATE_THICKNESS_M, PLATE_RADIUS_M),
        foot_m=PLATE_THICKNESS_M / 2,
    ),
    "bowl": Fixture(
        (Part(_CYLINDER, (0.054, 0.003, 0.0), (0.0, 0.0, 0.003)), *_walls(0.052, 0.034, 8)), (0.006, 0.050)
    ),
    "box": Fixture((Part(_BOX, (0.060, 0.060, 0.003), (0.0, 0.0, 0.003)), *_walls(0.058, 0.036, 4)), (0.006, 0.062)),
    # A box that fingers can take things out of again: wide, with a rim lower than a block.
    "tray": Fixture((Part(_BOX, (0.074, 0.074, 0.003), (0.0, 0.0, 0.003)), *_walls(0.072, 0.014, 4)), (0.006, 0.074)),
    "zone": Fixture(tuple(_MARK), (0.0, 0.040)),
    "cabinet": Fixture(
        (
            Part(_BOX, (0.058, 0.055, 0.003), (0.0, 0.004, 0.057), _WOOD),
            Part(_BOX, (0.003, 0.055, 0.030), (-0.055, 0.004, 0.030), _WOOD),
            Part(_BOX, (0.003, 0.055, 0.030), (0.055, 0.004, 0.030), _WOOD),
            Part(_BOX, (0.058, 0.003, 0.030), (0.0, 0.058, 0.030), _WOOD),
        ),
        (0.009, 0.060),
        joint=_drawer,
        travel_m=DRAWER_TRAVEL_M,
    ),
    "button": _BUTTON,
    **dict.fromkeys(PANEL_Y_M, _BUTTON),
}


def add_parts(
    body: mujoco.MjsBody, name: str, parts: tuple[Part, ...], *, mass: float = 0.0, rolls: bool = False
) -> None:
    """Add the geoms `name`, `name_1`, ... to a body. A `mass` (kg), shared by volume, makes a thing to hold."""
    import mujoco

    solid = [part for part in parts if part.solid]
    volume = [float(np.prod([s for s in part.size if s > 0])) for part in solid]
    for number, part in enumerate(parts):
        geom = body.add_geom(
            name=name if number == 0 else f"{name}_{number}",
            type=getattr(mujoco.mjtGeom, f"mjGEOM_{part.shape.upper()}"),
            size=list(part.size), pos=list(part.pos),
            quat=[np.cos(part.yaw / 2), 0, 0, np.sin(part.yaw / 2)],
            friction=list(_ROLLING_FRICTION if rolls else _FRICTION),
        )  # fmt: skip
        if part.rgba is not None:
            geom.rgba = list(part.rgba)
        if not part.solid:
            geom.contype = geom.conaffinity = 0
            geom.mass = 0.0
        elif mass:
            geom.mass = mass * (volume[solid.index(part)] / sum(volume))
            geom.condim = 6 if rolls else 4
            geom.solref = [0.01, 1.0]
