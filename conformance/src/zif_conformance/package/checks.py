"""The checks that need a fresh process: each loads the plugin anew and says what that did.

Run by `zif_conformance.package.fresh`, each with the platform's name and one word. Nothing heavy is imported above.
"""

import builtins
import contextlib
import ctypes
import importlib
import importlib.abc
import io
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import FrameType, ModuleType
from typing import Any, NoReturn

from zif_conformance.package.state import AttributePrint, differences, open_devices, process_state

ARRAY_LIBRARIES = ("torch", "numpy", "jax", "tensorflow", "cupy", "triton", "mlx", "paddle")
_ENVIRONMENT_CODE = ("os", "collections.abc", "_collections_abc")


def imported_array_libraries(platform: str, stage: str) -> list[str]:
    """Load the plugin, and probe when `stage` says so; return the array libraries that came with it."""
    entry = _load_light(platform)
    if stage == "probe":
        entry.probe()
    return [name for name in ARRAY_LIBRARIES if name in sys.modules]


def changed_process_state(platform: str, stage: str) -> list[str]:
    """Load the plugin, probe or plan as `stage` says; return what changed for the process."""
    from zif.plugins import PlatformRegistry

    PlatformRegistry.load(())  # core's own loading comes first
    before = process_state()
    entry = _load_light(platform)
    if stage in ("probe", "plan"):
        entry.platform.probe()
    if stage == "plan":
        _plan(platform)
    return differences(before, process_state())


def opened_device_files(platform: str, stage: str) -> list[str]:
    """Return device files that loading, probing and planning left open."""
    _plan(platform)
    return open_devices()


def rebound_names(platform: str, stage: str) -> list[str]:
    """Return names of core or the array library that loading, or the first use of a device, bound to something else.

    What the libraries that a plugin uses do to the array library when they are imported, is theirs: at the first use
    they are there before.
    """
    from zif_conformance.package.names import plugin_package
    from zif_conformance.package.source import PackageSource

    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    _import_core()
    if stage == "use":
        own = plugin_package(_load_light(platform).plugin)
        for name in ("torch._dynamo", *PackageSource(own).libraries()):
            with contextlib.suppress(Exception):  # not installed, or not for this machine: then it is not used either
                importlib.import_module(name)
    before = AttributePrint()
    entry = _load_light(platform)
    if stage == "use":
        _use_once(entry)
    return before.changes()


def environment_reads_at_import(platform: str, _: str) -> list[str]:
    """Return the variables that the plugin's own code read while it was imported."""
    from zif_conformance.package.names import plugin_package

    reads: list[tuple[str, str]] = []
    original = os.environ.__class__.__getitem__

    def recording(self: Any, key: str) -> str:
        reads.append((_reader(sys._getframe(1)), key))
        return str(original(self, key))

    os.environ.__class__.__getitem__ = recording  # type: ignore[method-assign]
    package = plugin_package(_load_light(platform).plugin)
    return [f"{reader} reads {key}" for reader, key in reads if f"{reader}.".startswith(f"{package}.")]


def probe_without(platform: str, absent: str) -> dict[str, Any]:
    """Probe where something is absent; return what the probe said, or how it failed."""
    entry = _load_light(platform)
    _HIDERS[absent](entry.plugin)
    probe = entry.platform.probe()
    return {"devices": [d.device_id for d in probe.devices], "reason": probe.reason, "steps": list(probe.steps)}


def select_without_devices(platform: str, _: str) -> dict[str, str]:
    """Let the probe find nothing and name the platform nevertheless; return the error."""
    from zif.contract import Probe
    from zif.plugins import PlatformRegistry

    registry = PlatformRegistry.discover()
    nothing = Probe((), "nothing here, said the suite", ("looked away",))
    registry.platforms[platform].platform.probe = lambda: nothing  # type: ignore[method-assign]
    try:
        chosen = registry.select(platform)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "none", "message": f"{chosen.name} was chosen"}


def load_without_array_library(platform: str, _: str) -> str:
    """Load the plugin where no array library can be imported; return its platform's name."""
    _hide_array_libraries(None)
    return str(_load_light(platform).platform.name)


def claims_here(platform: str, how: str) -> dict[str, Any]:
    """Return the capabilities that this process sees, or a child forked off it after it has probed."""
    from zif_conformance.claims import capabilities_json

    entry = _load_light(platform)
    probe = entry.platform.probe()
    if how != "fork":
        return capabilities_json(probe.devices[0].capabilities)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write_end, "w") as pipe:
            json.dump(capabilities_json(entry.platform.probe().devices[0].capabilities), pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        seen: dict[str, Any] = json.load(pipe)
    return seen


def answers_of_unchosen(platform: str, _: str) -> list[str]:
    """Return the hooks that are answered otherwise when this plugin is installed and another platform is chosen."""
    with_it, without_it = (_answers(platform, installed) for installed in (True, False))
    return [hook for hook in with_it if with_it[hook] != without_it[hook]]


def _answers(platform: str, installed: bool) -> dict[str, str]:
    """Return what answers each hook for a plan of a platform that nobody brings."""
    from zif.plugins import PlatformRegistry

    own = {id(point) for point in _points(platform)}
    points = [point for point in _all_points() if installed or id(point) not in own]
    registry = PlatformRegistry.load(points)
    hooks = {"zif_scheduler": "block_manager", "zif_block_manager": "arena", "zif_model_runner": "device"}
    return {
        hook: type(registry.ask(_OtherPlan.platform, hook, config=None, plan=_OtherPlan(), **{argument: None})).__name__
        for hook, argument in hooks.items()
    }


class _OtherPlan:
    """A plan of a platform that is not under test."""

    platform = "another-platform"


def _all_points() -> tuple[EntryPoint, ...]:
    from zif.contract import ENTRY_POINT_GROUP

    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _points(platform: str) -> list[EntryPoint]:
    """Return the entry point of the platform's name, or all where no entry point has it."""
    points = _all_points()
    return [point for point in points if point.name == platform] or list(points)


def _load_light(platform: str) -> Any:
    """Load this platform's plugin, and no other where its entry point has its name."""
    from zif.plugins import PlatformRegistry

    registry = PlatformRegistry.load(_points(platform))
    if platform not in registry.platforms:
        reasons = "; ".join(failure.reason for failure in registry.failures)
        raise AssertionError(f"no entry point brings platform {platform!r}: {reasons}")
    return registry.platforms[platform]


def _plan(platform: str) -> None:
    from zif_conformance.subject import Subject

    subject = Subject.find(platform)
    subject.platform.plan(subject.workload())


def _import_core() -> None:
    import zif

    for module in pkgutil.walk_packages(zif.__path__, "zif."):
        if "__main__" not in module.name:
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)


def _use_once(entry: Any) -> None:
    """Plan, open, allocate, ask for health, free and close."""
    from zif_conformance.subject import Subject

    subject = Subject(entry.platform, entry.distribution, entry.plugin)
    with subject.opened() as device:
        if hasattr(device, "allocator"):
            buffer = device.allocator.allocate(256, "conformance")
            device.allocator.free(buffer)
        device.health(10.0)
        device.synchronize()


def _reader(frame: FrameType | None) -> str:
    """Name the module that asked for a variable, behind the standard library's own frames."""
    while frame is not None and frame.f_globals.get("__name__") in _ENVIRONMENT_CODE:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame else ""


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that does not find what is neither the standard library's nor `kept`, as if it were not installed."""

    def __init__(self, finder: Any, kept: Sequence[str]) -> None:
        self._finder = finder
        self._kept = (*kept, *sys.stdlib_module_names)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        known = fullname.partition(".")[0] in self._kept
        return self._finder.find_spec(fullname, path, target) if known else None


def _hide_array_libraries(_: object) -> None:
    for name in ARRAY_LIBRARIES:
        sys.modules[name] = None  # type: ignore[assignment]


def _hide_third_parties(plugin: object) -> None:
    """Hide every package but core's needs and the plugin's own."""
    own = str(getattr(plugin, "__name__", "") or type(plugin).__module__).partition(".")[0]
    kept = {own, "zif", "pluggy", "zif_conformance"}
    for name in list(sys.modules):
        top = name.partition(".")[0]
        if top not in kept and top not in sys.stdlib_module_names and top not in ("__main__", "pytest"):
            del sys.modules[name]
    sys.meta_path[:] = [_Finder(finder, tuple(kept)) for finder in sys.meta_path]


def _hide_shared_libraries(_: object) -> None:
    class Absent(ctypes.CDLL):
        def __init__(self, name: str | None = None, *_: Any, **__: Any) -> None:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    ctypes.CDLL = Absent  # type: ignore[misc]
    ctypes.cdll.LoadLibrary = Absent  # type: ignore[method-assign]


def _hide_programs(_: object) -> None:
    def absent(*arguments: Any, **__: Any) -> NoReturn:
        raise FileNotFoundError(2, "No such file or directory", str(arguments[:1]))

    subprocess.Popen = absent  # type: ignore[misc, assignment]
    os.environ["PATH"] = "/nonexistent"


def _hide_device_files(_: object) -> None:
    """Let the files be absent in which systems show their devices and drivers."""
    original = builtins.open

    def guarded(file: Any, *arguments: Any, **named: Any) -> Any:
        if str(file).startswith(("/dev/", "/sys/class/", "/sys/bus/", "/sys/module/", "/proc/driver/")):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return original(file, *arguments, **named)

    builtins.open = guarded
    io.open = guarded


_HIDERS: dict[str, Callable[[object], None]] = {
    "array libraries": _hide_array_libraries,
    "other packages": _hide_third_parties,
    "shared libraries": _hide_shared_libraries,
    "programs": _hide_programs,
    "device files": _hide_device_files,
}
