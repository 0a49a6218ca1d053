"""Applies edits: to the running reference platform, and back again; or to a copy of its package on disk.

In the running process, the edited source of a module is executed aside, and what came out different is moved into the
real one: code of functions and methods, constants, class attributes. So names that others imported are changed, too.
"""

import contextlib
import importlib
import inspect
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from zif.errors import ConfigError
from zif_conformance.mutants.bank import Edit

PLATFORM = "zif_conformance.reference_platform"

_MISSING = object()
_CLASS_MACHINERY = ("__module__", "__dict__", "__weakref__", "__doc__", "__parameters__", "__orig_bases__")


def edited_source(source: str, edits: Sequence[Edit]) -> str:
    """Return the source with every edit made. Raises `ConfigError` when a place is missing or stands there twice."""
    for edit in edits:
        if source.count(edit.before) != 1:
            raise ConfigError(
                f"{edit.file}: {edit.before!r} stands there {source.count(edit.before)} times, not once: "
                "the reference platform has changed; write the edit anew"
            )
        source = source.replace(edit.before, edit.after)
    return source


@contextlib.contextmanager
def applied(edits: Sequence[Edit]) -> Iterator[None]:
    """Change the running reference platform, and change it back at the end."""
    changes = Changes()
    try:
        for file in dict.fromkeys(edit.file for edit in edits):
            module = importlib.import_module(f"{PLATFORM}.{file.removesuffix('.py')}")
            changes.take_over(module, _executed(module, [edit for edit in edits if edit.file == file]))
        yield
    finally:
        changes.undo()


def edited_copy(edits: Sequence[Edit], folder: Path) -> Path:
    """Copy the whole distribution's package into `folder`, edited; returns what belongs on the module path."""
    source = Path(str(importlib.import_module("zif_conformance").__file__)).parent
    target = folder / source.name
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    for file in dict.fromkeys(edit.file for edit in edits):
        path = target / "reference_platform" / file
        mine = [edit for edit in edits if edit.file == file]
        path.write_text(edited_source(path.read_text(encoding="utf-8"), mine), encoding="utf-8")
    return folder


class Changes:
    """What was changed in a process, last first when it is undone."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def take_over(self, module: ModuleType, executed: ModuleType) -> None:
        """Move into `module` what differs in `executed`."""
        self._take_names(module, vars(module), vars(executed), module)

    def undo(self) -> None:
        """Restore every attribute."""
        while self._old:
            owner, name, value = self._old.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def _take_names(self, owner: Any, old: Any, new: Any, module: ModuleType) -> None:
        for name, value in list(new.items()):
            if not isinstance(owner, ModuleType) and name in _CLASS_MACHINERY:
                continue
            before = old.get(name, _MISSING)
            if isinstance(value, FunctionType):
                self._take_function(owner, name, before, value, module)
            elif isinstance(value, type):
                if value.__module__ == module.__name__ and isinstance(before, type) and not is_dataclass(value):
                    self._take_names(before, vars(before), vars(value), module)
                elif before is _MISSING:
                    self._set(owner, name, value)
            elif not name.startswith("__") and not isinstance(value, ModuleType) and _is_data(value):
                if before is _MISSING or before != value:
                    self._set(owner, name, value)
            elif before is _MISSING and not name.startswith("__"):
                self._set(owner, name, value)

    def _take_function(self, owner: Any, name: str, old: Any, new: FunctionType, module: ModuleType) -> None:
        if new.__module__ != module.__name__ or not _is_written_in(new.__code__, module):
            return
        if isinstance(old, FunctionType):
            if old.__code__ != new.__code__:
                self._set(old, "__code__", new.__code__)
            if old.__defaults__ != new.__defaults__:
                self._set(old, "__defaults__", new.__defaults__)
            return
        cells = tuple(CellType(owner) for _ in new.__code__.co_freevars)
        self._set(owner, name, FunctionType(new.__code__, vars(module), name, new.__defaults__, cells))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        current = vars(owner).get(name, _MISSING) if name not in ("__code__", "__defaults__") else getattr(owner, name)
        self._old.append((owner, name, current))
        setattr(owner, name, value)


def _executed(module: ModuleType, edits: Sequence[Edit]) -> ModuleType:
    """Execute the edited source as a module of the same name that nobody knows."""
    path = str(module.__file__)
    twin = ModuleType(module.__name__)
    twin.__dict__.update(__file__=path, __package__=module.__package__, __spec__=module.__spec__)
    source = edited_source(Path(path).read_text(encoding="utf-8"), edits)
    exec(compile(source, path, "exec"), vars(twin))
    return twin


def _is_written_in(code: CodeType, module: ModuleType) -> bool:
    return code.co_filename == inspect.getsourcefile(module)


def _is_data(value: object) -> bool:
    """Say whether two executions of the same line give equal values."""
    return isinstance(value, str | int | float | tuple | frozenset | dict | None) or is_dataclass(value)
