"""The gymnasium view: gymnasium's own checks, seeds, the end of an episode, the vector view."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs.gym_env  # noqa: F401 - registers the ids
from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.pick_place import TabletopExpert
from envs.perturb.perturbation import Perturbation
from envs.registry import all_suite_names, load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop.suites import suite_names
from vla.core.types import Observation

ROOT = Path(__file__).resolve().parents[2]
IDS = {name: "".join(map(str.capitalize, name.split("-"))) for name in suite_names()}


def expert_action(expert: TabletopExpert, obs: dict, info: dict) -> np.ndarray:
    seen = Observation({}, obs["proprio"][None], [obs["instruction"]], info["privileged"][None])
    return expert.act(seen)[0, 0]


@pytest.mark.parametrize("suite", IDS)
def test_gymnasium_accepts_every_suite(suite: str) -> None:
    env = gymnasium.make(f"bascule/{IDS[suite]}-v0", image_size=32, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    env.close()
    about = [str(w.message) for w in caught if "gym" in str(w.category.__module__) or "WARN" in str(w.message)]
    # A robot's state has no bounds to name; every other complaint is one.
    assert [text for text in about if "infinity" not in text] == []


@pytest.mark.parametrize(("package", "name"), [("robosuite", "RobosuiteLift"), ("metaworld", "MetaworldPush")])
def test_gymnasium_accepts_an_adapter(package: str, name: str) -> None:
    pytest.importorskip(package)
    env = gymnasium.make(f"bascule/{name}-v0", image_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env.unwrapped)
    env.close()


def test_a_perturbed_environment_is_one_too() -> None:
    pair = [gymnasium.make("bascule/TabletopPick-v0", image_size=32, perturb=p) for p in (None, Perturbation(light=1))]
    plain, lit = (env.reset(seed=3)[0]["images"]["front"] for env in pair)
    assert np.abs(plain.astype(int) - lit).mean() > 3
    for env in pair:
        env.close()


def test_every_suite_has_an_id() -> None:
    assert IDS["tabletop-pick"] == "TabletopPick" and len(IDS) >= 7
    assert {f"bascule/{name}-v0" for name in IDS.values()} <= set(gymnasium.registry)
    ours = {spec.kwargs["suite"] for spec in gymnasium.registry.values() if spec.namespace == "bascule"}
    assert ours == {*all_suite_names()}


def test_a_seed_is_the_episode_it_is_everywhere() -> None:
    env = gymnasium.make("bascule/TabletopMixed-v0", image_size=32)
    worlds = TabletopWorlds(load_suite("tabletop-mixed"), 1, render=RenderOptions(image_size=32))
    for seed in (7, 5_000_003):
        obs, info = env.reset(seed=seed)
        same = worlds.reset(seeds=[seed])
        assert info["episode_seed"] == seed and obs["instruction"] == same.instruction[0]
        assert np.array_equal(obs["proprio"], same.proprio[0])
        assert all(np.array_equal(obs["images"][name], same.images[name][0]) for name in worlds.cameras)
    drawn = [env.reset()[1]["episode_seed"] for _ in range(3)]
    env.reset(seed=5_000_003)
    assert drawn == [env.reset()[1]["episode_seed"] for _ in range(3)] and len(set(drawn)) == 3
    assert {env.reset(options={"task": "place"})[1]["task"] for _ in range(4)} == {"place"}
    with pytest.raises(ValueError, match="option 'task'"):
        env.reset(options={"tsak": "place"})
    env.close(), worlds.close()


def test_success_terminates_and_the_horizon_truncates() -> None:
    env = gymnasium.make("bascule/TabletopPick-v0", image_size=32, render_mode="rgb_array")
    obs, info = env.reset(seed=100)
    expert, rewards, terminated, truncated = TabletopExpert(1), [], False, False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = env.step(expert_action(expert, obs, info))
        rewards.append(reward)
    assert terminated and not truncated and info["success"]
    assert rewards[-1] == 1.0 and sum(rewards) == 1.0
    assert env.render().shape == (32, 64, 3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.action_space.sample())

    env.reset(seed=100)
    ends = [env.step(np.array([0, 0, 0, 1], np.float32))[2:4] for _ in range(load_suite("tabletop-pick").horizon)]
    assert ends[-1] == (False, True) and set(ends[:-1]) == {(False, False)}
    env.close()


def test_the_vector_view_plays_what_single_worlds_play() -> None:
    vector = gymnasium.make_vec("bascule/TabletopPick-v0", num_envs=2, num_workers=1, image_size=32)
    assert type(vector.unwrapped).__name__ == "SuiteVectorEnv"
    singles = [gymnasium.make("bascule/TabletopPick-v0", image_size=32) for _ in range(2)]
    obs, info = vector.reset(seed=100)
    assert obs in vector.observation_space
    mine = [env.reset(seed=100 + k) for k, env in enumerate(singles)]
    expert, ended = TabletopExpert(2), np.zeros(2, bool)
    while not ended.any():
        seen = Observation({}, obs["proprio"], list(obs["instruction"]), info["privileged"])
        action = expert.act(seen)[:, 0]
        obs, reward, terminated, truncated, info = vector.step(action)
        for k, env in enumerate(singles):
            step = env.step(action[k])
            assert (reward[k], terminated[k], truncated[k]) == step[1:4]
            assert np.array_equal(obs["proprio"][k], step[0]["proprio"])
            assert np.array_equal(obs["images"]["front"][k], step[0]["images"]["front"])
        ended = terminated | truncated
    before = obs
    k = int(np.flatnonzero(ended)[0])
    obs, reward, terminated, truncated, info = vector.step(vector.action_space.sample())
    # The step after the last one resets, whatever the action: another episode, no reward, no end.
    assert reward[k] == 0 and not terminated[k] and not truncated[k]
    assert not np.array_equal(obs["images"]["front"][k], before["images"]["front"][k])
    assert obs in vector.observation_space and mine
    vector.close()


def test_an_id_with_its_module_needs_no_import() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import gymnasium\n"
        "env = gymnasium.make('envs.gym_env:bascule/TabletopPick-v0', image_size=32)\n"
        "assert 'torch' not in sys.modules\n"
        "print(env.reset(seed=3)[0]['instruction'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    env = gymnasium.make("bascule/TabletopPick-v0", image_size=32)
    assert done.stdout.strip() == env.reset(seed=3)[0]["instruction"]
    env.close()
