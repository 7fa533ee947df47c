"""House rules that a machine can check: who imports whom, fences around third parties, file sizes, what is tracked."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vla", "envs", "policies", "rl", "bascule")
MAX_LINES = 400
MAX_FILES = 12
"""Most files of a folder, its `__init__.py` not counted."""

ORDER = {
    "vla": ("core", "runtime", "processing", "language", "backbones", "model", "data", "checking", "training"),
    "envs": (
        "seeds", "tabletop", "perturb", "sim", "adapters", "registry", "backends", "make", "experts", "demos",
        "grounding", "evaluation", "gym_env",
    ),
    "policies": (
        "chunking", "export", "lerobot_policy", "load", "open_loop", "serving", "ros", "franka", "control", "teleop",
        "lerobot",
    ),
    "rl": (
        "streams", "configs", "models", "storage", "algorithms", "rewards", "rollout", "teacher", "run_checks",
        "run_checkpoint", "selection", "budget", "algorithm", "recipes", "retention", "runner", "offline", "external",
    ),
    "bascule": (
        "report", "catalogue", "agents", "teachers", "practice", "franka_cell", "experiments", "bench", "quickstart",
        "commands", "usage", "main", "__main__",
    ),
}  # fmt: skip
"""Bottom to top: a part (a folder, or a file beside the folders) imports only itself and parts before it, anywhere in
its files: in functions and for type checkers, too. A part that is not named here fails the test."""
BELOW = {
    "vla": (),
    "envs": ("vla.core", "vla.runtime", "vla.language"),
    "policies": ("vla",),
    "rl": ("vla", "envs"),
    "bascule": ("vla", "envs", "policies", "rl"),
}
"""The packages that each may import. Environments hold no model code: they know the contracts only."""
FENCES = {
    "lerobot": (
        "vla/data/", "envs/demos/", "policies/control/robots.py", "policies/control/robot_types.py",
        "policies/ros/",
        # Beside policies/lerobot/, which stands above `load` because recordings need the control loop.
        "policies/lerobot/", "policies/lerobot_policy.py", "policies/franka/", "bascule/bench/other_servers.py",
    ),
    "franky": ("policies/franka/",),
    "franky_sim": ("bascule/franka_cell/",),
    "jinja2": ("bascule/report/page.py",),
    "tyro": ("bascule/usage.py", "bascule/commands/"),
    "mujoco_warp": ("envs/backends/warp_sim.py", "envs/backends/warp_render.py"),
    "warp": ("envs/backends/warp_sim.py", "envs/backends/warp_render.py"),
    "robosuite": ("envs/adapters/robosuite_env.py", "envs/adapters/libero_package.py"),
    "metaworld": ("envs/adapters/metaworld_env.py",),
    "libero": ("envs/adapters/libero_package.py",),
    "stable_baselines3": ("rl/external/sb3.py", "bascule/experiments/sb3_parity.py"),
}  # fmt: skip
TORCH_FREE = (
    "vla",
    "vla.core.types",
    "vla.core.config",
    "vla.core.checkpoint",
    "vla.processing.preprocess",
    "bascule",
    "bascule.main",
    "bascule.report.page",
    "bascule.report.results",
    "bascule.report.runs",
    "policies.serving.client",
    "policies.serving.wire",
    "envs",
    "vla.training.recipes",
    "rl.recipes",
)


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def sources():
    """{path within the tree: text} of the product's Python files."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in python_files(*PACKAGES)}


def module_name(relative):
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def parsed(source):
    """The syntax tree of a text, which six tests read and none changes."""
    return ast.parse(source)


@functools.cache
def nodes(source):
    """All nodes of its syntax tree."""
    return tuple(ast.walk(parsed(source)))


def imported_names(relative, source):
    """Every module or module.name that a file imports, wherever in it."""
    package = module_name(relative).split(".")
    if not relative.endswith("/__init__.py"):
        package = package[:-1]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name, allowed):
    return name == allowed or name.startswith(allowed + ".")


def layer_violations(relative, source):
    """Messages, one per forbidden import of the file at `relative`."""
    package, _, rest = module_name(relative).partition(".")
    part, messages = rest.partition(".")[0], []
    if part and part not in ORDER[package]:
        return [f"{relative}: {package}.{part} has no place in ORDER"]
    for name in imported_names(relative, source):
        other, _, inner = name.partition(".")
        if other not in (*PACKAGES, "tests"):
            continue
        if other != package:
            if not any(within(name, one) for one in BELOW[package]) and name != other:
                messages.append(f"{relative} imports {name}")
            continue
        wanted = inner.partition(".")[0]
        # The package's own face (its __init__) hands names on lazily and may be asked by those above.
        if part and wanted in ORDER[package] and ORDER[package].index(wanted) > ORDER[package].index(part):
            messages.append(f"{relative} imports {name}, which stands above {package}.{part}")
    return messages


def import_graph(files):
    """{module: modules of ours that it imports}."""
    modules = {module_name(relative) for relative in files}
    graph = {}
    for relative, source in files.items():
        own, found = module_name(relative), set()
        for name in imported_names(relative, source):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != own:
                found.add(name)
        graph[own] = found
    return graph


def circles(graph):
    """Modules that can reach themselves."""

    def reachable(start):
        seen, pending = set(), list(graph[start])
        while pending:
            module = pending.pop()
            if module not in seen:
                seen.add(module)
                pending += graph[module]
        return seen

    return sorted(module for module in graph if module in reachable(module))


def test_every_part_imports_only_what_stands_below_it():
    assert [message for relative, source in sources().items() for message in layer_violations(relative, source)] == []


def test_no_files_import_each_other_in_a_circle():
    graph = import_graph({name: text for name, text in sources().items() if not name.endswith("__init__.py")})
    assert len(graph) > 150, "the scan found nothing: it is broken"
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("vla/model/model.py", "import envs.tabletop.scene"),
        ("vla/model/model.py", "def f():\n    from rl.algorithms import ppo"),
        ("vla/model/model.py", "from vla.training.train import train"),
        ("vla/core/types.py", "from vla.runtime import console"),
        ("vla/core/types.py", "if TYPE_CHECKING:\n    from vla.model.model import VLA"),
        ("vla/model/model.py", "from bascule.main import main"),
        ("vla/stray.py", ""),
        ("envs/tabletop/scene.py", "from vla.model.model import VLA"),
        ("envs/tabletop/scene.py", "from envs.backends.worker import Worker"),
        ("envs/tabletop/scene.py", "from rl.models.actor import Actor"),
        ("envs/new_room/file.py", ""),
        ("policies/serving/server.py", "from envs import make_vec"),
        ("policies/serving/server.py", "from ...rl.algorithms import ppo"),
        ("rl/runner.py", "from policies.serving.server import PolicyServer"),
        ("rl/algorithms/ppo.py", "import tests.conftest"),
        ("bascule/experiments/arms.py", "from bascule.commands.base import Command"),
    ],
)
def test_the_layer_check_sees_a_violation(relative, source):
    assert layer_violations(relative, source)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("envs/tabletop/scene.py", "from vla.core.types import Observation\nfrom envs.tabletop import suites"),
        ("rl/runner.py", "from vla.model.model import VLA\nfrom envs.evaluation.evaluate import evaluate"),
        ("bascule/main.py", "def f():\n    from envs import make_vec"),
        ("policies/__init__.py", "from .serving.client import PolicyClient"),
    ],
)
def test_the_layer_check_lets_pass(relative, source):
    assert layer_violations(relative, source) == []


def test_third_parties_stay_behind_their_fences():
    importers = {}
    for relative, source in sources().items():
        for name in {name.partition(".")[0] for name in imported_names(relative, source)}:
            importers.setdefault(name, []).append(relative)
    assert importers["numpy"], "the scan found nothing: it is broken"
    for name, homes in FENCES.items():
        assert [file for file in importers.get(name, []) if not file.startswith(homes)] == [], name


def test_no_file_is_too_long():
    files = python_files(*PACKAGES, "tests")
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in files}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_folder_is_crowded_and_each_says_what_lives_in_it():
    folders = {}
    for path in python_files(*PACKAGES):
        folders.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    crowded = {folder: len(names) - 1 for folder, names in folders.items() if len(names) - 1 > MAX_FILES}
    assert crowded == {}
    silent = [
        folder
        for folder, names in folders.items()
        if "__init__.py" not in names or not ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    ]
    assert silent == []


def test_folders_of_tests_are_not_crowded():
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


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
        "    # Environments choose how to draw when they are imported, and may refuse: not for a help text.\n"
        "    assert name != 'bascule.main' or 'envs' not in sys.modules, 'it imports envs'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def tracked_texts():
    """{path: text} of the files git tracks; all of the checkout's where there is no git (an unpacked sdist)."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, timeout=30)
    if done.returncode == 0 and (ROOT / ".git").exists():
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [p.relative_to(ROOT).as_posix() for room in (*PACKAGES, "tests") for p in (ROOT / room).rglob("*.*")]
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


def docstrings(source):
    """(name, docstring or None) of a file's public functions, classes and methods; those within functions are not."""
    pending = [parsed(source)]
    while pending:
        for node in pending.pop().body:
            if isinstance(node, ast.ClassDef):
                pending.append(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                yield node.name, ast.get_docstring(node)


def test_docstrings_are_full_sentences():
    fragments = ("As ", "Of ", "What ", "Whose ", "Whether ")
    found = {}
    for path in python_files(*PACKAGES, "tests"):
        # Strings that stand alone: docstrings, and those below attributes.
        alone = [node.value for node in nodes(path.read_text()) if isinstance(node, ast.Expr)]
        texts = [value.value for value in alone if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        if opened := [text for text in texts if text.startswith(fragments)]:
            found[path.relative_to(ROOT).as_posix()] = opened
    assert found == {}


def test_public_names_have_docstrings():
    found = [text for source in sources().values() for _, text in docstrings(source)]
    assert len(found) > 1000, "the scan found nothing: it is broken"
    assert sum(text is not None for text in found) >= 0.95 * len(found)
