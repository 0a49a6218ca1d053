"""The NVIDIA plugin's settings, all variables of its runtimes: the one place here that touches the environment."""

import os
from collections.abc import Mapping, MutableMapping

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"


def visible_devices(environ: Mapping[str, str] | None = None) -> str | None:
    """Return CUDA's list of devices as written, None where it is not set; `environ` None is the process's environment.

    (CUDA C++ programming guide, environment variables.)
    """
    return (os.environ if environ is None else environ).get(VISIBLE)


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
