"""The scene of a tabletop suite around the FR3 of franky-sim, in its simulator. Nothing here knows the network.

Everything but the arm comes from `envs.tabletop`: table, objects, fixtures, light and cameras, in the same places
and colours. The camera at the hand has the pose that it has on our Panda, seen from between the fingers.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import mujoco
import numpy as np
from franky_sim.base_simulator import TrackedStateComponent
from numpy.typing import NDArray

from envs.tabletop.scene import HOME_QPOS, RobotNames, SceneConfig, SceneIndex, arena, furnish, index_of, robot_spec
from vla.core.config import lookup

TCP_M = 0.1034
"""From the flange of the Franka Hand to the point between its fingers, as its Desk is set and libfranka tells it."""
NAMES = RobotNames(
    arm=tuple(f"robot0_fr3_joint{i + 1}" for i in range(7)),
    fingers=("robot0_finger_joint1", "robot0_finger_joint2"),
    grip_site="grip_site",
)
LOOKS = ("hulls", "fr3")
"""hulls: the arm drawn as our Panda is, by the hulls that it collides with; fr3: by the meshes of the real one."""
_BRIGHT, _DARK, _HAND = (0.93, 0.93, 0.95, 1.0), (0.3, 0.32, 0.36, 1.0), (0.25, 0.26, 0.3, 1.0)
_FINGER, _PAD = (0.6, 0.6, 0.63, 1.0), (0.1, 0.1, 0.1, 1.0)
_COLORS = {"link5_coll": _DARK, "link7_coll": _DARK, "hand_coll": _HAND, "finger_0": _FINGER}
_DRAWN, _UNDRAWN = 0, 3


def add_scene(sim: Any, config: SceneConfig) -> None:
    """Put the suite's scene into a `franky_sim` MujocoSimulator that was given its robot and is not started."""
    spec = arena(config)
    furnish(spec, config)
    spec.compile()
    ours = ET.fromstring(spec.to_xml())
    for tag in ("option", "statistic", "visual"):
        for old in sim.scene.findall(tag):
            sim.scene.remove(old)
        sim.scene.extend(ours.findall(tag))
    for part in [*sim.worldbody]:
        if part.tag in ("geom", "light"):  # their ground and lamps
            sim.worldbody.remove(part)
    sim.worldbody.extend([*_required(ours, "worldbody")])
    for excluded in ours.findall("contact/exclude"):
        _required(sim.scene, "contact").append(excluded)
    hand = next(body for body in sim.worldbody.iter("body") if body.get("name") == "robot0_hand")
    pos, quat = _wrist_camera(config)
    ET.SubElement(hand, "site", name="grip_site", pos=f"0 0 {TCP_M}", quat="0.70710678 0 0 -0.70710678", group="4")
    fovy = next(camera.fovy for camera in robot_spec(config.robot).cameras if camera.name == "wrist")
    ET.SubElement(hand, "camera", name="wrist", pos=_words(pos), quat=_words(quat), fovy=f"{fovy:g}")


def add_arm(sim: Any) -> Any:
    """The arm, in the pose in which the suites begin."""
    arm = sim.add_robot(initial_q=HOME_QPOS, initial_hand_width=0.08)
    kinematics = arm.kinematics
    # Its own returns one matrix that the next call overwrites: the pose that is measured would be the one commanded.
    arm.kinematics = lambda q: kinematics(q).copy()
    # What it tells of the commanded velocity is smoothed over 20 ms, and the acceleration is that of its inverse
    # kinematics, which jumps. An arm tells those of the last command; ruckig begins every new path with them, and would
    # fly off.
    told = arm._tracked_state_components
    pose, twist = told["O_T_EE_c"], told["O_dP_EE_c"]
    for component in (pose, twist):
        component.observers["fd"]._alpha = 0.0
    told["O_ddP_EE_c"] = TrackedStateComponent(lambda *_: twist.observers["fd"].last_derivative, depends_on=(twist,))
    return arm


def finish(model: mujoco.MjModel, config: SceneConfig, look: str = "hulls") -> SceneIndex:
    """Dress the compiled model as the suites' is, and find everything in it. ValueError for an unknown `look`."""
    lookup(look, dict.fromkeys(LOOKS), "look")
    model.vis.quality.offsamples = 0
    arm = model.body("robot0_base").id
    for geom in np.flatnonzero(model.body_rootid[model.geom_bodyid] == arm):
        solid = bool(model.geom_contype[geom])
        model.geom_group[geom] = _DRAWN if solid == (look == "hulls") else _UNDRAWN
        if look == "hulls" and solid:
            mesh = model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH
            name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_MESH, model.geom_dataid[geom]) if mesh else ""
            model.geom_matid[geom] = -1
            model.geom_rgba[geom] = _COLORS.get(name, _BRIGHT) if mesh else _PAD
    return index_of(model, config, NAMES)


def _wrist_camera(config: SceneConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position and quaternion of the camera at our robot's hand, in the frame of a Franka Hand's flange: as far from
    the point between the fingers, and turned as much."""
    model = robot_spec(config.robot).compile()
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    site, camera = model.site("grip_site").id, model.camera("wrist").id
    grip_33 = data.site_xmat[site].reshape(3, 3)
    turned_33 = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # of the site against the flange
    pos = turned_33 @ grip_33.T @ (data.cam_xpos[camera] - data.site_xpos[site]) + [0.0, 0.0, TCP_M]
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, (turned_33 @ grip_33.T @ data.cam_xmat[camera].reshape(3, 3)).ravel())
    return pos, quat


def _required(root: ET.Element, tag: str) -> ET.Element:
    found = root.find(tag)
    assert found is not None, tag
    return found


def _words(numbers: NDArray[np.float64]) -> str:
    return " ".join(f"{number:.9g}" for number in numbers)
