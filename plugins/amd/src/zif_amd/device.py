"""What opening a GPU takes of this vendor: torch checked against the driver, RCCL, tables, HIP's graphs."""

from typing import Any

import torch

from zif.accelerator.gpu.device import GpuParts, check_listed
from zif.contract import DeviceInfo
from zif.errors import PlatformUnavailableError
from zif_amd.collectives import RcclGroups
from zif_amd.tables import read_tuning


def prepare(device: DeviceInfo) -> None:
    """Check that torch drives ROCm, sees the device under its number, and holds code for its architecture."""
    if torch.version.hip is None:
        raise PlatformUnavailableError(f"torch {torch.__version__} is not built for ROCm; install a build that is")
    check_listed(device, "check the access to /dev/kfd and /dev/dri, and what rocminfo says")
    seen = _architecture_of(torch.cuda.get_device_properties(torch.device(device.device_id)))
    if seen != device.architecture:
        raise PlatformUnavailableError(
            f"torch takes {device.device_id!r} for {seen}, and the driver for {device.architecture}: they count "
            "devices differently; name one device with ROCR_VISIBLE_DEVICES"
        )
    built_for = [name.split(":")[0] for name in torch.cuda.get_arch_list()]
    if built_for and seen not in built_for:
        raise PlatformUnavailableError(
            f"torch {torch.__version__} holds no code for {seen}, only for {', '.join(built_for)}; install another"
        )


PARTS = GpuParts(prepare=prepare, read_tuning=read_tuning, make_groups=RcclGroups, graph_class="CUDAGraph")
"""For `open_gpu`. Builds of torch for ROCm offer HIP's graphs as `CUDAGraph`."""


def _architecture_of(properties: Any) -> str:
    """Return the architecture without the features that follow it: `gfx90a:sramecc+:xnack-`."""
    return str(properties.gcnArchName).split(":")[0]
