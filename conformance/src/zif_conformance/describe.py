"""Describes the platform under test and the machine, in a process of its own: `python -m zif_conformance.describe`.

Started by the supervisor, because loading, probing, planning and opening are what a plugin may fail, hang or crash in.
Says one JSON line after each of them, so that what came before a crash is not lost. Judges nothing.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from zif.contract import CONTRACT_VERSION, DeviceInfo, Plan
from zif.errors import ContractError, PlatformNotFoundError
from zif.plugins import PlatformRegistry
from zif_conformance.child import watch_parent
from zif_conformance.claims import capabilities_json
from zif_conformance.package.names import plugin_package
from zif_conformance.subject import Subject
from zif_conformance.waivers import FILE_NAME, read_waivers, waiver_json

_SERVICES = ("allocator", "attention", "ops", "graphs")
_CODE_SUFFIXES = (".py", ".so", ".pyd", ".dylib", ".toml")
_PACKAGES = ("zif", "zif-conformance", "torch", "numpy", "pluggy", "pytest")


def main() -> int:
    """Describe and return 0; what fails is part of the description."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--platform", required=True)
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    arguments = parser.parse_args()
    watch_parent(arguments.lifeline)
    with os.fdopen(arguments.descriptor, "w", encoding="utf-8") as pipe:
        for part in describe(arguments.platform):
            print(json.dumps(part), file=pipe, flush=True)
    return 0


def describe(name: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of the description; "error" in a part says why the later ones are missing."""
    yield {"environment": environment()}
    try:
        subject = Subject.find(name)
    except PlatformNotFoundError as error:
        yield {"unknown": str(error), "error": str(error)}
        return
    except ContractError as error:
        yield {"error": str(error)}
        return
    yield from _describe_subject(subject)


def _describe_subject(subject: Subject) -> Iterator[dict[str, Any]]:
    yield {"platform": _platform_part(subject)}
    try:
        yield {"waivers": [waiver_json(waiver) for waiver in read_waivers(_waiver_text(subject))]}
    except ContractError as error:
        yield {"waivers": [], "waiver_error": str(error)}
    try:
        yield {"device": device_json(subject.device_info())}
        plan = subject.plan(subject.workload())
        yield {"dispatch": planned_dispatch(plan)}
        with subject.opened() as device:
            yield {"observed": {name: _class_path(getattr(device, name, None)) for name in _SERVICES}}
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}


def _platform_part(subject: Subject) -> dict[str, Any]:
    package = plugin_package(subject.plugin)
    return {
        "name": str(subject.name),
        "vendor": str(subject.platform.vendor),
        "distribution": subject.distribution,
        "package": package,
        "fingerprint": package_fingerprint(package),
    }


def device_json(info: DeviceInfo) -> dict[str, Any]:
    """Return a device as the report shows it. What was free at the moment is left out: it never repeats."""
    return {
        "device_id": info.device_id,
        "name": info.name,
        "architecture": info.architecture,
        "memory_bytes": info.memory_bytes,
        "runtime": dict(info.runtime),
        "capabilities": capabilities_json(info.capabilities),
    }


def planned_dispatch(plan: Plan) -> list[dict[str, str]]:
    """Return which code the plan names for each op and service, with the fingerprint of its module."""
    return [
        {"service": service, "implementation": code, **module_fingerprint(code)}
        for service, code in plan.implementations
    ]


def module_fingerprint(code: str) -> dict[str, str]:
    """Find the module that a dotted name lies in and hash its file."""
    parts = code.split(" ")[0].split(".")
    for end in range(len(parts), 0, -1):
        spec = _spec(".".join(parts[:end]))
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            digest = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
            return {"module": spec.name, "sha256": digest}
    return {"module": "", "sha256": ""}


def names_code(code: str) -> bool:
    """Say whether a dotted name is a module, or leads from one to an attribute that exists."""
    parts = code.split(" ")[0].split(".")
    for end in range(len(parts), 0, -1):
        if _spec(".".join(parts[:end])) is not None:
            found: Any = importlib.import_module(".".join(parts[:end]))
            for name in parts[end:]:
                found = getattr(found, name, None)
            return found is not None
    return False


def package_fingerprint(package: str) -> str:
    """Hash all code of a package: names and bytes, in order."""
    spec = _spec(package)
    digest = hashlib.sha256()
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in _CODE_SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat the run: versions and machine, no names of people or hosts."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "contract_version": list(CONTRACT_VERSION),
        "packages": {name: _version(name) for name in _PACKAGES},
        "plugins": sorted({entry.distribution for entry in PlatformRegistry.discover().platforms.values()}),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("ZIF_", "OMP_"))},
    }


def _waiver_text(subject: Subject) -> str:
    package = plugin_package(subject.plugin)
    try:
        file = resources.files(package).joinpath(FILE_NAME)
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (ModuleNotFoundError, TypeError):
        return ""


def _class_path(service: object) -> str:
    return f"{type(service).__module__}.{type(service).__qualname__}"


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
