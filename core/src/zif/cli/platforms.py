"""`zif platforms`: every installed plugin, with its devices or the reason why there are none."""

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zif.contract import format_bytes

if TYPE_CHECKING:
    from zif.contract import DeviceInfo, Probe


@dataclass(frozen=True, slots=True)
class _Row:
    """One plugin as it is shown. `failure` is why it could not be loaded at all."""

    name: str
    distribution: str
    probe: "Probe | None" = None
    failure: str = ""
    traceback: str = ""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("platforms", help="list installed platforms and their devices", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="print what was tried, and the traceback of failures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    rows = _rows()
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2))
    else:
        print("\n".join(_as_text(row, arguments.verbose) for row in rows))
    return 0


def _rows() -> list[_Row]:
    from zif.plugins import PlatformRegistry

    registry = PlatformRegistry.discover()
    rows = [_Row(name, entry.distribution, probe=entry.probe()) for name, entry in registry.platforms.items()]
    rows += [_Row(f.name, f.distribution, failure=f.reason, traceback=f.trace) for f in registry.failures]
    return sorted(rows, key=lambda row: row.name)


def _as_text(row: _Row, verbose: bool) -> str:
    lines = [f"{row.name}  ({row.distribution})"]
    if row.probe is None:
        lines.append(f"  failed to load: {row.failure}")
        lines += [f"    {line}" for line in row.traceback.splitlines() if verbose]
        return "\n".join(lines)
    lines += [_device_text(device) for device in row.probe.devices]
    if not row.probe.devices:
        lines.append(f"  no device: {row.probe.reason}")
    lines += [f"    tried: {step}" for step in row.probe.steps if verbose]
    return "\n".join(lines)


def _device_text(device: "DeviceInfo") -> str:
    memory = f"{format_bytes(device.memory_bytes)} ({format_bytes(device.available_bytes)} available)"
    runtime = ", ".join(f"{name} {value}" for name, value in device.runtime)
    text = f"  {device.device_id}: {device.name}, {device.architecture}, {memory}"
    return f"{text}, {runtime}" if runtime else text


def _as_json(row: _Row) -> dict[str, Any]:
    entry: dict[str, Any] = {"platform": row.name, "distribution": row.distribution}
    if row.probe is None:
        return entry | {"failure": row.failure, "traceback": row.traceback}
    devices = [_device_as_json(device) for device in row.probe.devices]
    return entry | {"devices": devices, "reason": row.probe.reason, "steps": list(row.probe.steps)}


def _device_as_json(device: "DeviceInfo") -> dict[str, Any]:
    return {
        "device_id": device.device_id,
        "name": device.name,
        "architecture": device.architecture,
        "memory_bytes": device.memory_bytes,
        "available_bytes": device.available_bytes,
        "runtime": dict(device.runtime),
        "dtypes": [numerics.storage for numerics in device.capabilities.dtypes],
        "features": sorted(device.capabilities.features),
    }
