"""Opening: a GPU with kernels compiled for it, or the host with the same kernels interpreted."""

from dataclasses import replace
from typing import Any

import torch

from zif.accelerator.device import AcceleratorDevice, Services
from zif.accelerator.graphs import BucketedGraphs, TorchCapture
from zif.contract import Device, DeviceInfo, Plan
from zif.errors import PlatformUnavailableError
from zif.host.device import HostDevice
from zif_amd.claims import INTERPRETER
from zif_amd.collectives import RcclGroups
from zif_amd.settings import INTERPRET
from zif_amd.tables import read_tuning


def open_gpu(plan: Plan, rank: int, device: DeviceInfo) -> Device:
    """Open one GPU. Raises `PlatformUnavailableError` when torch or Triton do not see what the driver's files say."""
    _check_triton(interpreted=False)
    _check_torch(device)
    # Kernels are known to Triton as soon as they are imported, so not before it is known in which mode.
    from zif.kernels.attention import PagedAttention
    from zif.kernels.launch import DeviceLauncher
    from zif.kernels.ops import KernelOps

    launch = DeviceLauncher(read_tuning(device.architecture))
    services = Services(
        attention=PagedAttention(launch, device.device_id),
        ops=KernelOps(launch),
        make_group=RcclGroups(device.device_id),
        graphs=BucketedGraphs(TorchCapture(device.device_id, "CUDAGraph")),
    )
    return AcceleratorDevice(replace(plan, device_id=device.device_id), rank, services)


def open_interpreter(plan: Plan, rank: int, num_threads: int) -> Device:
    """Open the host to interpret kernels. Raises `PlatformUnavailableError` where triton would compile them."""
    _check_triton(interpreted=True)
    from zif.kernels.attention import PagedAttention
    from zif.kernels.interpreter import InterpretedLauncher
    from zif.kernels.ops import KernelOps

    launch = InterpretedLauncher()
    attention = PagedAttention(launch, HostDevice.array_device)
    return HostDevice(plan, rank, num_threads, attention=attention, ops=KernelOps(launch))


def _check_triton(*, interpreted: bool) -> None:
    """Check in which mode triton was imported: a function of its own tells, once and for all."""
    import triton.language

    was_interpreted = type(triton.language.cdiv).__name__ == "InterpretedFunction"
    if was_interpreted == interpreted:
        return
    if interpreted:
        raise PlatformUnavailableError(
            f"triton was imported before {INTERPRET}=1 was set, so kernels are compiled in this process; set it before "
            f"the process starts to use the device {INTERPRETER!r}"
        )
    raise PlatformUnavailableError(
        f"triton was imported while {INTERPRET} was set, so kernels are interpreted in this process; unset it before "
        "the process starts to use a GPU"
    )


def _check_torch(device: DeviceInfo) -> None:
    """Check that torch drives ROCm, sees the device under its number, and holds code for its architecture."""
    if torch.version.hip is None:
        raise PlatformUnavailableError(f"torch {torch.__version__} is not built for ROCm; install a build that is")
    index = torch.device(device.device_id).index
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise PlatformUnavailableError(
            f"torch {torch.__version__} sees {count} devices, so not {device.device_id!r}, although the driver lists "
            f"it ({device.name}); check the access to /dev/kfd and /dev/dri, and what rocminfo says"
        )
    seen = _architecture_of(torch.cuda.get_device_properties(index))
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


def _architecture_of(properties: Any) -> str:
    """Return the architecture without the features that follow it: `gfx90a:sramecc+:xnack-`."""
    return str(properties.gcnArchName).split(":")[0]
