"""Which OpenGL MuJoCo draws with (MUJOCO_GL): chosen, checked and explained here and nowhere else.

On Linux the default is EGL, which needs no display. `choose` comes before `import mujoco`, which reads the variable
once; `check` before worker processes are started; `drawing` around code that makes a context. Every refusal is a
ValueError of one line that says what to install or to set. Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OFF = ("disable", "disabled", "off", "false", "0")
_SYSTEM_DEFAULT = ("enable", "enabled", "on", "true", "1", "")
_LINUX = ("egl", "osmesa", "glfw", "glx")
ADVICE = {
    "egl": "install Mesa's EGL (Debian, Ubuntu: libegl1 libgl1-mesa-dri), or try MUJOCO_GL=osmesa (libosmesa6)",
    "osmesa": "install OSMesa (Debian, Ubuntu: libosmesa6), or leave MUJOCO_GL unset, which means egl",
    "glfw": "it needs a display (DISPLAY) with GLX; without one leave MUJOCO_GL unset, which means egl",
    "": "leave MUJOCO_GL unset, which means egl",
}
_SCENE = "<mujoco><worldbody><light pos='0 0 3'/><geom size='.2'/></worldbody></mujoco>"
_PROBE = f"""
import os
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string("{_SCENE}")
    with mujoco.Renderer(model, 32, 32) as renderer:
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer.update_scene(data)
        assert renderer.render().max() > 0, "the picture is black"
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
    os._exit(1)  # libraries that are half loaded complain when they are unloaded
"""
_PROBE_TIMEOUT_S = 300.0


def name() -> str:
    """The backend in use: egl, osmesa, glfw, another system's, or one of `OFF`."""
    told = os.environ.get("MUJOCO_GL", "").lower().strip()
    if told in ("glx", *_SYSTEM_DEFAULT) and sys.platform == "linux":
        return "egl" if told == "" and _loads("libEGL.so.1") else "glfw"
    return told


def choose() -> None:
    """Set MUJOCO_GL where the user has not, and refuse values with which `import mujoco` itself would fail."""
    if sys.platform != "linux":
        return
    chosen = name()
    if os.environ.get("MUJOCO_GL", "").strip() == "" and chosen == "egl":
        os.environ["MUJOCO_GL"] = "egl"
    if chosen in OFF:
        return
    if chosen not in _LINUX:
        raise ValueError(explained(chosen, f"unknown; MuJoCo knows {', '.join(_LINUX)} and disable"))
    if chosen == "osmesa" and ctypes.util.find_library("OSMesa") is None:
        raise ValueError(explained(chosen, "there is no library libOSMesa"))
    if chosen == "egl" and not _loads("libEGL.so.1"):
        raise ValueError(explained(chosen, "there is no library libEGL.so.1"))
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if chosen in ("egl", "osmesa") and platform not in ("", chosen):
        raise ValueError(explained(chosen, f"PYOPENGL_PLATFORM is {platform}, it must be unset or {chosen}"))


def check(*, probe: bool = False) -> None:
    """ValueError if rendering cannot work, as far as quick checks can tell; `probe`: also render an image in a separate
    process (about a second)."""
    choose()
    chosen = name()
    if chosen in OFF:
        raise ValueError(explained("", f"MUJOCO_GL={chosen} switches drawing off, and policies look at pictures"))
    if chosen == "glfw" and sys.platform == "linux" and not (os.environ.get("DISPLAY") or _wayland()):
        raise ValueError(explained(chosen, "there is no display"))
    if probe and (reason := problem()) is not None:
        raise ValueError(reason)


def problem() -> str | None:
    """Render an image in a separate process, since a broken GL library ends the process that loads it. None if that
    works, else the cause and the remedy."""
    try:
        choose()
    except ValueError as error:
        return str(error)
    environment = os.environ | {"LP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return explained(name(), f"no picture in {_PROBE_TIMEOUT_S:g} s")
    if done.returncode == 0:
        return None
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return explained(name(), (said or [f"exit code {done.returncode}"])[-1])


@contextmanager
def drawing() -> Iterator[None]:
    """Around the making of a context: it is of the chosen backend, whenever mujoco was imported, and
    every failure is a ValueError that names the remedy."""
    check()
    try:
        _use(name())
        yield
    except ValueError:  # of an image size, say
        raise
    except Exception as error:
        raise ValueError(explained(name(), f"{type(error).__name__}: {error}")) from error


def explained(backend: str, reason: str) -> str:
    """One line: the backend, what is wrong with it, what to do."""
    told = f"cannot draw with MUJOCO_GL={backend}: {reason}" if backend else reason
    return f"{' '.join(told.split()).rstrip('.')}; {ADVICE.get(backend, ADVICE[''])}; `vla doctor` checks it"


def _use(backend: str) -> None:
    """Make `mujoco.Renderer` and `mujoco.GLContext` of this process those of `backend`: mujoco settles them when it is
    imported, which may have been before MUJOCO_GL was chosen."""
    if sys.platform != "linux":
        return
    import mujoco

    try:
        from mujoco.rendering.classic import gl_context
    except ModuleNotFoundError:  # an older MuJoCo, such as LIBERO's
        from mujoco import gl_context

    module = f"mujoco.{backend}"
    if getattr(getattr(gl_context, "GLContext", None), "__module__", "") != module:
        gl_context.GLContext = mujoco.GLContext = importlib.import_module(module).GLContext


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _wayland() -> str | None:
    return os.environ.get("WAYLAND_DISPLAY")
