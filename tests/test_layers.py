"""House rules that a machine can check: who imports whom, fences around third parties, file sizes, what is tracked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("vla", "envs", "policies", "rl")
MAX_LINES = 500

SHELL = (
    "bascule/main.py",
    "vla/commands/",
    "vla/quickstart",
    "bascule/bench/simulation.py",
    "bascule/bench/simulation_warp.py",
    "bascule/bench/serving.py",
    "bascule/catalogue.py",
    "vla/experiment",
)
"""The shell around the rooms: may import any of them, inside functions."""
_ALONE = ("vla.core.types", "vla.core.late_chunks", "vla.core.subprocesses", "vla.runtime.locks", "vla.core.waiting", "vla.core.disk", "vla.runtime.rendering_backend")
FOUNDATION = dict.fromkeys(_ALONE, set()) | {
    "vla.core.config": {"vla.core.disk"},
    "vla.core.checkpoint": {"vla.core.config", "vla.core.disk"},
    "vla.core.compatibility": {"vla.core.types"},
}
"""Modules that stand on (almost) nothing of ours."""
MAY_IMPORT = {
    "vla": {"vla"},
    "envs": {"envs", *FOUNDATION} - {"vla.core.checkpoint"},
    "policies": {"policies", "vla"},
    "rl": {"rl", "vla", "envs"},
}
FENCES = {
    "lerobot": ("vla/data/lerobot_dataset.py", "envs/demos/record.py", "policies/control/robots.py", "policies/lerobot/"),
    "tyro": ("bascule/main.py", "vla/commands/"),
    "mujoco_warp": ("envs/backends/warp_sim.py", "envs/backends/warp_render.py"),
    "warp": ("envs/backends/warp_sim.py", "envs/backends/warp_render.py"),
}
ONE_FILE_EACH = ("robosuite", "metaworld", "stable_baselines3")
TORCH_FREE = (
    "vla",
    "vla.core.types",
    "vla.core.config",
    "vla.core.checkpoint",
    "vla.processing.preprocess",
    "bascule.main",
    "bascule.report.page",
    "policies.serving.client",
    "policies.serving.wire",
    "envs",
)


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(source, module, is_package=False):
    """[(imported module or module.name, is at module level)] of a file called `module`."""
    tree = ast.parse(source)
    top = set()
    pending = list(tree.body)
    while pending:  # module level: not inside a function, class bodies and try/with/if included, TYPE_CHECKING not
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        top.add(node)
        pending += ast.iter_child_nodes(node)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            found += [(f"{base}.{alias.name}", node in top) for alias in node.names]
    return found


def within(name, allowed):
    return name == allowed or name.startswith(allowed + ".")


def layer_violations(relative, source):
    """Messages, one per forbidden import of the file at `relative`."""
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    room = module.split(".")[0]
    allowed = FOUNDATION.get(module, MAY_IMPORT[room])
    messages = []
    for name, at_top in imports(source, module, relative.endswith("__init__.py")):
        if name.split(".")[0] not in (*ROOMS, "tests"):
            continue
        if relative.startswith(SHELL):
            if at_top and not within(name, "vla"):
                messages.append(f"{relative} imports {name} at module level, not inside a function")
        elif not any(within(name, one) for one in allowed):
            messages.append(f"{relative} imports {name}")
        elif any(within(name, path.removesuffix(".py").rstrip("/").replace("/", ".")) for path in SHELL):
            messages.append(f"{relative} imports {name}, which is the shell")
    return messages


def third_parties(relative, source):
    return {name.split(".")[0] for name, _ in imports(source, relative.removesuffix(".py").replace("/", "."))}


def sources():
    for path in python_files(*ROOMS):
        yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_rooms_import_only_what_they_may():
    assert [message for relative, source in sources() for message in layer_violations(relative, source)] == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("vla/model/model.py", "import envs.tabletop.scene"),
        ("vla/model/model.py", "def f():\n    from rl.algorithms import ppo"),
        ("vla/core/types.py", "from vla.core import config"),
        ("vla/model/model.py", "from bascule.main import main"),
        ("envs/tabletop/scene.py", "from vla.model.model import VLA"),
        ("envs/tabletop/scene.py", "from vla.model import model"),
        ("envs/tabletop/scene.py", "from rl.models.actor import Actor"),
        ("policies/serving/server.py", "from envs import make_vec"),
        ("policies/serving/server.py", "from ..rl import ppo"),
        ("rl/runner.py", "from policies.serving.server import PolicyServer"),
        ("bascule/main.py", "from envs import make_vec"),
        ("bascule/commands/learn.py", "from envs import make_vec"),
        ("vla/model/model.py", "from bascule.commands.learn import Train"),
        ("rl/algorithms/ppo.py", "import tests.conftest"),
    ],
)
def test_the_layer_check_sees_a_violation(relative, source):
    assert layer_violations(relative, source)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("envs/tabletop/scene.py", "from vla.core.types import Observation\nfrom vla.core.config import lookup\nfrom envs.tabletop import suites"),
        ("rl/runner.py", "from vla.model.model import VLA\nfrom envs.evaluation.evaluate import evaluate\nfrom . import ppo"),
        ("bascule/main.py", "def f():\n    from envs import make_vec"),
        ("policies/__init__.py", "from .client import PolicyClient"),
    ],
)
def test_the_layer_check_lets_pass(relative, source):
    assert layer_violations(relative, source) == []


def test_third_parties_stay_behind_their_fences():
    importers = {}
    for relative, source in sources():
        for name in third_parties(relative, source):
            importers.setdefault(name, []).append(relative)
    assert importers["numpy"], "the scan found nothing: it is broken"
    for name, homes in FENCES.items():
        assert [file for file in importers.get(name, []) if not file.startswith(homes)] == [], name
    for name in ONE_FILE_EACH:
        assert len(importers.get(name, [])) <= 1, f"{name} is imported by {importers[name]}"


def test_no_file_is_too_long():
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in python_files(*ROOMS, "tests")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_readme_maps_every_folder():
    section = (ROOT / "README.md").read_text().partition("## Folders")[2]
    mapped = set(re.findall(r"^(\w+)/ ", section, flags=re.MULTILINE))
    folders = {name.partition("/")[0] for name in tracked_texts() if "/" in name and not name.startswith(".")}
    assert {"unmapped": folders - mapped, "gone": mapped - folders} == {"unmapped": set(), "gone": set()}


def test_light_modules_import_no_torch():
    # One process per claim would cost seconds; modules are imported in turn and the first heavy one is named.
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'lerobot', 'mujoco'} & set(sys.modules)\n"
        "    assert not heavy, f'import {name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def tracked_texts():
    """{path: text} of the files git tracks; all of the checkout's where there is no git (an unpacked sdist)."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, timeout=30)
    if done.returncode == 0 and (ROOT / ".git").exists():
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [p.relative_to(ROOT).as_posix() for room in (*ROOMS, "tests") for p in (ROOT / room).rglob("*.*")]
    found = {}
    for name in names:
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            data = path.read_bytes()
            if b"\0" not in data:
                found[name] = data.decode("utf-8", "replace")
    return found


# Spelled in pieces, so that this file passes its own check.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:ro" + r"ot|ho" + r"me/\w+|Us" + r"ers/\w+|wo" + r"rk|tm" + r"p/\w+)/")
REGISTRY = re.compile(r"py" + r"pi\.org|pythonho" + r"sted|download\.pyt" + r"orch|--(?:extra-)?index" + r"-url")
LOCK_FILES = {"uv.lock", "poetry.lock", "pdm.lock", "pylock.toml", "Pipfile.lock", "requirements.lock"}


def test_nothing_of_this_machine_is_tracked():
    texts = tracked_texts()
    assert "vla/core/types.py" in texts, "the scan found nothing: it is broken"
    assert [name for name in texts if Path(name).name in LOCK_FILES] == []
    for pattern in (MACHINE_PATH, REGISTRY):
        hits = [f"{name}: {match.group()}" for name, text in texts.items() if (match := pattern.search(text))]
        assert hits == []


def test_the_machine_checks_see_what_they_should():
    assert MACHINE_PATH.search("path = '/ro" + "ot/x'") and MACHINE_PATH.search("see /ho" + "me/ann/y")
    assert not MACHINE_PATH.search("runs/ro" + "ot/x $HO" + "ME/wo" + "rk/ ~/tm" + "p/x")
    assert REGISTRY.search("https://py" + "pi.org/simple")
