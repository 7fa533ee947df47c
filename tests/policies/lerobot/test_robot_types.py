"""Every robot that comes with LeRobot can be named: it is built, or the driver that is not installed is."""

import re
import threading

import numpy as np
import pytest
from lerobot.robots import RobotConfig
from websockets.sync.server import serve

from bascule.main import main
from policies.control.robot_types import make_robot, robot_types
from policies.serving import wire
from policies.serving.server import PolicyServer, serve_in_thread
from tests.policies.control.toy_robot import Says
from tests.policies.lerobot.so101 import CAMERA, LIMITS, NAMES, so101
from vla.core.types import ActionSpec, PolicySpec

ARMS = {"left_arm_config.port": "/dev/a", "right_arm_config.port": "/dev/b"}
BUILT_IN = {
    "bi_openarm_follower": ARMS, "bi_rebot_b601_follower": ARMS, "bi_so_follower": ARMS, "earthrover_mini_plus": {},
    "hope_jr_arm": {"port": "/dev/a"}, "hope_jr_hand": {"port": "/dev/a", "side": "left"},
    "koch_follower": {"port": "/dev/a"}, "lekiwi": {}, "lekiwi_client": {"remote_ip": "127.0.0.1"},
    "omx_follower": {"port": "/dev/a"}, "openarm_follower": {"port": "/dev/a"}, "reachy2": {},
    "rebot_b601_follower": {"port": "/dev/a"}, "so100_follower": {"port": "/dev/a"},
    "so101_follower": {"port": "/dev/a"}, "unitree_g1": {},
}  # fmt: skip


def test_all_of_them_are_known():
    assert set(BUILT_IN) <= set(robot_types()) and "bascule_tabletop" in robot_types()
    assert set(RobotConfig.get_known_choices()) <= set(robot_types())


@pytest.mark.parametrize("kind", BUILT_IN)
def test_each_is_built_or_its_driver_is_named(kind, capsys):
    words = [word for pair in BUILT_IN[kind].items() for word in pair]
    try:
        robot = make_robot(kind, BUILT_IN[kind])
    except ValueError as error:
        assert re.fullmatch(
            rf"robot {kind}: its driver \S+ is not installed: pip install 'lerobot\[[\w-]+\]'", str(error)
        )
        args = ["control", "ws://127.0.0.1:9", "--robot", kind, "--task", "go", "--dry-run"]
        assert main([*args, *(["--robot-args", *words] if words else [])]) == 2
        assert str(error) in capsys.readouterr().err
    else:
        assert robot.action_features and not robot.is_connected


def test_mistakes_in_its_words_are_one_line():
    for kind, values, message in (
        ("so101_folower", {}, "did you mean 'so101_follower'"),
        ("so101_follower", {}, "it needs --robot-args port VALUE"),
        ("so101_follower", {"prot": "x"}, "has no 'prot'; it has"),
        ("so101_follower", {"port": "x", "use_degrees": "may"}, "use_degrees: Couldn't parse 'may' into a bool"),
        ("so101_follower", {"port": "x", "cameras": "{front: {type: opencvv}}"}, ", opencv, "),
        ("so101_follower", {"port": "x", "cameras": "{front: "}, "while parsing"),
        ("bi_so_follower", {"left_arm_config": "a", "left_arm_config.port": "a"}, "both as a whole and in parts"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            make_robot(kind, values)
        assert "\n" not in str(caught.value)


def test_a_dry_run_checks_everything_and_connects_nothing(monkeypatch, capsys):
    """The arm is LeRobot's own with servos of numbers; the policy is behind a server."""
    import policies.control.robots

    arms = []
    monkeypatch.setattr(
        policies.control.robots, "lerobot_robot", lambda kind, values: arms.append(so101(monkeypatch)) or arms[-1]
    )
    spec = ActionSpec(NAMES, (-90.0,) * 5 + (0.0,), (90.0,) * 5 + (100.0,), 20.0)

    def control(*words, spec=spec, cameras=("front",), proprio_dim=6):
        policy = Says(np.zeros((4, spec.dim)), PolicySpec(spec, cameras=cameras, proprio_dim=proprio_dim))
        with serve_in_thread(PolicyServer(policy, port=0)) as s:
            args = ["control", s.uri, "--robot", "so101_follower", "--robot-args", "port", "/dev/a", "cameras", CAMERA]
            code = main([*args, *words])
        assert not any(arm.bus.reads or arm.bus.is_connected for arm in arms), "never connected"
        return code, capsys.readouterr()

    code, said = control("--task", "go", "--dry-run", "--velocity", "wrist_roll.pos", "30", "--switches", "gripper.pos")
    assert code == 0 and "was not connected, nothing was sent" in said.out
    assert "wrist_roll.pos: position, -90 to 90, at most 30 a second" in said.out
    assert "gripper.pos: switch, 0 to 100" in said.out and "50 commands a second, from actions meant for 20" in said.out
    turned = ActionSpec(NAMES[::-1], spec.low[::-1], spec.high[::-1], 20.0)
    code, said = control("--task", "go", "--dry-run", "--switches", "gripper.pos", spec=turned)
    assert code == 0 and "reordered by name" in said.err and "gripper.pos: switch, 0 to 100" in said.out
    other = ActionSpec((*NAMES[:-1], "jaw.pos"), spec.low, spec.high, 20.0)
    for words, more, message in (
        (("--dry-run",), {}, "needs --task: say in words what the robot is to do"),
        ((), {}, "needs --task"),
        (("--task", " "), {}, "needs --task"),
        (("--task", "go", "--dry-run"), {"spec": other}, "not the same components"),
        (("--task", "go", "--dry-run"), {"cameras": ("front", "wrist")}, "reads camera 'wrist', the robot has front"),
        (("--task", "go", "--dry-run"), {"proprio_dim": 8}, "reads a state of 8 numbers, the robot reports 6"),
        (("--task", "go", "--dry-run", "--velocity", "wrist", "30"), {}, "velocity limit on unknown component 'wrist'"),
        (
            ("--task", "go", "--dry-run", "--limits", "wrist:0:1"),
            {},
            "--limits: so101_follower has no component 'wrist'",
        ),
        (("--task", "go", "--dry-run", "--switches", "grip"), {}, "--switches: so101_follower has no component 'grip'"),
    ):
        code, said = control(*words, **more)
        assert code == 2 and message in said.err.strip().splitlines()[-1], (words, said)


@pytest.mark.parametrize("width", [7, 32])
def test_a_stock_server_for_another_robot_is_one_line_before_anything_moves(monkeypatch, capsys, width):
    """openpi's servers say nothing about their actions: the first answer does."""
    import policies.control.robots

    arms = []
    monkeypatch.setattr(
        policies.control.robots, "lerobot_robot", lambda kind, values: arms.append(so101(monkeypatch)) or arms[-1]
    )

    def stock(ws):
        ws.send(wire.pack({}))
        for _ in ws:
            ws.send(wire.pack({"actions": np.zeros((10, width))}))

    with serve(stock, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        limits = [f"{name}:{low}:{high}" for name, (low, high) in LIMITS.items()]
        uri = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        args = ["control", uri, "--robot", "so101_follower", "--task", "go", "--no-estop-key", "--limits", *limits]
        assert main(args) == 2
        server.shutdown()
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"the policy's actions have {width} components, this robot takes 6 (shoulder_pan.pos" in said
    assert arms[0].bus.written == [] and not arms[0].bus.is_connected
