"""The state of a process that a plugin must leave alone, and the attributes of packages that it must not rebind.

Run inside fresh processes by `zif_conformance.package.checks`.
"""

import builtins
import locale
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType

_GUARDED = ("zif", "torch", "numpy", "builtins")
_CODE = (FunctionType, BuiltinFunctionType, type, property, staticmethod, classmethod)


def process_state() -> dict[str, str]:
    """Return what a plugin could change for others, spelled as text. Devices are files under /dev held open."""
    return {
        "environment": repr(sorted(os.environ.items())),
        "working folder": os.getcwd(),
        "path": repr(sys.path),
        "import hooks": repr([type(finder).__name__ for finder in (*sys.meta_path, *sys.path_hooks)]),
        "warning filters": repr([str(entry) for entry in warnings.filters]),
        "signal handlers": repr([signal.getsignal(number) for number in sorted(signal.valid_signals())]),
        "threads": repr(sorted(thread.name for thread in threading.enumerate())),
        "exception hook": repr((sys.excepthook, threading.excepthook)),
        "locale": repr(locale.setlocale(locale.LC_ALL, None)),
        "recursion limit": repr(sys.getrecursionlimit()),
        "open devices": repr(open_devices()),
    }


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Say what is not as it was."""
    return [f"{name}: was {before[name]}, is {after[name]}" for name in before if before[name] != after[name]]


def open_devices() -> list[str]:
    """Return the device files that this process holds open, where the system tells."""
    folder = "/proc/self/fd"
    found = set()
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
        harmless = target.startswith(("/dev/pts", "/dev/shm", "/dev/tty")) or target in ("/dev/null", "/dev/urandom")
        if target.startswith("/dev/") and not harmless:
            found.add(target)
    return sorted(found)


class AttributePrint:
    """What the names in core, the array library and `builtins` are bound to.

    Only code is compared, functions and classes: modules keep counters and caches of their own. The objects are kept
    alive, so that a new one cannot take the address of an old one.
    """

    def __init__(self) -> None:
        self._bound = {key: value for holder in _holders() for key, value in _members(*holder)}

    def changes(self) -> list[str]:
        """Say which names are bound to something else now, or were added from outside."""
        now = AttributePrint()._bound
        rebound = [name for name, value in self._bound.items() if name in now and now[name] is not value]
        removed = [name for name in self._bound if name not in now]
        known_holders = {name.rpartition(".")[0] for name in self._bound}
        added = [
            n for n, v in now.items() if n not in self._bound and n.rpartition(".")[0] in known_holders and _foreign(v)
        ]
        return [
            *(f"{name} was rebound" for name in rebound),
            *(f"{name} was removed" for name in removed),
            *(f"{name} was added" for name in added),
        ]


def _holders() -> list[tuple[str, object]]:
    """Return the modules to watch and the classes defined in them."""
    modules = [
        (name, module)
        for name, module in sorted(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] in _GUARDED
    ]
    classes = [
        (f"{name}.{key}", value)
        for name, module in modules
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == name
    ]
    return [*modules, *classes, ("builtins", builtins)]


def _members(name: str, holder: object) -> list[tuple[str, object]]:
    return [(f"{name}.{key}", value) for key, value in list(vars(holder).items()) if isinstance(value, _CODE)]


def _foreign(value: object) -> bool:
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and module.partition(".")[0] not in (*_GUARDED, "typing", "functools")
