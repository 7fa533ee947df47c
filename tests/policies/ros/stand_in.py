"""A rosbridge server without ROS: an arm that is at once where it is told to be, and a strict look at every operation.

It knows the protocol's published operations and the fields of the message types below, and answers anything else with a
`status` of level error, as rosbridge does.
"""

import base64
import contextlib
import json
import threading
import time

import cbor2
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

TIME = {"sec": int, "nanosec": int}
HEADER = {"stamp": TIME, "frame_id": str}
VECTOR = {"x": float, "y": float, "z": float}
LAYOUT = {"dim": [{"label": str, "size": int, "stride": int}], "data_offset": int}
POINT = {"positions": [float], "velocities": [float], "accelerations": [float], "effort": [float],
         "time_from_start": TIME}  # fmt: skip
TYPES = {
    "sensor_msgs/msg/JointState": {
        "header": HEADER, "name": [str], "position": [float], "velocity": [float], "effort": [float],
    },
    "sensor_msgs/msg/Image": {
        "header": HEADER, "height": int, "width": int, "encoding": str, "is_bigendian": int, "step": int, "data": bytes,
    },
    "sensor_msgs/msg/CompressedImage": {"header": HEADER, "format": str, "data": bytes},
    "std_msgs/msg/Float64MultiArray": {"layout": LAYOUT, "data": [float]},
    "trajectory_msgs/msg/JointTrajectory": {"header": HEADER, "joint_names": [str], "points": [POINT]},
    "geometry_msgs/msg/Twist": {"linear": VECTOR, "angular": VECTOR},
}  # fmt: skip
FIELDS = {
    "advertise": ({"topic": str, "type": str}, {"id": str}),
    "unadvertise": ({"topic": str}, {"id": str}),
    "publish": ({"topic": str, "msg": dict}, {"id": str}),
    "subscribe": (
        {"topic": str},
        {"id": str, "type": str, "throttle_rate": int, "queue_length": int, "fragment_size": int, "compression": str},
    ),
    "unsubscribe": ({"topic": str}, {"id": str}),
}
"""Operation -> required and optional fields."""


def mistake(value, kind, where="msg"):
    """The first fault of a message's value; None if it conforms. Fields may be left out, others not added."""
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{where} is no message"
        if foreign := [name for name in value if name not in kind]:
            return f"{where} has no field {foreign[0]}"
        found = (mistake(value[name], kind[name], f"{where}.{name}") for name in value)
        return next(filter(None, found), None)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(filter(None, (mistake(item, kind[0], f"{where}[]") for item in value)), None)
    right = {float: int | float, int: int, str: str, bytes: str}[kind]
    return None if isinstance(value, right) and not isinstance(value, bool) else f"{where} is no {kind.__name__}"


class Server:
    """`topics`: name -> type, of what the robot's nodes publish and listen to. `shown`: name -> a function that gives
    the message to publish, or None. `published`: every message that was accepted, in order."""

    def __init__(self, topics, shown, hz=50.0):
        self.topics, self.shown, self.hz = topics, shown, hz
        self.published, self.refused, self.log = [], [], []
        self.heard = lambda topic, message: None
        self.clients = []

    def __enter__(self):
        self._server = serve(self._handle, "127.0.0.1", 0)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()

    def hang_up(self):
        """End every connection, as a server that is killed does."""
        for client in list(self.clients):
            client.socket.close()

    def _handle(self, client):
        self.clients.append(client)
        wanted, stop = {}, threading.Event()
        threading.Thread(target=self._publish, args=(client, wanted, stop), daemon=True).start()
        with contextlib.suppress(ConnectionClosed, OSError):
            for frame in client:
                problem = self._take(json.loads(frame), wanted)
                if problem:
                    self.refused.append(problem)
                    client.send(json.dumps({"op": "status", "level": "error", "msg": problem}))
        stop.set()

    def _take(self, message, wanted):
        op = message.pop("op", None)
        if op not in FIELDS:
            return f"Unknown operation: {op}"
        needed, others = FIELDS[op]
        kinds = needed | others
        for name, value in message.items():
            if name not in kinds or not isinstance(value, kinds[name]):
                return f"{op}: field {name} is not allowed, or of a wrong type"
        if lacking := [name for name in needed if name not in message]:
            return f"{op}: field {lacking[0]} is missing"
        self.log.append((op, message["topic"]))
        topic, kind = message["topic"], message.get("type")
        if kind is not None and self.topics.get(topic, kind) != kind:
            return f"Tried to use topic {topic} with type {kind}, but it has type {self.topics[topic]}"
        if op == "subscribe":
            if topic not in self.topics and kind is None:
                return f"topic {topic} does not exist, and no type was given"
            if message.get("compression", "none") not in ("none", "cbor"):
                return f"compression {message['compression']} is not done here"
            wanted[topic] = message.get("compression", "none")
        if op == "advertise" and kind not in TYPES:
            return f"Unable to import {kind}"
        if op == "publish":
            if topic not in self.topics:
                return f"topic {topic} does not exist"
            if wrong := mistake(message["msg"], TYPES[self.topics[topic]]):
                return f"{topic}: {wrong}"
            self.published.append((topic, message["msg"]))
            self.heard(topic, message["msg"])
        return None

    def _publish(self, client, wanted, stop):
        with contextlib.suppress(ConnectionClosed, OSError):
            while not stop.wait(1 / self.hz):
                for topic, compression in list(wanted.items()):
                    message = self.shown.get(topic, lambda: None)()
                    for one in message if isinstance(message, list) else [message]:
                        if one is not None:
                            client.send(encoded({"op": "publish", "topic": topic, "msg": one}, compression))


def encoded(message, compression):
    if compression == "cbor":
        return cbor2.dumps(message, default=lambda encoder, value: encoder.encode(_tagged(value)))

    def text(value):
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value.tolist()

    return json.dumps(message, default=text)


def _tagged(array):
    return cbor2.CBORTag({"float64": 86, "float32": 85}[array.dtype.name], array.tobytes())


class Arm:
    """Joints in radians that follow /commands, and a camera whose red channel shows the first joint in degrees."""

    JOINTS = ("shoulder_joint", "elbow_joint")

    def __init__(self, encoding="rgb8", height=6, width=8):
        self.at, self.encoding, self.size = dict.fromkeys(self.JOINTS, 0.5), encoding, (height, width)
        self.silent: set[str] = set()
        topics = {
            "/joint_states": "sensor_msgs/msg/JointState",
            "/image": "sensor_msgs/msg/Image",
            "/commands": "std_msgs/msg/Float64MultiArray",
        }
        self.server = Server(topics, {"/joint_states": self.joints, "/image": self.picture})
        self.server.heard = self.move

    def joints(self):
        """Two nodes tell a joint each, in another order than the file."""
        if "/joint_states" in self.silent:
            return None
        return [
            {
                "header": self.header(),
                "name": [name],
                "position": np.array([self.at[name]]),
                "velocity": [],
                "effort": [],
            }
            for name in reversed(self.JOINTS)
        ]

    def header(self):
        return {"stamp": {"sec": int(time.time()), "nanosec": 0}, "frame_id": ""}

    def picture(self):
        if "/image" in self.silent:
            return None
        height, width = self.size
        pixels = np.zeros((height, width + 1, 3), np.uint8)  # a pixel of padding behind each line
        pixels[..., 2 if self.encoding == "bgr8" else 0] = round(np.rad2deg(self.at["shoulder_joint"]))
        pixels[:, -1] = 255
        return {"header": self.header(), "height": height, "width": width, "encoding": self.encoding, "is_bigendian": 0,
                "step": (width + 1) * 3, "data": pixels.tobytes()}  # fmt: skip

    def move(self, topic, message):
        self.at.update(zip(self.JOINTS, message["data"], strict=True))
