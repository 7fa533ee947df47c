"""The arguments of a command, and one line for every way in which they can be wrong.

tyro's own way is a framed box. Its hook for parse errors gives what is wrong as data, but is not promised to stay:
where it is missing, or tells something unknown, the line is made from the text of the box.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional

from bascule.commands.base import Command
from vla.core.config import likely, nearest


class UsageError(Exception):
    """The arguments are wrong. One line that says how."""


def parse(command: type[Command], args: list[str], prog: str) -> Command:
    """The command with its arguments. UsageError; SystemExit after `--help`."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown), _hook(command, args):
            parsed = tyro.cli(shown_plainly(command), args=args, prog=prog)
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_unframed(shown.getvalue())) from None
        raise
    sys.stderr.write(shown.getvalue())  # warnings
    given = {_flag(arg) for arg in args if arg.startswith("--")}
    if empty := next((flag for flag in _empty(parsed) if flag in given), None):  # as of a variable that is not set
        raise UsageError(f"{empty}: a value is missing")
    for field in fields(command):
        flag, required = f"--{field.name.replace('_', '-')}", field.default is MISSING is field.default_factory
        if required and getattr(parsed, field.name) == () and flag in _flags(command):
            raise UsageError(f"{flag}: a value is missing")
        if get_origin(get_type_hints(command)[field.name]) is dict:
            _check_once(flag, args)
    return parsed


def _empty(settings: Any) -> Iterator[str]:
    """The flags of the fields of a command, and of an experiment's settings in it, that hold nothing."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _empty(value)
        elif value in ((), {}):
            yield f"--{field.name.replace('_', '-')}"


def _check_once(flag: str, args: list[str]) -> None:
    """UsageError if the pairs of `flag` give one key twice, or the flag itself is there twice: one would be lost."""
    starts = [i for i, arg in enumerate(args) if _flag(arg) == flag]
    if len(starts) > 1:
        raise UsageError(f"{flag} is given twice: write all of its pairs behind one")
    for start in starts:
        values = list(takewhile(lambda arg: not arg.startswith("--"), args[start + 1 :]))
        keys = values[1::2] if "=" in args[start] else values[::2]
        keys += [args[start].partition("=")[2]] if "=" in args[start] else []
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UsageError(f"{flag} gives '{twice[0]}' twice: give one of them")


@cache
def shown_plainly(command: type[Any]) -> type[Any]:
    """The command, whose help shows a positional argument by its name, as SUITE instead of STR, and says neither {None}
    nor "(default: None)" of a flag that may be left out."""
    bare, hints = get_type_hints(command), get_type_hints(command, include_extras=True)
    for field in fields(command):
        if is_dataclass(bare[field.name]):
            shown_plainly(bare[field.name])  # an experiment's settings, whose flags the command has
        kind, given = bare[field.name], [one for one in get_args(bare[field.name]) if one is not NoneType]
        shown = {"help_behavior_hint": ""} if field.default in (None, ()) else {}
        if NoneType in get_args(kind) and len(given) == 1:
            shown["metavar"] = _metavar(given[0])
        elif Positional in getattr(hints[field.name], "__metadata__", ()) and kind in (str, Path):
            shown["metavar"] = field.name.upper()
        hints[field.name] = Annotated[hints[field.name], tyro.conf.arg(**shown)]
    command.__annotations__ = hints
    return command


def _metavar(kind: Any) -> str:
    """The word for a value of this kind in the help: INT, STR [STR ...], {frozen,lora,full}."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        each = _metavar(get_args(kind)[0])
        return f"{each} [{each} ...]"
    return kind.__name__.upper()


@contextmanager
def _hook(command: type[Command], args: list[str]) -> Iterator[None]:
    """Raise a UsageError where tyro would draw a box, if this tyro can tell."""
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    def tell(event: Any) -> None:
        try:
            text = _words(event, command, args)
        except AttributeError:  # its fields have changed: the box says it
            return
        if text:
            raise UsageError(text)

    with on_parse_error(tell):
        yield


def _words(event: Any, command: type[Command], args: list[str]) -> str | None:
    """One line; None for an event that is not known here."""
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        return _foreign(event.tokens, command)
    if kind == "MissingArgs" or (kind == "BadValue" and event.argument.is_positional()):
        flags = _flags(command)  # an option written wrongly is why others are missing
        if foreign := [arg for arg in args if arg.startswith("--") and _flag(arg) not in flags]:
            return _foreign(foreign, command)
        missing = [one.arg for one in event.missing_arguments] if kind == "MissingArgs" else [event.argument]
        return f"{' and '.join(map(_name, missing))} {'is' if len(missing) == 1 else 'are'} required"
    if kind == "InvalidChoice":
        return f"{_name(event.argument)}: {_choice(event.value, event.choices)}"
    if kind == "BadValue" and event.reason == "too_few_values":
        return f"{_name(event.argument)}: a value is missing ({event.argument.lowered.metavar})"
    if kind == "InstantiationFailure" and event.argument is None:
        return " ".join(str(event.message).split())
    if kind == "InstantiationFailure":
        expected = event.argument.lowered.metavar.lower()
        value = re.search(r"(?:from \[|base 10: |float: )'(.*?)'", event.message)
        if value and re.fullmatch(r"\w+", expected):
            return f"{_name(event.argument)}: invalid {expected} value '{value[1]}'"
        if event.message.startswith("Failed to parse key-value"):
            return f"{_name(event.argument)}: expected pairs, {event.argument.lowered.metavar}"
        return f"{_name(event.argument)}: {' '.join(event.message.split())}"
    return None


def _name(argument: Any) -> str:
    """A flag, or a positional argument: the word that stands for it in the help, unless that lists choices."""
    if not argument.is_positional():
        return argument.lowered.name_or_flags[-1]
    word = str(argument.lowered.metavar)
    return argument.display_name() if "{" in word else word


def _choice(value: str, choices: tuple[str, ...]) -> str:
    choices = tuple(choice for choice in choices if choice != "None")  # a flag that is left out
    return f"unknown choice '{value}'; {likely(nearest(value, list(choices)), 'known: ' + ', '.join(choices))}"


def _foreign(tokens: list[str], command: type[Command]) -> str:
    """The first argument that is none of the command's, and the flag that it resembles."""
    flag = next((token for token in tokens if token.startswith("-")), None)
    if flag is None:
        return f"unexpected argument '{tokens[0]}'"
    guess = nearest(_flag(flag).lstrip("-"), [known[2:] for known in _flags(command)])
    return f"unknown option '{_flag(flag)}'" + (f"; did you mean '--{guess}'?" if guess else "")


def _flag(token: str) -> str:
    """Without its value, as the help spells it."""
    return token.partition("=")[0].replace("_", "-")


def _flags(command: type[Command]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(command)
    return [flag for flag in parser._option_string_actions if flag.startswith("--")]


def _unframed(box: str) -> str:
    """The text of a framed box, on one line."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", box).split())
    return text.partition(" For full helptext")[0]
