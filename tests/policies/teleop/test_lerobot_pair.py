"""LeRobot's own interfaces on both sides: its robot driven by a policy, its teleoperator in a person's hand."""

import numpy as np

from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.guards import GuardConfig
from policies.control.robots import LeRobotRobot, lerobot_robot
from policies.teleop.takeover import TAKE_OVER_KEY, TakeOver
from policies.teleop.teleoperators import lerobot_teleoperator
from tests.policies.control.toy_robot import Clock, Says


def test_a_lerobot_teleoperator_by_name_takes_over_from_a_policy_on_a_lerobot_robot_by_name():
    device = lerobot_robot("bascule_tabletop", {"image_size": "24", "seed": "7"})
    limits = dict.fromkeys(device.action_features, (-1.0, 1.0))
    clock, told = Clock(), {"instruction": "pick up the cube", "control_hz": 20.0, "limits": limits}
    robot = LeRobotRobot(device, **told, switches=("gripper.pos",), clock=clock)
    who = TakeOver(lerobot_teleoperator("bascule_expert", {}), robot, GuardConfig())
    assert who.by == "key"
    asked = []

    def pressed():  # looked at in every tick, as a terminal is
        asked.append(clock())
        if len(asked) == 12:
            assert who.key(TAKE_OVER_KEY)
        return False

    policy = Says(np.array([[0.0, 0.0, 0.2, 1.0]] * 8, np.float32))
    settings = ControlConfig(duration_s=2.6, asynchronous=False)
    report = control(robot, policy, settings, person=who, pressed=pressed, clock=clock, sleep=clock.sleep)
    assert report.ended == "time" and report.takeovers == 1 and report.drivers["human"] > 30
    assert device.successes == 1, "the expert's hand lifted what the policy had left"
