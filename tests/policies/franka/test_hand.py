"""The gripper's thread: commands return at once, however long the fingers take."""

import threading
import time
from types import SimpleNamespace

import pytest

from policies.franka.hand import Hand


class SlowGripper:
    """Each movement lasts until it is `finish`ed or stopped."""

    def __init__(self):
        self.calls, self.fails = [], False
        self._goes_on = threading.Semaphore(0)
        self.state = SimpleNamespace(width=0.08, max_width=0.08)

    def finish(self):
        self._goes_on.release()

    def move(self, width, speed):
        self._do("move", width)

    def grasp(self, width, speed, force, inner, outer):
        self._do("grasp", width)

    def stop(self):
        self.calls.append(("stop", None))
        self._goes_on.release()
        return True

    def _do(self, what, width):
        self.calls.append((what, width))
        assert self._goes_on.acquire(timeout=5)
        if self.fails:
            raise RuntimeError("the fingers are blocked")
        self.state.width = width


@pytest.fixture
def gripper():
    return SlowGripper()


@pytest.fixture
def hand(gripper):
    hand = Hand(gripper, speed_m_s=0.1, force_n=30.0)
    yield hand
    gripper.finish()
    hand.close()


def until(true, seconds=3.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    assert true()


def test_a_command_does_not_wait_and_the_width_follows(hand, gripper):
    assert hand.open is None and hand.widest_m == 0.08
    hand.command(False)
    until(lambda: gripper.calls == [("grasp", 0.0)])
    assert hand.open is False and hand.width_m == 0.08
    gripper.finish()
    until(lambda: hand.width_m == 0.0)
    hand.command(False)  # it is closed
    hand.command(True)
    until(lambda: gripper.calls[1:] == [("move", 0.08)])
    gripper.finish()
    until(lambda: hand.width_m == 0.08)


def test_the_other_way_breaks_off_what_is_done(hand, gripper):
    hand.command(False)
    until(lambda: gripper.calls == [("grasp", 0.0)])
    hand.command(True)
    until(lambda: gripper.calls[1:] == [("stop", None), ("move", 0.08)])
    assert hand.trouble is None


def test_fingers_that_do_not_move_are_told(hand, gripper):
    gripper.fails = True
    hand.command(False)
    gripper.finish()
    until(lambda: hand.trouble is not None)
    assert "does not close: the fingers are blocked" in hand.trouble
