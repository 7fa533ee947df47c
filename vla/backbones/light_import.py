"""Import `transformers` without the packages that its model classes import and never call when they act.

`LlavaForConditionalGeneration` alone pulls in scipy.optimize (for the losses of object detectors), torchvision's models
(for one enumeration of its transforms) and torch's compiler (for decorators and for masks under vmap): as much CPU time
as torch itself. Nothing is lost: each is imported as soon as it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_FUNCTIONS = {
    "scipy.optimize": "linear_sum_assignment",
    "torch._dynamo._trace_wrapped_higher_order_op": "TransformGetItemToIndex",
    "torchvision.ops.boxes": "box_iou",
}
"""The one name that `transformers`, or torchvision's transforms, take from each of these modules, only to call it."""

_PARENT, _SUBMODULES = "torchvision", ("datasets", "models", "ops")
"""Submodules that `import torchvision` imports and that its transforms do without."""

_COMPILER, _SCANNER = "torch._dynamo", "transformers.utils.import_utils"


@contextmanager
def light_import() -> Iterator[None]:
    """While `transformers` is imported in here, stand-ins take the place of what it need not import yet.

    A module that is imported already stays as it is, and afterwards every import finds the real one.
    """
    stand_ins = {name: _called_later(name, used) for name, used in _FUNCTIONS.items() if name not in sys.modules}
    if _PARENT not in sys.modules:
        stand_ins |= {name: ModuleType(name) for name in (f"{_PARENT}.{child}" for child in _SUBMODULES)}
    sys.modules.update(stand_ins)
    with ExitStack() as changes:
        changes.enter_context(_replaced(importlib.metadata, "packages_distributions", _Distributions))
        if _COMPILER not in sys.modules:
            decorators = _Decorators()
            changes.enter_context(_replaced(torch.compiler, "disable", decorators.disable))
            changes.enter_context(_replaced(torch.compiler, "allow_in_graph", decorators.allow_in_graph))
            sys.meta_path.insert(0, _Afterwards(_COMPILER, decorators.apply))
        if _SCANNER not in sys.modules:
            sys.meta_path.insert(0, _Afterwards(_SCANNER, _read_sources_once))
        try:
            yield
        finally:
            for name, module in stand_ins.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            _give_back_submodules(stand_ins)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _called_later(name: str, used: str) -> ModuleType:
    """A stand-in for module `name`, whose function `used` imports the real one when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(name), used)(*args, **kwargs)

    def other(attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system and `inspect` ask every module for these
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    call.__name__ = call.__qualname__ = used
    module = ModuleType(name)
    vars(module).update({used: call, "__getattr__": other})
    return module


def _give_back_submodules(stand_ins: dict[str, ModuleType]) -> None:
    """Let attributes of torchvision that are stand-ins be imported when they are asked for."""
    parent = sys.modules.get(_PARENT)
    if parent is None:
        return
    left = [name for name in _SUBMODULES if vars(parent).get(name) is stand_ins.get(f"{_PARENT}.{name}", parent)]
    for name in left:
        delattr(parent, name)
    if left:
        vars(parent).setdefault("__getattr__", _submodule)


def _submodule(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{_PARENT}.{name}")
    raise AttributeError(f"module {_PARENT!r} has no attribute {name!r}")


class _Decorators:
    """Decorators of `torch.compiler` that take effect when the compiler is imported: until then nothing compiles."""

    def __init__(self) -> None:
        self._pending: list[Callable[[], Any]] = []

    def allow_in_graph(self, fn: Any) -> Any:
        """`torch.compiler.allow_in_graph`, later: it registers `fn` and leaves it as it is."""
        self._pending.append(lambda: torch.compiler.allow_in_graph(fn))
        return fn

    def disable(self, fn: Any = None, *options: Any, **more: Any) -> Any:
        """`torch.compiler.disable`, later: until the compiler is there, `fn` itself is called."""
        if not callable(fn):
            return lambda decorated: self.disable(decorated, *options, **more)
        now = [fn]

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return now[0](*args, **kwargs)

        self._pending.append(lambda: now.append(torch.compiler.disable(now.pop(), *options, **more)))
        return call

    def apply(self, compiler: ModuleType) -> None:
        """Decorate what was decorated before the compiler was imported."""
        for decorate in self._pending:
            decorate()


class _Afterwards:
    """A finder of one module that calls a function with it once it is imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own specification, whose loader does what it does and then calls the function."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec


def _read_sources_once(import_utils: ModuleType) -> None:
    """Let `transformers` look through its thousands of source files once and not twice, and find a name faster."""
    create, fetch = import_utils.create_import_structure_from_path, import_utils.fetch__all__

    def create_once(path: str | os.PathLike[str]) -> Any:
        return create(os.path.dirname(path) if os.path.isfile(path) else os.fspath(path))

    def fetch_last(text: str) -> list[str]:
        start = text.rfind("\n__all__")
        return fetch(text if start < 0 else text[start + 1 :])

    import_utils.create_import_structure_from_path, import_utils.fetch__all__ = create_once, fetch_last


class _Distributions(dict[str, Sequence[str]]):
    """`importlib.metadata.packages_distributions()`, which reads the metadata of every package, for a few names: one
    that a distribution has itself needs no others."""

    def __missing__(self, package: str) -> Sequence[str]:
        try:
            importlib.metadata.distribution(package)
            self[package] = [package]
        except importlib.metadata.PackageNotFoundError:
            self.update({**_all_distributions(), **self})
            if package not in self.keys():
                raise KeyError(package) from None
        return self[package]


_all_distributions = importlib.metadata.packages_distributions
