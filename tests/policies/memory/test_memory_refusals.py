"""Everything that does not go with a memory says so in one line, and the controller begins with an empty one."""

import pytest

from bascule.main import main
from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.lerobot.modeling_bascule import wrap
from rl.models.vla_network import make_actor
from tests.policies.control.toy_robot import STEADY, Clock, Says, Slide, drive
from tests.vla.depth_policy import policy as reads_depth
from tests.vla.small_policy import small_policy
from vla.core.types import PolicySpec
from vla.model.config import MemoryConfig
from vla.model.model import VLA
from vla.training.recipes import RECIPES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_policy(tmp_path_factory.mktemp("policy") / "plain", memory=MemoryConfig(2))


def test_rl_and_lerobot_refuse_it(checkpoint):
    vla = VLA.load(checkpoint)
    with pytest.raises(ValueError, match="start from one without --memory"):
        make_actor(vla, vla.action_spec.names)
    with pytest.raises(ValueError, match="use `vla eval`"):
        wrap(VLA.load(checkpoint))
    with pytest.raises(ValueError, match="give no calibrated depth, which this policy reads"):
        wrap(reads_depth())


def test_the_train_command_names_what_does_not_go_together(tmp_path, capsys):
    for flags, words in (
        (["--memory-frames", "3"], "--memory-frames goes with --memory"),
        (["--memory", "bank", "--tune", "full"], "leave out --tune, or --memory"),
        (["--memory", "bank", "--augment"], "leave out --augment, --randomise or --memory"),
        (["--memory", "bank", "--memory-frames", "0"], "at least one frame"),
    ):
        assert main(["train", "--dataset", str(tmp_path), "--out", str(tmp_path / "out"), *flags]) == 2
        assert words in capsys.readouterr().err
    assert RECIPES["tabletop"]().model.memory is None


class Mind(Says):
    """Notes at every decision how many it has made since its last reset."""

    def __init__(self):
        super().__init__(STEADY, PolicySpec(chunk_size=8, n_action_steps=2, memory_frames=3))
        self.noted, self.since_reset = [], 0

    def reset(self, env_ids=None):
        self.since_reset = 0

    def act(self, obs):
        self.noted.append(self.since_reset)
        self.since_reset += 1
        return super().act(obs)


def test_the_warm_up_is_no_decision_of_the_episode_and_decisions_come_in_turn():
    mind = Mind()
    drive(mind)
    assert mind.noted[:4] == [0, 0, 1, 2]  # warm-up, then the episode
    following = Slide(clock := Clock(), on_tick=lambda robot: setattr(robot, "scenes", int(robot.looks > 20)))
    mind = Mind()
    control(following, mind, ControlConfig(duration_s=1.0, asynchronous=False), clock=clock, sleep=clock.sleep)
    again = mind.noted.index(0, 2)  # the robot's second scene
    assert again > 3 and mind.noted[again:] == list(range(len(mind.noted) - again))
    with pytest.raises(ValueError, match="leave out n_action_steps and in_flight"):
        drive(Mind(), n_action_steps=3)
    with pytest.raises(ValueError, match="leave out n_action_steps and in_flight"):
        control(Slide(), Mind(), ControlConfig(in_flight=2), Mind())
    chooses = Says(STEADY, PolicySpec(chunk_size=8, n_action_steps=2, routes=True))
    with pytest.raises(ValueError, match="every connection would choose for itself: leave out in_flight"):
        control(Slide(), chooses, ControlConfig(in_flight=2), chooses)
