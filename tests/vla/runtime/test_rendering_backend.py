"""MUJOCO_GL unset, wrong, off, or of a library that is not there: one line everywhere, and no restart loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla.runtime import rendering_backend

ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="MUJOCO_GL's values are Linux's")
pytestmark = linux
NO_DRIVER = {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": os.devnull}


def run(*command, **environment):
    """`environment`: None removes a variable. No display."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "DISPLAY": None, "WAYLAND_DISPLAY": None, **environment}
    present = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run(
        [sys.executable, *command], env=present, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MUJOCO_GL": "osmesa"}, ("osmesa", "libosmesa6")),
        ({"MUJOCO_GL": "glfw"}, ("glfw", "there is no display")),
        ({"MUJOCO_GL": "disable"}, ("disable", "switches drawing off")),
        ({"MUJOCO_GL": "nonsense"}, ("nonsense", "MuJoCo knows egl")),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, ("PYOPENGL_PLATFORM is osmesa",)),
        (NO_DRIVER, ("egl", "EGL device display", "libegl1")),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_every_backend_that_cannot_draw_is_one_line(environment, words, tmp_path):
    if environment["MUJOCO_GL"] == "osmesa" and rendering_backend.ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is installed here")
    command = ("demos", "tabletop-pick", "--episodes", "1", "--workers", "1", "--out", str(tmp_path / "demos"))
    done = run("-m", "bascule.main", *command, **environment)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in (*words, "vla doctor"):
        assert word in done.stderr


@pytest.mark.parametrize("first", ["import gymnasium", "import mujoco, gymnasium"], ids=["plain", "mujoco-first"])
def test_gymnasium_needs_no_variable_and_leaves_no_noise(first):
    """On a machine without a display, whoever imported mujoco before; the environment is not even closed."""
    script = (
        f"{first}\nenv = gymnasium.make('envs.gym_env:bascule/TabletopPick-v0', disable_env_checker=True)\n"
        "print(int(env.reset(seed=1)[0]['images']['front'].max()))\n"
    )
    done = run("-c", script, MUJOCO_GL=None)
    assert done.returncode == 0 and int(done.stdout) > 100 and done.stderr == "", done.stderr


def test_a_user_may_draw_with_another_backend(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setenv("DISPLAY", ":0")
    rendering_backend.check()
    assert rendering_backend.name() == "glfw" and os.environ["MUJOCO_GL"] == "glfw"


def test_a_worker_that_a_gl_library_ends_gives_the_reason_at_once():
    """The library aborts the process: no other worker is started."""
    from envs.backends.cpu_vec_env import MujocoVecEnv
    from envs.registry import load_suite

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering_backend, "_PROBE", "import os; os.abort()")
        with pytest.raises(ValueError, match="exit code -6.*vla doctor"):
            MujocoVecEnv(load_suite("tabletop-pick"), _abort, 2, num_workers=1)
    with pytest.raises(RuntimeError, match="died"):  # drawing is well here: it was something else
        MujocoVecEnv(load_suite("tabletop-pick"), _abort, 2, num_workers=1)


def _abort(*arguments, **options):
    os.abort()
