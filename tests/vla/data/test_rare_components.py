"""A component of the action or the proprio that rarely moves: it is scaled by its extremes, and the user is told."""

import re

import numpy as np
import pytest

from bascule.commands import doctor
from bascule.main import main
from tests.vla.data.odd_recordings import train_arguments, write_dataset
from vla.data.findings import faint_findings
from vla.data.lerobot_dataset import load_dataset
from vla.model.policy import VLAPolicy
from vla.processing.stats import Stats, VectorStats


def rare(frames=10_000, share=0.007, noise=1e-5):
    """(F, 2): an ordinary component, and one of noise that is 1.0 in a few frames."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=frames), noise * rng.normal(size=frames)], axis=-1)
    values[:: round(1 / share), 1] = 1.0
    return values


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-5, 1e-3, 5e-3])
@pytest.mark.parametrize("share", [0.0003, 0.007])
def test_a_rare_component_is_scaled_by_its_extremes(noise, share):
    values = rare(share=share, noise=noise)
    stats = VectorStats.from_array(values, name="action")
    centre, half = stats.affine()
    target = (values - centre) / half
    assert np.abs(target[:, 1]).max() <= 1 + 1e-9
    assert half[1] + centre[1] == pytest.approx(1.0)  # a network that answers 1 commands 1.0
    np.testing.assert_array_equal([stats.q01[0], stats.q99[0]], np.quantile(values[:, 0], [0.01, 0.99]))


def test_a_rare_negative_and_a_rare_proprio_component_are_alike():
    values = rare()
    values[::200, 1] = -3.0
    for part in (Stats.from_arrays(values, values).action, Stats.from_arrays(values, values).proprio):
        centre, half = part.affine()
        assert centre[1] - half[1] == pytest.approx(-3.0) and centre[1] + half[1] == pytest.approx(1.0)


def test_ordinary_components_keep_their_quantiles_to_the_bit():
    rng = np.random.default_rng(0)
    n = 30_000
    still = np.where(rng.random(n) < 0.9, 1e-5 * rng.normal(size=n), rng.uniform(-1, 1, n))
    values = np.stack(
        [
            rng.normal(size=n),
            rng.uniform(size=n),
            rng.laplace(size=n),
            rng.standard_t(3, n),
            rng.lognormal(size=n),
            still,
        ]
    ).T
    stats = VectorStats.from_array(values, name="action")
    np.testing.assert_array_equal([stats.q01, stats.q99], np.quantile(values, [0.01, 0.99], axis=0))


@pytest.mark.parametrize(
    ("centre", "noise", "unmoved"),
    [
        (12.5, 0.0, True),
        (12.5, 1e-6, True),  # the last digits of float32
        (90.0, 7.6e-6, True),
        (12.5, 1e-4, True),
        (0.0, 1e-7, True),
        (0.8, 2e-3, False),  # a hand that goes up and down by millimetres
        (4_000_000.0, 50.0, False),  # an encoder's counts
        (0.0, 1e-4, False),  # nothing but the others tells
    ],
)
def test_a_state_that_moves_by_its_noise_alone_reads_0_wherever_it_goes(centre, noise, unmoved):
    rng = np.random.default_rng(0)
    values = rng.uniform(-40, 40, (500, 3))
    values[:, 1] = centre + noise * rng.uniform(-1, 1, 500)
    stats = Stats.from_arrays(values, values)
    assert stats.proprio.unmoved.tolist() == [False, unmoved, False]
    middle, half = stats.proprio.state_affine()
    read = (np.array([10.0, centre + 0.1, 10.0]) - middle) / half
    assert (read[1] == 0.0) == unmoved and np.isfinite(read).all() and read[0] != 0
    assert np.isfinite(stats.action.affine()[1]).all(), "an action is always scaled back"
    (finding,) = faint_findings("observation.state", values, ("a", "b", "c")) or (None,)
    if unmoved and noise > 0:
        assert finding.severity == "note" and "'b' stays within" in finding.text
    elif noise == 1e-4:
        assert finding.severity == "warning" and "'b' moves by 0.0002 in all, where the others move by" in finding.text
    else:
        assert finding is None


def test_statistics_of_an_old_checkpoint_scale_as_they_did():
    """The floor acts when statistics are made, not when they are used."""
    old = VectorStats(q01=(-3e-5,), q99=(3e-5,), min=(-4e-5,), max=(1.0,), mean=(0.007,), std=(0.08,))
    assert old.affine()[1].tolist() == [3e-5]


def test_a_rare_component_and_a_teleoperator_s_names_reach_the_checkpoint(tmp_path, capsys, monkeypatch):
    """Through `vla doctor` and `vla train`, with the names as LeRobot's gamepad gives them."""
    action = rare(300, share=0.0067)
    root = write_dataset(tmp_path / "rare", (150, 150), action=action, names={"gripper": 1, "delta_x": 0})
    (warning,) = load_dataset(root).warnings()
    assert re.search(r"action component 'gripper' reaches -\S+\.\.1 but stays in \S+ in 98% of the frames", warning)
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert main(["doctor", "--dataset", str(root)]) == 0
    assert "component 'gripper' reaches" in capsys.readouterr().out
    assert main(train_arguments(tmp_path / "out", root)) == 0
    assert "warning: rare: action component 'gripper' reaches" in " ".join(capsys.readouterr().err.split())
    policy = VLAPolicy.load(tmp_path / "out")
    assert policy.spec.action_spec.names == ("delta_x", "gripper") and policy.spec.action_spec.high[1] == 1.0
    processor = policy.vla.processor
    assert np.abs(processor.normalise_action(action.astype(np.float32))[:, 1]).max() <= 1 + 1e-6
    assert processor.unnormalise_action(np.array([0, 1], np.float32))[1] == pytest.approx(1.0)


def test_one_wild_frame_of_fewer_than_a_hundred_is_told(tmp_path):
    """The 99% quantile of 75 frames lies a quarter of the way to the largest: one glitch sets the scale."""
    state = np.random.default_rng(0).normal(size=(75, 2))
    state[33, 1] = 3e38
    (warning,) = load_dataset(write_dataset(tmp_path, (75,), state=state.astype(np.float32))).warnings()
    assert re.search(r"component 'observation.state_1' reaches -\S+\.\.3e\+38 but stays in \S+ in 98%", warning)
