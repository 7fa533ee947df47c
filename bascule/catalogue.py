"""The names a command line accepts: suites, tasks, recipes, checkpoints. May import every package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from policies.load import checkpoint
from vla.core.config import load_json

Listing = tuple[str, tuple[str, ...], list[tuple[object, ...]]]
"""A table: title, columns, rows."""


def trained(path: str | Path) -> Path:
    """`path`, if it is a checkpoint with weights to work on, not an export of one. ValueError as `checkpoint`."""
    folder = checkpoint(path)
    if "export" in load_json(folder / "config.json"):
        raise ValueError(f"{path} is a folder of `vla export`: give the checkpoint it was made from")
    return folder


def is_lerobot(folder: Path) -> bool:
    """True if a folder holds a bascule policy in LeRobot's format."""
    config = Path(folder) / "config.json"
    return config.is_file() and load_json(config).get("type") == "bascule"


def list_suites() -> Listing:
    """A table of all suites: tasks, horizon in control steps, backends, description."""
    from envs.registry import all_suite_names, load_suite
    from envs.tabletop.suites import Suite

    def tasks(names: tuple[str, ...]) -> str:
        return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... ({len(names)})"

    rows = []
    for suite in map(load_suite, all_suite_names()):
        backend = "cpu, warp" if isinstance(suite, Suite) else f"cpu ({suite.name.partition('-')[0]})"
        rows.append((suite.name, tasks(suite.tasks), suite.horizon, backend, suite.description))
    return "suites", ("suite", "tasks", "horizon", "backend", ""), rows


def list_tasks() -> Listing:
    """A table of all tasks and the suites that contain them."""
    from envs.registry import all_suite_names, load_suite

    users: dict[str, list[str]] = {}
    for suite in map(load_suite, all_suite_names()):
        for task in suite.tasks:
            users.setdefault(task, []).append(suite.name)
    return "tasks", ("task", "suites"), [(task, ", ".join(names)) for task, names in sorted(users.items())]


def list_recipes() -> Listing:
    """A table of the recipes of `vla train` and `vla rl`."""
    import rl.recipes
    import vla.training.recipes

    tables = {"vla train --recipe": vla.training.recipes.RECIPES, "vla rl": rl.recipes.RECIPES}
    rows = [
        (name, command, (recipe.__doc__ or "").splitlines()[0])
        for command, recipes in tables.items()
        for name, recipe in recipes.items()
    ]
    return "recipes", ("recipe", "for", ""), rows


def list_backbones() -> Listing:
    """A table of the backbones that have a name."""
    from vla.model.config import BACKBONE_NAMES, DEFAULT_BACKBONE, RETIRED_BACKBONES

    told = {
        DEFAULT_BACKBONE: "the default; ships with the package",
        **dict.fromkeys(RETIRED_BACKBONES, f"retired: for policies trained on it; new ones take {DEFAULT_BACKBONE}"),
        "smollm2-135m": "a language model, the eyes of tiny, untrained queries; needs ./run setup smollm",
    }
    other = "from the Hugging Face hub, or the folder of a download"
    return "backbones", ("backbone", ""), [(name, told.get(name, other)) for name in BACKBONE_NAMES]


LISTINGS: dict[str, Callable[[], Listing]] = {
    "suites": list_suites,
    "recipes": list_recipes,
    "tasks": list_tasks,
    "backbones": list_backbones,
}
