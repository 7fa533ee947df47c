"""`vla experiment xyz`, and the commands that carry depth: demonstrations, training, evaluation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from bascule.experiments.spatial.azimuths import HELD_OUT, trained_azimuths
from bascule.experiments.spatial.calibration import WRONG_DEG, Miscalibrated
from bascule.experiments.spatial.xyz import XYZExperimentConfig, xyz
from bascule.main import main
from tests.vla.depth_policy import observation, policy
from vla.core.config import load_json
from vla.model.config import XYZConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy


def test_no_azimuth_of_the_evaluation_is_one_of_the_training():
    for seed in range(200):
        drawn = trained_azimuths(seed)
        assert drawn == trained_azimuths(seed) and len(set(drawn)) == len(drawn) == 4
        assert min(abs(one - other) for one, other in itertools.product(drawn, HELD_OUT)) >= 4
    assert len({trained_azimuths(seed) for seed in range(200)}) == 200
    assert min(HELD_OUT) > -60 and max(HELD_OUT) < 52  # between the trained ones, not beyond


def test_wrong_calibration_misplaces_everything_by_a_third_of_its_distance_also_the_middle():
    """A control that leaves the middle of the workspace where it is would hardly mislead."""
    middle, heard = np.array(XYZConfig().centre_m), []

    class Listens:
        spec = VLAPolicy(policy()).spec

        def act(self, obs, *, prefix=None):
            heard.append(obs)
            return np.zeros((3, 8, 4), np.float32)

    obs = observation()
    Miscalibrated(Listens(), WRONG_DEG).act(obs)
    for camera, matrices in obs.extrinsics.items():
        for true, told in zip(matrices, heard[0].extrinsics[camera], strict=True):
            local = np.linalg.inv(true) @ [*middle, 1.0]  # as the camera saw it
            moved = (told @ local)[:3] - middle
            away = np.hypot(*local[[0, 2]])  # from the axis about which it is turned
            assert np.linalg.norm(moved) == pytest.approx(2 * np.sin(np.deg2rad(10)) * away, rel=1e-3)
    assert obs.images is heard[0].images and heard[0].depth is obs.depth
    with pytest.raises(ValueError, match="no calibration"):
        Miscalibrated(Listens(), WRONG_DEG).act(replace(obs, extrinsics=None))


def test_commands_carry_depth_from_demonstrations_to_evaluation(tmp_path, capsys):
    def run(*words):
        assert main([str(word) for word in words]) in (0, None)

    azimuths = ("--perturb", "azimuths=-20,20")
    run("demos", "tabletop-pick", "--episodes", 1, "--workers", 1, "--depth", *azimuths, "--out", tmp_path / "d")
    trained = ("--recipe", "smoke", "--steps", 4, "--num-threads", 1, "--out", tmp_path / "p")
    run("train", "--dataset", tmp_path / "d", "--xyz", *trained)
    assert "depth maps are left out" not in capsys.readouterr().err
    played = ("--episodes", 2, "--num-envs", 2, "--workers", 1, "--no-controls", "--json", tmp_path / "e.json")
    run("eval", tmp_path / "p", *played, "--perturb", "azimuths=40")
    result = load_json(tmp_path / "e.json")
    assert result["episodes"] == 2 and result["perturb"]["azimuths"] == [40.0]
    vla = VLA.load(tmp_path / "p")
    assert vla.config.xyz == XYZConfig() and vla.processor.config.depth
    robot = ("--duration-s", "1", "--hz", "20")
    assert main(["control", str(tmp_path / "p"), *robot]) == 2
    assert "the policy reads depth and calibration of its cameras, the robot gives none" in capsys.readouterr().err


@pytest.mark.slow
def test_rl_goes_on_from_a_policy_that_reads_depth(tmp_path):
    def run(*words):
        assert main([str(word) for word in words]) in (0, None)

    run("demos", "tabletop-pick", "--episodes", 1, "--workers", 1, "--depth", "--out", tmp_path / "d")
    trained = ("--recipe", "smoke", "--steps", 4, "--num-threads", 1, "--out", tmp_path / "p")
    run("train", "--dataset", tmp_path / "d", "--xyz", *trained)
    run("rl", "smoke", "--init", tmp_path / "p", "--workers", 1, "--perturb", "azimuths=9", "--out", tmp_path / "rl")
    assert VLA.load(tmp_path / "rl" / "best").config.xyz == XYZConfig()


def test_arms_share_policies_and_the_control_is_told_of_other_cameras(tmp_path, monkeypatch):
    config = XYZExperimentConfig(
        arms=("xyz", "xyz-wrong"), seeds=(0,), demos=1, steps=2, episodes=2, num_envs=2, workers=1
    )
    result = xyz(config, tmp_path)
    assert set(result["arms"]) == set(config.arms) and result["seeds"] == [0]
    for counts in result["arms"].values():
        assert counts["episodes"] == 2 and counts["replan_ratio"] > 0
    policies = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("policy-0"))
    assert policies == ["xyz-policy-0"]
    again = xyz(replace(config, arms=("xyz",)), tmp_path)  # kept, not played again
    assert again["arms"]["xyz"] == result["arms"]["xyz"]
    with pytest.raises(ValueError, match="did you mean 'xyz'"):
        xyz(replace(config, arms=("xy",)), tmp_path)
