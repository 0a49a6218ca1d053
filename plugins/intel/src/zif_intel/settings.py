"""The Intel plugin's own settings: the one place of this package that touches the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zif.errors import ConfigError
from zif.host import threads

_THREAD_VARIABLES = ("ZIF_INTEL_THREADS", "OMP_NUM_THREADS")
_KINDS = ("", "cpu", "xpu")


@dataclass(frozen=True, slots=True)
class IntelSettings:
    """What the user asks of this platform.

    `kind` is the kind of device to use, "" for the best there is; `num_threads` None for one per usable core;
    `numa_node` the node whose cores compute, None for all; `uses_ipex` whether IPEX may serve where it is installed.
    """

    kind: str = ""
    num_threads: int | None = None
    numa_node: int | None = None
    uses_ipex: bool = True


def read_settings(environ: Mapping[str, str] | None = None) -> IntelSettings:
    """Read the settings; `environ` None is the process's environment.

    `ZIF_INTEL_DEVICE`: cpu or xpu. `ZIF_INTEL_THREADS`, before `OMP_NUM_THREADS`. `ZIF_INTEL_NUMA_NODE`: a number.
    `ZIF_INTEL_IPEX`: on or off. Raises `ConfigError` on a value that cannot be.
    """
    variables = os.environ if environ is None else environ
    node = variables.get("ZIF_INTEL_NUMA_NODE", "")
    if node and not node.isdecimal():
        raise ConfigError(f"environment variable ZIF_INTEL_NUMA_NODE={node!r} must be the number of a NUMA node")
    return IntelSettings(
        kind=_one_of(variables, "ZIF_INTEL_DEVICE", _KINDS),
        num_threads=threads.thread_count(variables, _THREAD_VARIABLES),
        numa_node=int(node) if node else None,
        uses_ipex=_one_of(variables, "ZIF_INTEL_IPEX", ("", "on", "off")) != "off",
    )


def limit_spinning() -> None:
    """Let threads that wait sleep soon (`zif.host.threads.limit_spinning`). Mutates the process's environment."""
    threads.limit_spinning(os.environ)


def _one_of(variables: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    text = variables.get(name, "").lower()
    if text not in allowed:
        raise ConfigError(f"environment variable {name}={text!r} must be one of: {', '.join(filter(None, allowed))}")
    return text
