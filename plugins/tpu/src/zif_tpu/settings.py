"""The TPU plugin's own settings: the one place of this package that touches the environment."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from zif.errors import ConfigError
from zif.host import threads


@dataclass(frozen=True, slots=True)
class TpuSettings:
    """`pjrt_device` is what XLA is told to drive, "" when the user does not say; `num_devices` how many of it.

    `compile_deadline_s` bounds the compilation of one shape. Compiled programs are kept in `cache_folder`, None: not.
    """

    pjrt_device: str = ""
    num_devices: int = 1
    compile_deadline_s: float = 600.0
    cache_folder: Path | None = None


def read_settings(environ: Mapping[str, str] | None = None) -> TpuSettings:
    """Read the settings; `environ` None is the process's environment.

    `PJRT_DEVICE` and `CPU_NUM_DEVICES` are XLA's own; `ZIF_TPU_COMPILE_DEADLINE_S` and `ZIF_TPU_CACHE` are ours, the
    latter a folder, or "off". Raises `ConfigError` on a value that cannot be.
    """
    variables = os.environ if environ is None else environ
    folder = variables.get("ZIF_TPU_CACHE") or _cache_folder(variables)
    return TpuSettings(
        pjrt_device=variables.get("PJRT_DEVICE", "").upper(),
        num_devices=int(_number(variables, "CPU_NUM_DEVICES", "1", smallest=1)),
        compile_deadline_s=_number(variables, "ZIF_TPU_COMPILE_DEADLINE_S", "600", smallest=0),
        cache_folder=None if folder == "off" else Path(folder),
    )


def set_up_process(pjrt_device: str, environ: MutableMapping[str, str] | None = None) -> None:
    """Tell XLA which device to drive, before it is loaded. Mutates the process's environment."""
    variables = os.environ if environ is None else environ
    variables["PJRT_DEVICE"] = pjrt_device  # which XLA knows in capitals only
    if "xla_allow_excess_precision" not in variables.get("XLA_FLAGS", ""):
        # A sum that the model keeps in bfloat16 is rounded to it also where the next operation follows at once.
        variables["XLA_FLAGS"] = f"{variables.get('XLA_FLAGS', '')} --xla_allow_excess_precision=false".strip()
    threads.limit_spinning(variables)


def _cache_folder(variables: Mapping[str, str]) -> str:
    home = variables.get("HOME")
    base = variables.get("XDG_CACHE_HOME") or (str(Path(home) / ".cache") if home else "")
    return str(Path(base) / "zif" / "xla") if base else "off"


def _number(variables: Mapping[str, str], name: str, default: str, smallest: int) -> float:
    text = variables.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not smallest <= value < float("inf"):
        raise ConfigError(f"environment variable {name}={text!r} must be a number from {smallest} on")
    return value
