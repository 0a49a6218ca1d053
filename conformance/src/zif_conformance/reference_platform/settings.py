"""The settings of this platform: the one place of the package that reads the environment.

    ZIF_REFERENCE_DEVICES       number of virtual devices, 4 by default
    ZIF_REFERENCE_MEMORY_BYTES  memory of each device, 24 GiB by default
    ZIF_REFERENCE_FAULTS        faults to inject, as `zif_conformance.reference_platform.faults` reads them

Called by the platform when it probes and opens.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from zif.errors import ConfigError
from zif_conformance.reference_platform.faults import Faults, parse_faults

_PREFIX = "ZIF_REFERENCE_"


@dataclass(frozen=True, slots=True)
class Settings:
    """`memory_bytes` is the memory of each of `num_devices` devices; `faults` are injected into every opened device."""

    num_devices: int = 4
    memory_bytes: int = 24 << 30
    faults: Faults = field(default_factory=Faults)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; `environ` None is the process's environment. Raises `ConfigError` on a wrong value."""
    variables = os.environ if environ is None else environ
    defaults = Settings()
    return Settings(
        num_devices=_number(variables, "DEVICES", defaults.num_devices),
        memory_bytes=_number(variables, "MEMORY_BYTES", defaults.memory_bytes),
        faults=parse_faults(_PREFIX + "FAULTS", variables.get(_PREFIX + "FAULTS", "")),
    )


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(_PREFIX + name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment variable {_PREFIX}{name}={text!r} must be a whole number of at least 1")
    return int(text)
