"""The AMD plugin's settings, all of them variables of its runtimes: the one place here that reads the environment."""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"

_VERSION = re.compile(r"(\d{1,3})\.(\d{1,2})\.(\d{1,2})")


@dataclass(frozen=True, slots=True)
class VisibleDevices:
    """A variable that hides devices: its name, and the devices that it names, in order; none hides all."""

    variable: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AmdSettings:
    """What the environment asks for.

    `filters` apply one after the other, each to the devices that the ones before left. `target_version` is the
    architecture that the runtime is told to assume, as KFD writes it, None for the device's own. `problem` says which
    variable cannot be understood, and how to write it.
    """

    filters: tuple[VisibleDevices, ...] = ()
    target_version: int | None = None
    problem: str = ""


def read_settings(environ: Mapping[str, str] | None = None) -> AmdSettings:
    """Read the settings; `environ` None is the process's environment.

    `ROCR_VISIBLE_DEVICES` comes first, because the lower runtime applies it; then `HIP_VISIBLE_DEVICES`, or where that
    is not set `CUDA_VISIBLE_DEVICES`, which HIP takes for it. `HSA_OVERRIDE_GFX_VERSION`.
    """
    variables = os.environ if environ is None else environ
    names = ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]
    if "HIP_VISIBLE_DEVICES" not in variables and variables.get("CUDA_VISIBLE_DEVICES"):
        names[1] = "CUDA_VISIBLE_DEVICES"
    override = variables.get(OVERRIDE, "")
    version = _VERSION.fullmatch(override.strip())
    problem = f"{OVERRIDE}={override!r} is no version like 11.0.0; correct it or unset it" if override else ""
    return AmdSettings(
        filters=tuple(_visible(name, variables[name]) for name in names if name in variables),
        target_version=_version_number(version) if version else None,
        problem="" if version else problem,
    )


def let_collectives_fail(environ: MutableMapping[str, str] | None = None) -> None:
    """Let a collective past its deadline raise, instead of ending the process, unless the user says otherwise.

    torch's process group for RCCL reads this when it is made; no option of its own says the same. Mutates the
    environment.
    """
    variables = os.environ if environ is None else environ
    variables.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    variables.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def _visible(variable: str, text: str) -> VisibleDevices:
    return VisibleDevices(variable, tuple(name.strip() for name in text.split(",")) if text.strip() else ())


def _version_number(version: re.Match[str]) -> int:
    major, minor, step = map(int, version.groups())
    return major * 10_000 + minor * 100 + step
