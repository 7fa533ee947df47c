"""The application: command line, quickstart, benchmarks, experiments and reports. It may import every other package."""

import importlib.util
import sys
from pathlib import Path


def _own_packages_first() -> None:
    """Let `envs`, `rl`, ... be those beside this package even where PYTHONPATH, as robots' workspaces set it, or the
    present folder has others of these names. Worker processes are given the same sys.path."""
    root = Path(__file__).resolve().parents[1]
    for name in ("vla", "envs", "policies", "rl"):
        found = None if name in sys.modules else importlib.util.find_spec(name)
        if found is not None and found.origin != str(root / name / "__init__.py"):
            sys.path.insert(0, str(root))
            return


_own_packages_first()
