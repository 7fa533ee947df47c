"""Frozen dataclasses <-> plain dicts and JSON (strictly), and lookups that say what you probably meant."""

from __future__ import annotations

import difflib
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vla.core.disk import temporary, writing


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def unknown(name: str, choices: Iterable[str], kind: str) -> str:
    """The one sentence every wrong name gets."""
    known = sorted(choices)
    return f"unknown {kind} '{name}'; {likely(nearest(name, known), 'known: ' + ', '.join(known))}"


def likely(guess: str | None, known: str) -> str:
    """Words that follow a wrong name: the likely one, and the `known` ones in brackets; or these alone."""
    return f"did you mean '{guess}'? ({known})" if guess else known


def lookup[T](name: str, table: Mapping[str, T], kind: str) -> T:
    """`table[name]`, or ValueError naming the nearest entry. `kind` is what a user calls it: "recipe", "suite"."""
    if name in table:
        return table[name]
    raise ValueError(unknown(name, table, kind))


def find[T](name: str, table: Mapping[str, T], kind: str) -> T:
    """`table[name]`, or what "MODULE:NAME" imports: how parts from outside the package are named in a configuration.

    ValueError naming the nearest entry, or saying what could not be imported.
    """
    module, colon, attribute = name.partition(":")
    if name in table or not colon:
        return lookup(name, table, kind)
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as problem:
        raise ValueError(
            f"{kind} '{name}': there is no module '{problem.name}' on the Python path (for a file in this folder, set "
            "PYTHONPATH=.)"
        ) from None
    except AttributeError:
        raise ValueError(f"{kind} '{name}': module {module} has no '{attribute}'") from None


def make(name: str, maker: Callable[..., Any], kind: str, needs: Iterable[str] = (), **arguments: Any) -> Any:
    """`maker(**arguments)`, the maker being what `find` found. ValueError naming a part from outside the package for
    whatever its maker raises, and for an attribute of `needs` that it lacks."""
    if ":" not in name:
        return maker(**arguments)
    try:
        part = maker(**arguments)
    except Exception as problem:
        words = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ValueError(f"{kind} '{name}' cannot be made ({', '.join(arguments)} given): {words}") from problem
    if lacking := [need for need in needs if not hasattr(part, need)]:
        made = f"{kind} '{name}' makes {type(part).__name__!r}, which lacks {', '.join(lacking)}"
        raise ValueError(f"{made}: docs/extend.md says what a {kind} must have")
    return part


def encode(value: Any, *, not_finite: Callable[[float], Any] = float) -> Any:
    """Dataclasses, numpy values, paths and what they hold as JSON values: dict, list, str, int, float, bool, None.

    `not_finite` says what becomes of NaN and infinity, which JSON does not know; they stay as they are without it.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name), not_finite=not_finite) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item, not_finite=not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, not_finite=not_finite) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else not_finite(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(f"cannot encode a {type(value).__name__} as JSON")


def difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first field in which the part `name` of two encoded configurations differs ("model.head"), and its values."""
    while isinstance(before, Mapping) and isinstance(now, Mapping) and before != now:
        key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return name, before, now


def decode[T](cls: type[T], data: Mapping[str, Any]) -> T:
    """The dataclass `cls` from what `encode` made of it. ValueError for unknown, missing and mistyped fields."""
    return _decode_dataclass(cls, data, cls.__name__)


def _decode_dataclass[T](cls: type[T], data: Any, where: str) -> T:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a table of fields, got {data!r}")
    known = {field.name: field for field in fields(cls) if field.init}
    for key in data:
        if key not in known:
            raise ValueError(unknown(str(key), known, f"field of {where}"))
    hints = get_type_hints(cls)
    values = {key: _decode_value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where} lacks the field '{name}'")
    return cls(**values)


def _decode_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(unknown(str(value), [str(arg) for arg in args], where))
    if is_dataclass(hint):
        return _decode_dataclass(hint, value, where)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            if len(value) != len(args):
                raise ValueError(f"{where} must have {len(args)} entries, got {len(value)}")
            kinds = args
        else:
            kinds = (args[0],) * len(value)
        pairs = zip(kinds, value, strict=True)
        return origin(_decode_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}")
        return {key: _decode_value(args[1] if args else Any, item, f"{where}.{key}") for key, item in value.items()}
    if hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and issubclass(hint, os.PathLike):
        if isinstance(value, str):
            return hint(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _decode_value(kind, value, where)
        except ValueError as problem:
            # of "X | None", X's own complaint helps; "must be NoneType" does not
            if kind is not type(None):
                problems.append(str(problem))
    if len(problems) == 1:
        raise ValueError(problems[0])
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{where} must be {names}, got {value!r}")


def fill_defaults(defaults: Any, given: Any) -> Any:
    """Encoded `given` with what it lacks from `defaults`: a field that did not exist yet had its default's meaning."""
    if not (isinstance(defaults, dict) and isinstance(given, dict)):
        return given
    return {**defaults, **{key: fill_defaults(defaults.get(key), value) for key, value in given.items()}}


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at `path` by `data`: after a crash it holds either the old bytes or the new ones.

    A device or a pipe (/dev/stdout, a process substitution) is written to, never replaced.
    """
    path = Path(path)
    with writing(path, path.name, data):
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as stream:
                stream.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = temporary(path)
        try:
            with new.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def save_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` (dataclasses and numpy values welcome) as indented JSON, atomically. NaN and infinity become null."""
    plain = encode(obj, not_finite=lambda _: None)
    write_atomic(path, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, also one with the mark that editors on Windows set at its start. ValueError naming the file
    when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {os.fspath(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {problem}") from None
