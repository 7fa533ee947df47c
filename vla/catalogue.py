"""What a command line can name: suites, tasks, recipes, checkpoints. Part of the shell: it sees every room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from vla.config import load_json, unknown

Listing = tuple[str, tuple[str, ...], list[tuple[object, ...]]]
"""A table: title, columns, rows."""


def checkpoint(path: str | Path, others: Iterable[str] = ()) -> Path:
    """`path`, if it is a checkpoint folder; else ValueError naming the nearest one. `others`: other right answers."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        _refuse_others(folder)
        return folder
    if (folder / "meta" / "info.json").is_file():
        raise ValueError(f"{path} is a data set, not a checkpoint: `vla train --dataset {path}` makes a policy of it")
    if (folder / "bascule.json").is_file():
        raise ValueError(f"{path} is a backbone, not a policy: `vla train --backbone {path}` makes one on it")
    if folder.is_file():
        raise ValueError(f"{path} is a file; a checkpoint is the folder with config.json in it")
    roots = {Path("runs"), folder.parent, folder} - {Path(".")}
    depths = ("*", "*/*", "*/*/*")
    found = {str(file.parent) for root in roots for depth in depths for file in root.glob(f"{depth}/config.json")}
    if not found and not others:
        raise ValueError(f"there is no checkpoint at '{path}'; `vla train` makes one")
    raise ValueError(unknown(str(path), {*found, *others}, "checkpoint"))


def trained(path: str | Path) -> Path:
    """`path`, if it is a checkpoint with weights to work on, not an export of one. ValueError as `checkpoint`."""
    folder = checkpoint(path)
    if "export" in load_json(folder / "config.json"):
        raise ValueError(f"{path} is a folder of `vla export`: give the checkpoint it was made from")
    return folder


def _refuse_others(folder: Path) -> None:
    """ValueError for a folder whose config.json is of something else that we know."""
    config = load_json(folder / "config.json")
    if isinstance(config, dict) and "checkpoint" not in config and config.get("type") == "bascule":
        raise ValueError(f"{folder} is a policy in LeRobot's format: `vla lerobot {folder} OUT` makes a checkpoint")


def list_suites() -> Listing:
    from envs.suites import Suite, all_suite_names, load_suite

    def tasks(names: tuple[str, ...]) -> str:
        return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... ({len(names)})"

    rows = []
    for suite in map(load_suite, all_suite_names()):
        backend = "cpu, warp" if isinstance(suite, Suite) else f"cpu ({suite.name.partition('-')[0]})"
        rows.append((suite.name, tasks(suite.tasks), suite.horizon, backend, suite.description))
    return "suites", ("suite", "tasks", "horizon", "backend", ""), rows


def list_tasks() -> Listing:
    from envs.suites import all_suite_names, load_suite

    users: dict[str, list[str]] = {}
    for suite in map(load_suite, all_suite_names()):
        for task in suite.tasks:
            users.setdefault(task, []).append(suite.name)
    return "tasks", ("task", "suites"), [(task, ", ".join(names)) for task, names in sorted(users.items())]


def list_recipes() -> Listing:
    import rl.recipes
    import vla.recipes

    tables = {"vla train --recipe": vla.recipes.RECIPES, "vla rl": rl.recipes.RECIPES}
    rows = [
        (name, command, (recipe.__doc__ or "").splitlines()[0])
        for command, recipes in tables.items()
        for name, recipe in recipes.items()
    ]
    return "recipes", ("recipe", "for", ""), rows


LISTINGS: dict[str, Callable[[], Listing]] = {
    "suites": list_suites,
    "recipes": list_recipes,
    "tasks": list_tasks,
}
