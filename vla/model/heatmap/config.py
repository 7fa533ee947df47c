"""Configuration of a keyframe policy that answers by heat-maps. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vla.model.config import DEFAULT_BACKBONE

VIEWS = ("top", "front", "side")
COMPONENTS = ((1, 0, 2), (1, 2, 0), (0, 2, 1))
"""For each view, the component of a position along the picture's right, along its down, and toward who looks.
From above, right is +y and down +x, as the front camera's picture has them."""
SIGNS = ((1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, -1.0, -1.0))
"""Directions of those components."""


@dataclass(frozen=True)
class Workspace:
    """The cube of space that the views show, in the robot's frame."""

    centre_m: tuple[float, float, float] = (0.53, 0.0, 0.22)
    half_m: float = 0.28
    """Half the side of the cube."""
    resolution: int = 96
    """Height and width of each view, pixels; a model sets it to what its backbone reads."""
    splat_m: float = 0.004
    """A point is drawn as a square that reaches this far to each side, rounded to whole pixels, so that surfaces which
    a camera samples sparsely are closed."""
    background: int = 127
    """Grey value of what no camera has seen, 0..255."""
    zoom: float = 4.0
    """The second look shows a cube of half_m / zoom around the first look's peak."""

    def problem(self) -> str | None:
        """Describe what is wrong with this workspace, or return None."""
        if not (self.half_m > 0 and self.resolution >= 1 and self.zoom >= 1 and self.splat_m >= 0):
            return "a workspace needs half_m > 0, resolution >= 1, zoom >= 1 and splat_m >= 0"
        if not 0 <= self.background <= 255:
            return f"a workspace's background is a grey value from 0 to 255, not {self.background}"
        return None


@dataclass(frozen=True)
class Motion:
    """How a keyframe is executed: by displacements of the hand, at most `speed` of the fastest action."""

    metres_per_action: float = 0.03
    """Displacement commanded by an action component of 1 in one control step; measured in the demonstrations."""
    speed: float = 0.8
    """Share of the fastest action: what is held slips out of a hand that swings at full speed."""
    clearance_m: float = 0.09
    """With the lift flag the hand rises to this height above both ends of the way, goes across and comes down."""
    settle_steps: int = 2
    """Control steps that the hand is given to arrive before the gripper moves."""
    gripper_steps: int = 6
    """Control steps that the gripper is given to move before the keyframe counts as reached."""
    reached_m: float = 0.004
    """Distance at which the hand need not move any more."""
    radians_per_action: float = 0.5
    """Rotation commanded by action components of length 1 in one control step, of a hand that turns."""


@dataclass(frozen=True)
class Body:
    """Names of the robot's state and action components."""

    hand: tuple[str, str, str] = ("grip_x", "grip_y", "grip_z")
    """State: the hand's position in the robot's frame, m."""
    lead: tuple[str, str, str] | None = ("lead_x", "lead_y", "lead_z")
    """State: how far the commanded position is ahead of the hand's, m. None: not told."""
    gripper: str = "gripper_command"
    """State: how the gripper was told to be, or how far it is open."""
    open_above: float = 0.0
    """The gripper counts as open where its state is above this."""
    move: tuple[str, str, str] = ("dx", "dy", "dz")
    """Action: displacements of the hand, along the axes of the robot's frame."""
    grip: str = "gripper"
    """Action: the gripper."""
    grip_opens: Literal["high", "low"] = "high"
    """The end of the gripper's action that opens it."""
    orientation: tuple[str, str, str, str] | None = None
    """State: the hand's orientation in the robot's frame, a quaternion w, x, y, z. None: it keeps its orientation."""
    turn: tuple[str, str, str] | None = None
    """Action: rotation of the hand about the axes of the robot's frame, where it has an orientation."""


BODIES: dict[str, Body] = {
    "tabletop": Body(),
    "robosuite": Body(
        hand=("eef_x", "eef_y", "eef_z"), lead=None, gripper="finger_left", open_above=0.03, grip_opens="low",
        orientation=("eef_qw", "eef_qx", "eef_qy", "eef_qz"), turn=("rx", "ry", "rz"),
    ),
}  # fmt: skip
"""Robots whose demonstrations are known by the names of their components."""


@dataclass(frozen=True)
class HeatmapConfig:
    """Configuration of a model: backbone, views, heat-map head, execution."""

    backbone: str | dict[str, Any] = DEFAULT_BACKBONE
    """A name, a local folder or a specification: what `vla.backbones.hub.load` takes."""
    workspace: Workspace = field(default_factory=Workspace)
    motion: Motion = field(default_factory=Motion)
    body: Body = field(default_factory=Body)
    width: int = 48
    """Channels of the heat-map head."""
    chunk_size: int = 12
    """Control steps of a chunk, all executed before the next look."""
    picture_size: int = 128
    """Side in pixels of the cameras' pictures and depth maps that a simulator should draw."""
    done: bool = False
    """It also says when the task's keyframes are over, and holds the hand where it is then. Off: a hand that is told so
    too early stays for good, since it sees the same again (docs/research-log.md)."""
    language: bool = True
    """False: the instruction is left blank. A control that must fail where instructions matter."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Verdicts about a keyframe: the gripper's command once there; whether the hand goes there from above; and
        whether there is none, since the task is over."""
        return ("gripper_open", "lift", "done") if self.done else ("gripper_open", "lift")

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.chunk_size <= self.motion.gripper_steps:
            return f"chunk_size must be above gripper_steps ({self.motion.gripper_steps}), got {self.chunk_size}"
        if self.width < 1 or self.picture_size < 1:
            return "width and picture_size must be at least 1"
        if (self.body.orientation is None) != (self.body.turn is None):
            return "a body names both orientation and turn, or neither"
        return self.workspace.problem()
