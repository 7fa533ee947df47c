"""`vla experiment latency`: what arrives when, on a world whose actions are known; and the command on a real one."""

import json

import numpy as np
import pytest

from bascule.experiments.latency import CONDITIONS, TIMEOUT_S, Condition, play
from bascule.main import main
from vla.core.types import ActionSpec, Observation, PolicySpec, StepResult

SPEC = ActionSpec(("dx", "gripper"), (-1.0, -1.0), (1.0, 1.0), 20.0)


class Line:
    """Two hands on a line, for 24 control steps. Remembers what it was told, and when it drew pictures."""

    num_envs, action_spec = 2, SPEC

    def __init__(self):
        self.told, self.drawn, self.render = [], [], True

    def set_rendering(self, on):
        self.render = on

    def reset(self, *, seeds, tasks=None, env_ids=None):
        self.t, self.x = 0, np.zeros(2)
        return self.observation()

    def observation(self):
        proprio = np.stack([self.x, np.full(2, self.t), np.zeros(2)], 1).astype(np.float32)
        return Observation({"front": np.zeros((2, 4, 4, 3), np.uint8)}, proprio, ["go", "go"])

    def step_chunk(self, chunk):
        assert chunk.shape == (2, 1, 2)
        self.told.append(chunk[:, 0].copy())
        self.t, self.x = self.t + 1, self.x + chunk[:, 0, 0]
        if self.render:
            self.drawn.append(self.t)
        over, none = np.full(2, self.t == 24), np.zeros(2, bool)
        return StepResult(
            self.observation(), np.zeros(2, np.float32), over, none, np.ones(2, np.int64), {"success": over}
        )


class Counts:
    """Says when it looked (in hundredths) and which of its 8 actions this is (in thousandths)."""

    spec = PolicySpec(SPEC, chunk_size=8, n_action_steps=4, takes_prefix=True)

    def __init__(self):
        self.batches, self.prefixes = [], []

    def act(self, obs, *, prefix=None):
        if prefix is not None:
            self.prefixes.append(prefix)
        self.batches.append(len(obs.proprio))
        steps = np.arange(8) / 1000
        dx = obs.proprio[:, 1:2] / 100 + steps
        return np.stack([dx, np.ones_like(dx)], axis=-1).astype(np.float32)


def told(join, condition):
    env, policy = Line(), Counts()
    row = play(policy, env, [1, 2], join=join, condition=condition)
    assert row["successes"] == row["episodes"] == 2
    looked = np.array(env.told)[:, 0, 0]
    return env, policy, row, np.floor(looked * 100 + 1e-3).astype(int), np.round(looked * 1000).astype(int) % 10


def test_without_latency_every_fourth_step_is_a_look_at_now():
    env, policy, row, seen, step = told("waits", Condition(0.0))
    np.testing.assert_array_equal(seen, np.arange(24) // 4 * 4)
    np.testing.assert_array_equal(step, np.arange(24) % 4)
    assert row["delay"] == 0


def test_an_answer_that_takes_200_ms_is_played_four_steps_later_from_its_fifth_action_on():
    env, policy, row, seen, step = told("switch", Condition(0.2))
    assert not seen[:4].any() and not step[:4].any(), "nothing to play yet: held"
    # The first answer (of step 0) begins when it comes, nothing of it having been played.
    np.testing.assert_array_equal(step[4:8], [0, 1, 2, 3])
    np.testing.assert_array_equal(seen[12:16], 8 * np.ones(4)), np.testing.assert_array_equal(step[12:16], [4, 5, 6, 7])
    np.testing.assert_array_equal(seen[16:20], 12 * np.ones(4))
    assert set(policy.batches) == {2}, "both worlds ask at once and are answered in one batch"
    assert len(env.drawn) < 12, "frames that nobody sees are not drawn"
    assert row["jerk"] > 0


def test_pipelined_it_asks_at_every_step_and_every_answer_is_as_late_as_the_link():
    _, policy, row, _, _ = told("pipelined", Condition(0.2))
    _, patient, _, _, _ = told("blend", Condition(0.2))
    assert len(policy.batches) >= 19 > 8 >= len(patient.batches)
    assert 3.0 < row["delay"] <= 4, "4, but for the first ones, which a robot at rest waits for"


def test_rtc_tells_the_policy_what_is_left_and_how_long_it_takes():
    _, policy, _, _, _ = told("rtc", Condition(0.2))
    last = policy.prefixes[-1]
    assert last.left.tolist() == [4, 4] and last.delay.tolist() == [4, 4]


def test_a_lost_answer_is_asked_for_again_and_meanwhile_the_robot_holds():
    _, _, _, seen, _ = told("switch", Condition(0.1, drops=1.0))
    assert not seen.any(), "no answer ever came"
    rng = np.random.default_rng(0)
    draws = [Condition(0.1, jitter_s=0.05, stalls=0.2, drops=0.3).draw(rng) for _ in range(2000)]
    lost = [seconds for seconds, comes in draws if not comes]
    there = np.array([seconds for seconds, comes in draws if comes])
    assert 500 < len(lost) < 700 and set(lost) == {TIMEOUT_S}
    assert 0.15 < np.mean(there > 0.5) < 0.25 and there.min() >= 0.05 and np.all((there < 0.15) | (there > 0.55))


def test_the_command_reports_every_cell_and_keeps_it(tmp_path, capsys):
    from vla.model.config import BridgeConfig, VLAConfig
    from vla.model.model import VLA
    from vla.processing.processor import Stats

    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    spec = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)
    config = VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32))
    VLA.build(config, stats=stats, action_spec=spec, cameras=("front", "wrist")).save(tmp_path / "tiny")
    arguments = ["experiment", "latency", "--policy", str(tmp_path / "tiny"), "--out", str(tmp_path / "out")]
    arguments += ["--arms", "blend", "--conditions", "200 ms", "--episodes", "1", "--num-envs", "1"]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["arms"]) == ["tiny: no latency", "tiny: blend, 200 ms"] and "commit" in result
    assert result["backbone"] == "tiny" and result["arms"]["tiny: blend, 200 ms"]["delay"] >= 3
    capsys.readouterr()
    assert main([*arguments, "--arms", "rtc"]) == 2 and "flow head" in capsys.readouterr().err
    assert main([*arguments, "--episodes", "2"]) == 2 and "--out" in capsys.readouterr().err
    (tmp_path / "out" / "tiny-waits-0ms.json").rename(tmp_path / "whole.json")
    (tmp_path / "out" / "tiny-waits-0ms.json").touch()  # a power cut
    assert main(arguments) == 2
    line = "tiny-waits-0ms.json is damaged: remove it, and the same command plays it again\n"
    assert capsys.readouterr().err.endswith(line)
    (tmp_path / "whole.json").rename(tmp_path / "out" / "tiny-waits-0ms.json")
    assert main(arguments) == 0
    other = VLA.load(tmp_path / "tiny")
    other.head.out.bias.data.add_(0.1)
    other.save(tmp_path / "tiny")
    assert main(arguments) == 2, "trained anew in the same folder"
    assert f"holds results of other weights, which {tmp_path / 'tiny'} held before" in capsys.readouterr().err
    assert main(["experiment", "latency"]) == 2 and "--policy" in capsys.readouterr().err
    assert main(["experiment", "latency", "--policy", "x", "--demos", "3"]) == 2
    assert "--demos" in capsys.readouterr().err


def test_unknown_conditions_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"checkpoint": {}}')  # it is not looked into before the conditions
    assert main(["experiment", "latency", "--policy", str(tmp_path), "--conditions", "200ms"]) == 2
    assert "200 ms" in capsys.readouterr().err and "300 ms" in CONDITIONS


@pytest.mark.parametrize("join", ["blend", "ensemble", "pipelined"])
def test_joins_run_under_every_condition(join):
    for condition in CONDITIONS.values():
        told(join, condition)


def test_what_may_change_under_the_same_names_is_part_of_what_was_asked(tmp_path):
    from bascule.experiments.arms import played_with

    text = (
        'description = "plates"\nscene = "counter"\ntasks = ["plate"]\nobjects_per_episode = 2\n'
        "plates_per_episode = 1\nhorizon = 5\neval_seed0 = 5_000_000\n"
    )
    (suite := tmp_path / "k.toml").write_text(text)
    first = played_with("expert", str(suite))
    for old, new, same in (('plates"', 'dishes"', True), ("= 2", "= 3", False), ("= 5\n", "= 6\n", False)):
        suite.write_text(text.replace(old, new))
        assert (played_with("expert", str(suite)) == first) is same, new
    assert played_with("expert", "tabletop-pick") == {}
