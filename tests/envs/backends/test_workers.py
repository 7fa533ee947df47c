"""Worker processes: one that is killed or hangs is replaced, its episodes are marked, and nobody waits for ever."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.evaluation.evaluate import evaluate
from envs.experts.pick_place import TabletopExpert
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from vla.core.types import ActionChunk, Observation

ROOT = Path(__file__).resolve().parents[3]
STAY = np.zeros((4, 8, 4), np.float32)


@pytest.fixture(scope="module")
def env() -> Iterator[MujocoVecEnv]:
    """Four worlds in two workers: new processes cost seconds, so the tests hurt the same ones in turn."""
    env = MujocoVecEnv(
        load_suite("tabletop-pick"),
        TabletopWorlds,
        4,
        num_workers=2,
        answer_timeout_s=60.0,
        render=RenderOptions(image_size=32),
    )
    yield env
    env.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_its_episodes_are_cut_short(env: MujocoVecEnv) -> None:
    twin = TabletopWorlds(load_suite("tabletop-pick"), 4, render=RenderOptions(image_size=32))
    for one in (env, twin):
        one.reset(seeds=[1, 2, 3, 4])
        before = one.step_chunk(STAY)
    assert not env.step_chunk(STAY).worker_restarted.any()
    twin.step_chunk(STAY)
    before, pids = env.observation(), env.worker_pids
    kill(pids[1])
    hurt, whole = env.step_chunk(STAY), twin.step_chunk(STAY)
    assert env.worker_pids[0] == pids[0] and env.worker_pids[1] != pids[1]
    assert hurt.worker_restarted.tolist() == [False, False, True, True]
    assert hurt.truncated.tolist() == [False, False, True, True]
    assert not hurt.terminated.any() and not hurt.info["success"].any() and not hurt.reward.any()
    assert hurt.n_steps.tolist() == [8, 8, 0, 0]
    # What the other worker plays is what it would have played; the lost worlds show what was last seen of them.
    assert np.array_equal(hurt.obs.proprio[:2], whole.obs.proprio[:2])
    assert np.array_equal(hurt.obs.images["front"][:2], whole.obs.images["front"][:2])
    assert np.array_equal(hurt.obs.proprio[2:], before.proprio[2:])
    assert np.array_equal(hurt.obs.images["wrist"][2:], before.images["wrist"][2:])
    assert hurt.obs.instruction == before.instruction
    # Until they are reset, they stand still and are not reported again.
    again = env.step_chunk(STAY)
    twin.step_chunk(STAY)
    assert again.n_steps.tolist() == [8, 8, 0, 0]
    assert not again.truncated.any() and not again.worker_restarted.any()
    for one in (env, twin):
        one.reset(seeds=[8, 9], env_ids=[2, 3])
    # The new process plays the same worlds as the old one would have.
    mine, theirs = env.step_chunk(STAY), twin.step_chunk(STAY)
    assert mine.n_steps.tolist() == [8, 8, 8, 8]
    assert np.array_equal(mine.obs.proprio, theirs.obs.proprio)
    assert np.array_equal(mine.obs.images["front"], theirs.obs.images["front"])
    twin.close()


def test_a_worker_killed_before_a_reset_loses_only_what_was_playing(env: MujocoVecEnv) -> None:
    env.reset(seeds=[1, 2, 3, 4])
    kill(env.worker_pids[1])
    env.reset(seeds=[5], env_ids=[3])  # world 3 starts anew; world 2 was in mid-episode
    result = env.step_chunk(STAY)
    assert result.worker_restarted.tolist() == [False, False, True, False]
    assert result.truncated.tolist() == [False, False, True, False]
    assert result.n_steps.tolist() == [8, 8, 0, 8]


def test_a_worker_that_hangs_is_killed_in_time(env: MujocoVecEnv) -> None:
    env.reset(seeds=[1, 2, 3, 4])
    os.kill(env.worker_pids[0], signal.SIGSTOP)
    patience, env._workers[0]._timeout_s = env._workers[0]._timeout_s, 2.0
    began = time.monotonic()
    result = env.step_chunk(STAY)
    env._workers[0]._timeout_s = patience
    assert result.worker_restarted.tolist() == [True, True, False, False]
    assert time.monotonic() - began < 60
    env.reset(seeds=[1, 2], env_ids=[0, 1])
    assert env.step_chunk(STAY).n_steps.tolist() == [8, 8, 8, 8]


class _Saboteur(TabletopExpert):
    """An expert that kills a worker process at its fifth decision."""

    def __init__(self, env: MujocoVecEnv) -> None:
        super().__init__(env.num_envs)
        self.env, self.decisions = env, 0

    def act(self, obs: Observation) -> ActionChunk:
        self.decisions += 1
        if self.decisions == 5:
            kill(self.env.worker_pids[0])
        return super().act(obs)


def test_an_evaluation_plays_lost_episodes_again(env: MujocoVecEnv) -> None:
    seeds = range(100, 106)
    whole = evaluate(TabletopExpert(4), env, seeds)
    hurt = evaluate(_Saboteur(env), env, seeds, num_films=1)
    assert (hurt.successes, hurt.episodes, hurt.mean_steps) == (whole.successes, 6, whole.mean_steps)
    assert hurt.successes == 6 and len(hurt.films[0].frames) < 50


def test_a_worker_that_dies_at_every_step_is_an_error_not_a_loop(env: MujocoVecEnv) -> None:
    with pytest.raises(RuntimeError, match="simulation worker 0 died .* 3 times"):
        for _ in range(4):
            env.reset(seeds=[1, 2, 3, 4])
            kill(env.worker_pids[0])
            env.step_chunk(STAY)


_BROKEN = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import envs.make, envs.tabletop.scene
from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds

class Broken(TabletopWorlds):  # the workers find it in this script: they do run it
    def __init__(self, *args, **options):
        envs.tabletop.scene.SIM_CONFIGS = Path(os.environ["CONFIGS"])
        super().__init__(*args, **options)

if __name__ == "__main__":
    envs.make.worlds_class = lambda suite, perturb: Broken
    for folder in {configs!r}:
        os.environ["CONFIGS"] = folder
        try:
            make_vec("tabletop-pick", 1, num_workers=1, image_size=32)
        except (OSError, ValueError) as error:
            print(error)
"""
_PLAIN = """
import sys
sys.path.insert(0, {root!r})
from envs import make_vec
env = make_vec("tabletop-pick", 2, num_workers=1, image_size=32)
print(env.reset(seeds=[1, 2]).proprio.shape[0], "worlds")
env.close()
"""


def run_script(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path.write_text(text)
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)


def test_a_script_needs_no_guard_against_its_own_workers(tmp_path: Path) -> None:
    done = run_script(tmp_path / "plain.py", _PLAIN.format(root=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 worlds\n"


def test_a_scene_with_a_broken_mesh_names_the_file(tmp_path: Path) -> None:
    folders, meshes = [tmp_path / damage for damage in ("missing", "garbage")], []
    for folder in folders:
        shutil.copytree(ROOT / "sim_configs", folder, copy_function=os.symlink)
        meshes.append(mesh := next(folder.rglob("link5.stl")))
        mesh.unlink()  # the link, not the file
        if folder.name == "garbage":
            mesh.write_bytes(b"not a mesh" * 20)
    text = _BROKEN.format(root=str(ROOT), configs=[str(folder) for folder in folders])
    done = run_script(tmp_path / "broken.py", text)
    assert done.returncode == 0, done.stderr
    assert all(str(mesh) in done.stdout for mesh in meshes) and "Traceback" not in done.stderr
