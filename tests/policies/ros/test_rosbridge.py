"""A robot behind rosbridge's protocol, against a strict stand-in for its server: through `vla control`'s own loop."""

import base64
import contextlib
import io
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cbor2", reason="the extra 'ros' is not installed")

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from policies.control.robots import LeRobotRobot, lerobot_robot
from policies.ros import rosbridge
from policies.ros.pictures import picture_of
from policies.ros.topics import number_at, read_topics, steps_of
from tests.policies.control.toy_robot import Says
from tests.policies.ros.stand_in import TYPES, Arm, mistake

FILE = """
max_age_s = {max_age_s}
connect_s = {connect_s}

[cameras.front]
topic = "/image"
type = "sensor_msgs/msg/Image"
width = 8
height = {height}

[[states]]
topic = "/joint_states"
type = "sensor_msgs/msg/JointState"
read = {{ "shoulder.pos" = "position[shoulder_joint]", "elbow.pos" = "position[elbow_joint]" }}

[[commands]]
topic = "/commands"
type = "{type}"
message = {{ {message} }}

[scale]
"shoulder.pos" = 57.29578
"elbow.pos" = 57.29578
"""
PLAIN = {"max_age_s": 2.0, "connect_s": 5.0, "height": 6, "type": "std_msgs/msg/Float64MultiArray",
         "message": 'data = ["$shoulder.pos", "$elbow.pos"]'}  # fmt: skip


def written(tmp_path, **change):
    path = tmp_path / "topics.toml"
    path.write_text(FILE.format(**PLAIN | change))
    return path


def robot(tmp_path, arm, **change):
    return lerobot_robot("rosbridge", {"config": str(written(tmp_path, **change)), "url": arm.server.url})


@pytest.fixture
def arm():
    arm = Arm()
    with arm.server:
        yield arm


def drive(made, chunk, seconds=0.6, guards=None):
    limits = {"shoulder.pos": (-90.0, 90.0), "elbow.pos": (-90.0, 90.0)}
    ours = LeRobotRobot(made, instruction="go", control_hz=50.0, limits=limits)
    says = Says(chunk)
    config = ControlConfig(duration_s=seconds, policy_hz=50.0, asynchronous=False, guards=guards or GuardConfig())
    return control(ours, says, config)


def heard(log, last):
    """The server's own thread enters what it reads: after the client has hung up there may be some left."""
    until = time.monotonic() + 5
    while log[-1] != last and time.monotonic() < until:
        time.sleep(0.01)
    assert log[-1] == last


def test_a_policy_moves_the_arm_and_sees_it_move(tmp_path, arm):
    made = robot(tmp_path, arm)
    report = drive(made, [[30.0, -20.0]] * 8)
    assert report.ended == "time" and report.guards == {}, report
    np.testing.assert_allclose(list(arm.at.values()), np.deg2rad([30.0, -20.0]), atol=1e-6)
    assert arm.server.refused == [] and not made.is_connected
    assert arm.server.log[:3] == [("subscribe", "/joint_states"), ("subscribe", "/image"), ("advertise", "/commands")]
    heard(arm.server.log, ("unadvertise", "/commands"))


@pytest.mark.parametrize("compression", ["cbor", "none"])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_state_and_picture_are_what_the_topics_tell(tmp_path, monkeypatch, compression, encoding):
    monkeypatch.setattr(rosbridge, "COMPRESSION", compression)
    arm = Arm(encoding)
    arm.at = {"shoulder_joint": np.deg2rad(40), "elbow_joint": np.deg2rad(-7)}
    with arm.server:
        made = robot(tmp_path, arm)
        made.connect()
        seen = made.get_observation()
        made.disconnect()
    assert [seen["shoulder.pos"], seen["elbow.pos"]] == pytest.approx([40, -7], abs=1e-4)
    assert seen["front"].shape == (6, 8, 3) and seen["front"].dtype == np.uint8
    assert (seen["front"] == [40, 0, 0]).all()


def test_a_topic_that_falls_silent_holds_the_robot_until_it_speaks(tmp_path, arm):
    made = robot(tmp_path, arm, max_age_s=0.2)
    made.connect()
    arm.silent = {"/image"}
    time.sleep(0.3)
    with pytest.raises(TimeoutError, match=r"/image has been silent for 0\.\d s"):
        made.get_observation()
    arm.silent = set()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            assert "front" in made.get_observation()
            break
        time.sleep(0.02)
    else:
        raise AssertionError("it did not come back")
    made.disconnect()


def test_a_server_that_goes_is_a_lost_robot(tmp_path, arm):
    made = robot(tmp_path, arm)
    arm.server.heard = lambda *_: arm.server.hang_up()
    report = drive(made, [[30.0, -20.0]] * 8, seconds=5.0)
    assert report.ended == "disconnect" and "the connection ended" in str(report.reasons)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"height": 12}, "shows 8x6 pixels, its width and height are given as 8x12"),
        ({"type": "std_msgs/msg/Float32"}, "Tried to use topic /commands with type std_msgs/msg/Float32"),
    ],
)
def test_what_does_not_fit_is_told_at_connecting(tmp_path, arm, change, told):
    made = robot(tmp_path, arm, **change)
    if "type" in change:  # the server tells it later than topics speak: nothing moves, and the next connection knows
        arm.silent = {"/image"}
        change = {**change, "connect_s": 0.4}
        made = robot(tmp_path, arm, **change)
    with pytest.raises(ConnectionError, match=told):
        made.connect()
    assert arm.server.published == [] and not made.is_connected


def test_silent_topics_and_absent_servers_are_told(tmp_path, arm):
    arm.silent = {"/joint_states"}
    with pytest.raises(ConnectionError, match=r"/joint_states told no position\[shoulder_joint\] within 0.3 s"):
        robot(tmp_path, arm, connect_s=0.3).connect()
    nobody = lerobot_robot("rosbridge", {"config": str(written(tmp_path)), "url": "ws://127.0.0.1:9"})
    with pytest.raises(ConnectionError, match="no rosbridge answers at ws://127.0.0.1:9"):
        nobody.connect()


def test_speeds_are_stopped_at_the_end(tmp_path, arm):
    arm.server.topics["/commands"] = "geometry_msgs/msg/Twist"
    arm.server.heard = lambda *_: None
    twist = {"type": "geometry_msgs/msg/Twist", "message": 'linear = { x = "$x.vel", y = 0.0, z = 0.0 }'}
    path = written(tmp_path, **twist)
    path.write_text(path.read_text().split("[scale]")[0])
    made = lerobot_robot("rosbridge", {"config": str(path), "url": arm.server.url})
    made.connect()
    made.send_action({"x.vel": 0.25})
    made.disconnect()
    heard(arm.server.log, ("unadvertise", "/commands"))
    assert [message["linear"]["x"] for _, message in arm.server.published] == [0.25, 0.0]


def test_a_trajectory_is_filled_in(tmp_path):
    message = (
        'joint_names = ["shoulder_joint", "elbow_joint"], '
        'points = [{ positions = ["$shoulder.pos", "$elbow.pos"], time_from_start = { sec = 0, nanosec = 50000000 } }]'
    )
    kind = "trajectory_msgs/msg/JointTrajectory"
    (command,) = read_topics(written(tmp_path, message=message, type=kind)).commands
    filled = command.filled({"shoulder.pos": 1.5, "elbow.pos": -2.0})
    assert filled["points"][0]["positions"] == [1.5, -2.0] and filled["joint_names"][0] == "shoulder_joint"
    assert mistake(filled, TYPES[kind]) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"message": "data = [1.0]"}, "no command holds an action component"),
        ({"message": 'data = ["$shoulder.pos"]', "connect_s": 0}, "must be positive"),
        ({"connect_s": '"soon"'}, "connect_s"), ({"height": 0}, "camera 'front' needs its width and height"),
        ({"connect_s": "= 3"}, "topics.toml: Invalid value"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused_in_a_line(tmp_path, change, told):
    with pytest.raises(ValueError, match=told) as problem:
        read_topics(written(tmp_path, **change))
    assert "\n" not in str(problem.value)


def test_more_mistakes_in_a_file(tmp_path):
    path = written(tmp_path)
    good = path.read_text()
    for old, new, told in (
        ('position[shoulder_joint]', "position[shoulder_joint", "is no place in a message"),
        ('[scale]\n', '[scale]\n"wrist.pos" = 2.0\n', "scale names 'wrist.pos', which no topic holds"),
        ('[[states]]', "[[stats]]", "did you mean 'states'"),
        ('"elbow.pos" = 57.29578', '"elbow.pos" = 0.0', "must be a number that is not 0"),
    ):  # fmt: skip
        path.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=told.replace("[", r"\[")):
            read_topics(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_topics(tmp_path / "none.toml")


def test_places_within_messages():
    message = {"name": ["a", "b"], "position": [1.0, 2.0], "wrench": {"force": {"z": 3.0}}, "frame": "x"}
    at = lambda place: number_at(message, steps_of(place))  # noqa: E731
    assert [at("position[b]"), at("position[0]"), at("wrench.force.z")] == [2.0, 1.0, 3.0]
    assert at("position[c]") is None  # another node tells it
    for place, told in (("velocity[a]", "has no 'velocity'"), ("position[7]", "no entry 7"), ("frame", "is no number")):
        with pytest.raises(ValueError, match=told):
            at(place)
    assert steps_of("a..b") == steps_of("a.") == steps_of("[0]") == ()


def jpeg(kind, colour):
    data = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(data, kind)
    return data.getvalue()


def test_compressed_pictures_keep_their_colours_whatever_the_camera_had():
    for kind, words in (("JPEG", "bgr8; jpeg compressed bgr8"), ("PNG", "rgb8; png compressed bgr8")):
        data = jpeg(kind, (200, 10, 30))
        for given in (data, base64.b64encode(data).decode()):
            seen = picture_of({"format": words, "data": given})
            assert seen.shape == (6, 8, 3) and np.abs(seen.astype(int) - [200, 10, 30]).max() < 6


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"encoding": "16UC1", "height": 1, "width": 1, "step": 2, "data": b"ab"}, "encoding is '16UC1'"),
        ({"encoding": "rgb8", "height": 2, "width": 2, "step": 6, "data": b"abc"}, "2x2 pixels, 6 bytes a line, has 3"),
        ({"format": "16UC1; compressedDepth", "data": b""}, "depth is not read"),
        ({"format": "jpeg", "data": b"no"}, "cannot be decoded"), ({"format": "jpeg", "data": "!"}, "not base64"),
    ],
)  # fmt: skip
def test_pictures_that_are_not_read_are_told(message, told):
    with pytest.raises(ValueError, match=told):
        picture_of(message)
