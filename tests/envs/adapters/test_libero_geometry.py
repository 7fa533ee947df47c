"""How LIBERO's expert takes hold of a thing: by its size and its neighbours. Needs no LIBERO."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from envs.adapters.libero_geometry import Grasp, _room, boxes, extent, plan_grasp
from envs.experts.script import about


def grasp(*geoms: str, hand: str = "") -> Grasp:
    """The grasp of the first of some bodies, each a box "x y z hx hy hz"."""
    bodies = ""
    for k, text in enumerate(geoms):
        x, y, z, *half = text.split()
        bodies += f"<body name='t{k}' pos='{x} {y} {z}'><geom type='box' size='{' '.join(half)}'/></body>"
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}{hand}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    roots = {model.body(f"t{k}").id for k in range(len(geoms))}
    first = model.body("t0").id
    return plan_grasp(boxes(model, data, roots), first, data.xpos[first].copy())


def test_a_narrow_thing_is_taken_between_the_fingers() -> None:
    found = grasp("0 0 0.05 0.03 0.02 0.05")
    assert found.yaw == 0.0
    np.testing.assert_allclose(found.offset, [0, 0, 0.02], atol=1e-9)  # the hand begins 3 cm above the grip
    np.testing.assert_allclose([found.low[2], found.high[2]], [-0.05, 0.05], atol=1e-9)


def test_the_hand_turns_where_the_fingers_have_no_room() -> None:
    thing = "0 0 0.03 0.02 0.02 0.03"
    assert grasp(thing).yaw == 0.0
    assert grasp(thing, "0 0.06 0.03 0.02 0.02 0.03").yaw == pytest.approx(np.pi / 2)
    assert grasp(thing, "0.06 0 0.03 0.02 0.02 0.03").yaw == 0.0
    assert grasp(thing, "0 0.06 0.005 0.02 0.02 0.005").yaw == 0.0, "a flat neighbour is in nobody's way"


def test_a_thing_wide_one_way_is_taken_the_other_way() -> None:
    assert grasp("0 0 0.03 0.02 0.06 0.03").yaw == pytest.approx(np.pi / 2)


def test_a_wide_thing_is_taken_by_the_rim_away_from_its_neighbours() -> None:
    for side in (-1, 1):
        beside = f"0 {side * 0.12} 0.05 0.2 0.03 0.05", f"{side * 0.12} 0 0.05 0.03 0.2 0.05"
        found = grasp("0 0 0.03 0.06 0.06 0.03", *beside)
        assert (found.offset[:2] * side <= 1e-9).all()
        assert np.linalg.norm(found.offset[:2]) == pytest.approx(0.054)
        assert found.offset[2] == pytest.approx(0.018)
        closing = np.array([-np.sin(found.yaw), np.cos(found.yaw)])
        assert abs(closing @ found.offset[:2]) == pytest.approx(0.054), "the fingers close across the rim"


def test_room_is_measured_to_a_turned_neighbour_itself_not_to_its_bounding_box() -> None:
    # A plank at 45 degrees whose corner-to-corner box reaches over the thing, though the plank is 8 cm away.
    plank = "<body name='t1' pos='0.10 0.10 0.05' euler='0 0 -45'><geom type='box' size='0.2 0.01 0.05'/></body>"
    text = "<body name='t0' pos='0 0 0.03'><geom type='box' size='0.02 0.02 0.03'/></body>"
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{text}{plank}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene = boxes(model, data, {1, 2})
    assert (scene[1].low[:2] < 0).all()
    # Nearest is the finger's point 5.5 cm along y; the plank's face is at x + y = 0.2 - 0.01 * sqrt(2).
    expected = (0.2 - 0.01 * np.sqrt(2) - 0.105) / np.sqrt(2) - 0.025
    assert _room(scene[1:], np.array([0.0, 0.0, 0.03]), 0.0) == pytest.approx(expected, abs=1e-9)


def test_the_robot_is_no_neighbour_and_a_part_belongs_to_its_thing() -> None:
    text = """<mujoco><worldbody>
      <body name='robot0_hand' pos='0 0 1'><geom size='.1'/></body>
      <body name='shelf' pos='1 0 0'><geom size='.1'/><body name='board' pos='0 0 .5'><geom size='.1'/></body></body>
      <geom type='plane' size='1 1 .1'/><geom size='.1' pos='0 2 0' contype='0' conaffinity='0'/>
    </worldbody></mujoco>"""
    model = mujoco.MjModel.from_xml_string(text)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    shelf = model.body("shelf").id
    scene = boxes(model, data, {shelf})
    assert sorted(box.owner for box in scene) == [0, shelf, shelf]
    low, high = extent(scene, shelf)  # type: ignore[misc]
    np.testing.assert_allclose([low, high], [[0.9, -0.1, -0.1], [1.1, 0.1, 0.6]], atol=1e-9)
    assert extent(scene, 77) is None


def test_a_rotation_vector_turns_the_hand() -> None:
    quarter = about(np.eye(3), np.array([0.0, 0.0, np.pi / 2]))
    np.testing.assert_allclose(quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_array_equal(about(quarter, np.zeros(3)), quarter)
