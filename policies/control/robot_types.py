"""LeRobot's robots and teleoperators by the names of their types: its own, those of installed plugins, and what each
lacks to be used.

LeRobot registers a type when the module that defines it is imported, and importing `lerobot.robots` imports none.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

import draccus
import lerobot.cameras
import lerobot.robots
import lerobot.teleoperators
from draccus.cfgparsing import parse_string
from lerobot.robots import RobotConfig
from lerobot.robots.utils import make_robot_from_config
from lerobot.teleoperators import TeleoperatorConfig, make_teleoperator_from_config
from lerobot.utils.import_utils import register_third_party_plugins

import policies.franka.config_franka  # noqa: F401 - registers the robot type franka
import policies.ros.config_rosbridge  # noqa: F401 - registers the robot type rosbridge
from vla.core.config import lookup

_EXTRAS = {"zmq": "lekiwi", "can": "damiao", "serial": "pyserial-dep", "unitree_sdk2py": "unitree-g1"}
"""Module of a driver -> LeRobot's extra that installs it, where LeRobot itself does not say so."""


@functools.cache
def robot_types() -> dict[str, Any]:
    """Name of a type -> its configuration, of all robots that can be named here."""
    # a robot's configuration holds those of its cameras
    return _types(RobotConfig, lerobot.cameras, lerobot.robots)


@functools.cache
def teleoperator_types() -> dict[str, Any]:
    """Name of a type -> its configuration, of all teleoperators that can be named here."""
    return _types(TeleoperatorConfig, lerobot.teleoperators)


def _types(config: Any, *packages: ModuleType) -> dict[str, Any]:
    broken = {}
    for package in packages:
        broken |= dict(_import_all(package))
    register_third_party_plugins()
    known = dict(config.get_known_choices())
    return known | {name: _Broken(error) for name, error in broken.items() if name not in known}


def make_robot(kind: str, values: Mapping[str, str]) -> Any:
    """A robot, not connected. `values`: field -> words; "a.b" is field b of a, and {..} or [..] is YAML, as in
    LeRobot's own commands. ValueError naming the types, the fields, or the driver that is not installed."""
    return _made("robot", kind, values, robot_types(), make_robot_from_config)


def make_teleoperator(kind: str, values: Mapping[str, str]) -> Any:
    """A teleoperator, not connected. `values` and ValueError as for `make_robot`."""
    return _made("teleoperator", kind, values, teleoperator_types(), make_teleoperator_from_config)


def _made(what: str, kind: str, values: Mapping[str, str], types: Mapping[str, Any], make: Callable[[Any], Any]) -> Any:
    config_class = lookup(kind, types, f"LeRobot {what}")
    if isinstance(config_class, _Broken):
        raise ValueError(f"{what} {kind}: {_missing(config_class.error) or _words(config_class.error)}")
    names = {field.name for field in fields(config_class)}
    if foreign := [name for name in values if name.partition(".")[0] not in names]:
        raise ValueError(f"{what} {kind} has no '{foreign[0]}'; it has {', '.join(sorted(names))}")
    try:
        config = draccus.decode(config_class, _nested(values))
    except Exception as error:  # the words of a command line, and whatever a configuration makes of them
        said = _words(error)
        if missing := re.match(r"Missing required field\(s\) (.*) for \w+$", said):
            option = "--robot-args" if what == "robot" else "--teleop-args"
            said = f"it needs {option} {missing[1].split(',')[0]} VALUE; it has {', '.join(sorted(names))}"
        elif "choice class" in said and "cameras" in said:
            said += f"; known: {', '.join(lerobot.cameras.CameraConfig.get_known_choices())}"
        raise ValueError(f"{what} {kind}: {said}") from error
    try:
        return make(config)
    except Exception as error:
        # LeRobot's words for a plugin's error begin with the whole configuration.
        told = error.__cause__ if str(error).startswith("Error creating ") and error.__cause__ else error
        raise ValueError(f"{what} {kind}: {_missing(error) or _words(told)}") from error


class _Broken:
    """A robot type whose module cannot be imported."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _import_all(package: ModuleType) -> Iterator[tuple[str, Exception]]:
    """Import every package within `package`; those that fail."""
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except Exception as error:  # its driver is not installed, or too new: no reason to lose the others
                yield module.name, error


def _nested(values: Mapping[str, str]) -> dict[str, Any]:
    """{"left_arm_config.port": "/dev/a"} -> {"left_arm_config": {"port": "/dev/a"}}."""
    config: dict[str, Any] = {}
    for name, text in values.items():
        *path, last = name.split(".")
        place = config
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"'{name}': '{part}' is given both as a whole and in parts")
        place[last] = parse_string(text) if text.strip().startswith(("{", "[")) else text
    return config


def _missing(error: BaseException | None) -> str | None:
    """The remedy, if a driver that is not installed is at the root of an error."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if said := re.search(r"'([^']+)' is required.*?lerobot\[([^\]]+)\]", str(error)):
        driver, extra = said[1], said[2].replace("_", "-")
    elif error.name is not None:
        driver = error.name.partition(".")[0]
        extra = _EXTRAS.get(driver, driver)
    else:
        return None
    return f"its driver {driver} is not installed: pip install 'lerobot[{extra}]'"


def _words(error: BaseException) -> str:
    text = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", " ".join(str(error).split()))
    return text.replace("`", "") or type(error).__name__
