"""What opening a GPU takes of this vendor: torch checked against the driver, NCCL, tables, CUDA's graphs."""

import re
from typing import Any

import torch

from zif.accelerator.gpu.device import GpuParts, check_listed
from zif.contract import DeviceInfo
from zif.errors import PlatformUnavailableError
from zif_nvidia.architectures import number
from zif_nvidia.collectives import NcclGroups
from zif_nvidia.settings import ORDER, VISIBLE, count_as_the_driver_does
from zif_nvidia.tables import read_tuning

_CODE = re.compile(r"(?:sm|compute)_(\d+)")


def prepare(device: DeviceInfo) -> None:
    """Check that torch drives CUDA, sees the same GPU under this number, and holds code for it.

    Lets CUDA count as the driver does first, because torch asks it here.
    """
    count_as_the_driver_does()
    if torch.version.cuda is None:
        raise PlatformUnavailableError(f"torch {torch.__version__} is not built for CUDA; install a build that is")
    check_listed(device, "see whether python -c 'import torch; torch.zeros(1).cuda()' says why")
    _check_identity(device, torch.cuda.get_device_properties(torch.device(device.device_id)))
    seen = number(device.architecture)
    built_for = torch.cuda.get_arch_list()
    if built_for and not any(_runs(name, seen) for name in built_for):
        raise PlatformUnavailableError(
            f"torch {torch.__version__} holds no code for {device.architecture}, only for {', '.join(built_for)}; "
            "install another build"
        )


PARTS = GpuParts(prepare=prepare, read_tuning=read_tuning, make_groups=NcclGroups, graph_class="CUDAGraph")
"""For `open_gpu`."""


def _check_identity(device: DeviceInfo, properties: Any) -> None:
    """Check that torch's device is the one that was planned for: CUDA and the driver may count in different orders."""
    planned, seen = dict(device.runtime).get("UUID", ""), str(getattr(properties, "uuid", ""))
    same_architecture = number(device.architecture) == properties.major * 10 + properties.minor
    # An instance of a divided GPU has an id of its own, which torch does not tell in all versions.
    same_part = not planned.startswith("GPU-") or not seen or planned.removeprefix("GPU-") == seen.removeprefix("GPU-")
    if not same_architecture or not same_part:
        raise PlatformUnavailableError(
            f"torch takes {device.device_id!r} for {properties.name} ({seen}), and the driver for {device.name} "
            f"({planned}): they count GPUs in different orders; set {ORDER}=PCI_BUS_ID, or name one GPU by its UUID in "
            f"{VISIBLE}, before the process starts"
        )


def _runs(name: str, architecture: int) -> bool:
    """Say whether code for `name` runs on an architecture: machine code within its major version, PTX on all later."""
    found = _CODE.match(name)
    if found is None:
        return False
    built = int(found[1])
    return built <= architecture and (name.startswith("compute") or built // 10 == architecture // 10)
