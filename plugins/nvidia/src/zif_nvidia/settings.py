"""The NVIDIA plugin's settings, all variables of its runtimes: the one place here that touches the environment."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from zif.host import threads

INTERPRET = "TRITON_INTERPRET"
VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"

_YES = ("1", "true", "on", "yes", "y")


@dataclass(frozen=True, slots=True)
class NvidiaSettings:
    """What the environment asks for.

    `visible` is the list of devices as written, None where the variable is not set; `interpreted` whether Triton's
    kernels are interpreted; `order` how CUDA is told to count devices, "" for its own way.
    """

    visible: str | None = None
    interpreted: bool = False
    order: str = ""


def read_settings(environ: Mapping[str, str] | None = None) -> NvidiaSettings:
    """Read the settings; `environ` None is the process's environment.

    `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` are CUDA's (CUDA C++ programming guide, environment variables),
    `TRITON_INTERPRET` is Triton's.
    """
    variables = os.environ if environ is None else environ
    return NvidiaSettings(
        visible=variables.get(VISIBLE),
        interpreted=variables.get(INTERPRET, "").lower() in _YES,
        order=variables.get(ORDER, ""),
    )


def num_threads(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the threads that `OMP_NUM_THREADS` grants the interpreter, None where it is not set.

    Raises `ConfigError` when it is no count.
    """
    return threads.thread_count(os.environ if environ is None else environ, ("OMP_NUM_THREADS",))


def count_as_the_driver_does(environ: MutableMapping[str, str] | None = None) -> None:
    """Let CUDA count devices by their place on the bus, as NVML does, unless the user says otherwise.

    CUDA reads this when it is first used in the process. Mutates the environment.
    """
    (os.environ if environ is None else environ).setdefault(ORDER, "PCI_BUS_ID")


def let_collectives_fail(environ: MutableMapping[str, str] | None = None) -> None:
    """Let a collective past its deadline raise, instead of ending the process, unless the user says otherwise.

    torch's process group reads this when it is made; no option of its own says the same. Mutates the environment.
    """
    variables = os.environ if environ is None else environ
    variables.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    variables.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
