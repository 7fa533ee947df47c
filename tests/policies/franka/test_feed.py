"""Pictures over a socket, from the cell's windows to LeRobot's camera."""

import time

import numpy as np
import pytest

from bascule.franka_cell.windows import Windows
from policies.control.robots import lerobot_robot
from policies.franka.config_franka import FeedCameraConfig
from policies.franka.feed import FeedCamera, address_of, ask, cameras_of


@pytest.fixture
def windows():
    windows = Windows("127.0.0.1", 0, ("front", "wrist"), 8, lambda request: {"echo": request})
    yield windows
    windows.close()


def camera(windows, name="wrist", **size):
    (config,) = [cameras_of(windows.address)["wrist"]] if not size else [None]
    return FeedCamera(config or FeedCameraConfig(address=windows.address, name=name, **size))


def pictures(value):
    return np.stack([np.full((8, 8, 3), value, np.uint8), np.full((8, 8, 3), value + 1, np.uint8)])


def test_pictures_arrive_bit_for_bit_and_a_peek_does_not_use_them_up(windows):
    seen = camera(windows)
    seen.connect(warmup=False)
    with pytest.raises(TimeoutError, match="shows nothing new"):
        seen.read_latest()
    until = time.monotonic() + 3
    while windows.watched == 0 and time.monotonic() < until:
        time.sleep(0.002)
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    windows.show(shown, 1.0)
    np.testing.assert_array_equal(seen.async_read(3000), shown[1])
    np.testing.assert_array_equal(seen.read_latest(10_000), shown[1])
    with pytest.raises(TimeoutError):
        seen.async_read(10)  # read before
    with pytest.raises(TimeoutError):
        seen.read_latest(0)  # too old
    windows.show(pictures(7), 2.0)
    assert (seen.async_read(3000) == 8).all()
    seen.disconnect()
    seen.disconnect()
    assert not seen.is_connected


def test_a_feed_that_ends_is_not_connected_any_more(windows):
    windows.show(pictures(1), 1.0)
    seen = camera(windows)
    seen.connect()
    assert seen.is_connected
    windows.close()
    with pytest.raises(TimeoutError):
        seen.async_read(3000)
    assert not seen.is_connected


def test_cameras_and_sizes_that_are_not_there_are_named(windows):
    with pytest.raises(ValueError, match="no camera 'left': front, wrist"):
        camera(windows, "left", width=8, height=8).connect()
    with pytest.raises(ValueError, match="shows 8x8 pixels, not 96x96"):
        camera(windows, width=96, height=96).connect()
    with pytest.raises(ValueError, match="HOST:PORT"):
        address_of("127.0.0.1")
    assert ask(windows.address, {"do": "x"}) == {"echo": {"do": "x"}}
    windows.close()
    with pytest.raises(ConnectionError, match="nothing answers"):
        ask(windows.address, {"do": "x"})


def test_the_robot_takes_all_cameras_of_a_feed_or_those_that_are_named(windows, monkeypatch):
    monkeypatch.setattr("policies.franka.franka.importlib.util.find_spec", lambda name: object())
    robot = lerobot_robot("franka", {"host": "127.0.0.1", "feed": windows.address})
    assert {name: shape for name, shape in robot.observation_features.items() if isinstance(shape, tuple)} == {
        "front": (8, 8, 3), "wrist": (8, 8, 3),
    }  # fmt: skip
    one = f"{{left: {{type: feed, address: '{windows.address}', width: 8, height: 8}}}}"
    robot = lerobot_robot("franka", {"host": "127.0.0.1", "cameras": one, "state": "full"})
    assert list(robot.cameras) == ["left"] and robot.cameras["left"].config.name == "left"
    assert len(robot.observation_features) == 8 + 2 + 14 + 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "it needs --robot-args host VALUE"),
        ({"host": "h", "arm": "ur5"}, "unknown arm 'ur5'"),
        ({"host": "h", "motion.acceleration_m_s2": "20"}, "at most 9, the limit of arm fr3"),
        ({"host": "h", "feed": "127.0.0.1:9"}, "nothing answers at 127.0.0.1:9"),
    ],
)
def test_settings_that_no_arm_has_are_one_line(values, told, monkeypatch):
    monkeypatch.setattr("policies.franka.franka.importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError) as error:
        lerobot_robot("franka", values)
    assert told in str(error.value) and "\n" not in str(error.value) and "FrankaConfig(" not in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("policies.franka.franka.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"franky-control is missing: ./run setup franka$"):
        lerobot_robot("franka", {"host": "127.0.0.1"})
