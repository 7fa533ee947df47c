"""Learning from corrections: which frames count, how often they are drawn, and the runs that are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bascule.main import main
from tests.vla.data.test_data import lerobot  # noqa: F401 (fixture)
from tests.vla.training.test_train import CONFIG, assert_bit_equal, demos, fresh, weights
from tests.vla.training.test_train_command import arm, command  # noqa: F401 (fixture)
from vla.checking.check import check_dataset
from vla.data.lerobot_dataset import load_dataset
from vla.training.interventions import Drawn, corrected_lines, demonstrated, learnt, shuffled
from vla.training.train import train
from vla.training.train_config import InterventionConfig

BY_HAND = [0, 0, 1, 1, 0, 0] + [0] * 6 + [0, 1, 1, 0, 0, 1] + [1, 1, 1, 1, 1, 1]
"""Four episodes of six frames."""


def corrected():
    return replace(demos(seed=1), intervention=np.array(BY_HAND, bool))


def test_only_what_the_person_did_is_learnt_and_a_chunk_ends_where_they_handed_back():
    data = corrected()
    kept = learnt(InterventionConfig(), {"demos": demos(), "corrections": data})
    assert kept["demos"].num_frames == 24
    part, rows = kept["corrections"], np.flatnonzero(BY_HAND)
    np.testing.assert_array_equal(part.proprio, data.proprio[rows])
    action, mask = part.chunks(4)
    starts = [2, 3, 13, 14, 17, 18, 19, 20, 21, 22, 23]
    left = [2, 1, 2, 1, 1, 6, 5, 4, 3, 2, 1]  # frames to the end of the stretch, or of the episode
    assert mask.sum(1).tolist() == [min(n, 4) for n in left] and rows.tolist() == starts
    for row, start, count in zip(action, starts, left, strict=True):
        np.testing.assert_array_equal(row[: min(count, 4)], data.action[start : start + min(count, 4)])
    assert demonstrated(data).num_frames == 11 and demonstrated(demos()).num_frames == 24
    everything = learnt(InterventionConfig(policy_frames="learn"), {"corrections": data})["corrections"]
    assert everything.num_frames == 24 and everything.episodes == data.episodes


@pytest.mark.parametrize("weight", [None, 1.0, 5.0])
def test_a_persons_frames_are_drawn_so_often(weight):
    config = InterventionConfig(weight, "learn")
    drawn = Drawn(config, {"demos": demos(), "corrections": corrected()})
    human = np.array([False] * 24 + [bool(one) for one in BY_HAND])
    found = torch.cat([drawn.frames(0, step, 16) for step in range(600)]).numpy()
    count = np.bincount(found, minlength=48) / len(found)
    times = 37 / 11 if weight is None else weight  # 11 of 48 are theirs
    each = 1 / (times * 11 + 37)
    np.testing.assert_allclose(count[human], times * each, rtol=0.25)
    np.testing.assert_allclose(count[~human], each, rtol=0.35)
    if weight is None:
        assert human[found].reshape(600, 16).sum(1).tolist() == [8] * 600, "half of each batch"


def test_shuffled_corrections_keep_everything_but_which_action_belongs_to_which_frame():
    data = corrected()
    mixed, rows = shuffled(data, 3), np.array(BY_HAND, bool)
    np.testing.assert_array_equal(mixed.action[~rows], data.action[~rows])
    assert sorted(mixed.action[rows].tolist()) == sorted(data.action[rows].tolist())
    assert (mixed.action[rows] != data.action[rows]).any(1).sum() > 5


def test_an_interrupted_run_on_corrections_ends_as_an_uninterrupted_one(tmp_path):
    cfg = replace(CONFIG, interventions=InterventionConfig())
    data = {"demos": demos(), "corrections": corrected()}

    def begun():
        return fresh(cfg)

    whole, parts = begun(), begun()
    train(cfg, whole, data, tmp_path / "whole")

    def stop(state):
        if state.stage == "train" and state.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cfg, parts, data, tmp_path / "parts", on_step=stop)
    resumed = begun()
    train(cfg, resumed, data, tmp_path / "parts", resume=True)
    assert_bit_equal(weights(whole), weights(resumed))
    plain = begun()
    train(CONFIG, plain, data, tmp_path / "plain")
    assert any(not torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(plain).values(), strict=True))
    other = replace(cfg, interventions=InterventionConfig(2.0))
    with pytest.raises(ValueError, match="interventions"):
        train(other, begun(), data, tmp_path / "parts", resume=True)


def test_lines_say_whose_frames_are_learnt():
    both = {"demos": demos(), "mine": corrected()}
    told = "mine: 11 frames of 24 by a person, who took over 4 times"
    assert corrected_lines(InterventionConfig(), both) == [f"{told}; the policy's are left out"]
    assert corrected_lines(InterventionConfig(policy_frames="learn"), both) == [told]
    first, _ = corrected_lines(InterventionConfig(), {"mine": both["mine"]})
    assert "--intervention-weight changes nothing: give the demonstrations, too" in first
    (warning,) = corrected_lines(None, both)
    assert warning.startswith("warning: ") and "--intervention-weight half" in warning
    assert corrected_lines(None, {"demos": demos()}) == []
    nobody = replace(demos(), intervention=np.zeros(24, bool))
    with pytest.raises(ValueError, match="nobody ever took over"):
        corrected_lines(InterventionConfig(), {"mine": nobody})


@pytest.fixture(scope="module")
def lerobots(lerobot, tmp_path_factory):  # noqa: F811
    """Corrections as LeRobot's strategy dagger records them."""
    root = tmp_path_factory.mktemp("dagger") / "dagger"
    features = {
        "observation.image": {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "gripper"]},
        "intervention": {"dtype": "bool", "shape": (1,), "names": None},
    }
    recorder = lerobot.LeRobotDataset.create("local/d", fps=10, root=root, features=features, use_videos=False)
    rng = np.random.default_rng(2)
    for step in range(8):
        frame = {"observation.image": rng.integers(0, 256, (48, 64, 3), np.uint8)}
        frame["observation.state"] = rng.normal(size=2).astype(np.float32)
        frame["action"] = rng.normal(size=3).astype(np.float32)
        frame["intervention"] = np.array([step >= 5])
        recorder.add_frame(frame | {"task": "push the tee"})
    recorder.save_episode()
    recorder.finalize()
    return root


def test_the_command_learns_from_lerobots_corrections_and_refuses_the_rest(arm, lerobots, tmp_path, capsys):  # noqa: F811
    assert load_dataset(lerobots).intervention.tolist() == [False] * 5 + [True] * 3
    assert "intervention" not in " ".join(finding.text for finding in check_dataset(lerobots).findings)
    command(tmp_path / "start", arm).run()
    capsys.readouterr()
    again = ["train", "--init", str(tmp_path / "start"), "--recipe", "smoke", "--steps", "3", "--batch-size", "4"]
    to = ["--out", str(tmp_path / "out"), "--dataset"]
    assert main([*again, *to, str(arm), str(lerobots), "--intervention-weight", "half"]) == 0
    assert "dagger: 3 frames of 8 by a person, who took over 1 times; the policy's are" in capsys.readouterr().err

    def refused(*words):
        assert main(["train", "--recipe", "smoke", "--out", str(tmp_path / "no"), "--dataset", *words]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert len(said) == 1, said
        return said[0]

    start = ("--init", str(tmp_path / "start"))
    assert "none of the datasets (arm) says where a person" in refused(
        str(arm), *start, "--intervention-weight", "half"
    )
    assert "name it with --init" in refused(str(lerobots), "--intervention-weight", "half")
    assert "interventions.weight must be a positive" in refused(str(lerobots), *start, "--intervention-weight", "0")
    assert "must be half or a number, got 'all'" in refused(str(lerobots), *start, "--intervention-weight", "all")
    assert "--policy-frames goes with" in refused(str(lerobots), *start, "--policy-frames", "learn")
    good = (str(lerobots), *start, "--intervention-weight", "half", "--advantage")
    assert "interventions say how often frames are drawn, and advantage does, too" in refused(*good)
