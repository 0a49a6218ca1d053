"""Opening: a GPU with kernels compiled for it, or the host with the same kernels interpreted."""

import re
from dataclasses import replace
from typing import Any

import torch

from zif.accelerator.device import AcceleratorDevice, Services
from zif.accelerator.faults import device_faults
from zif.accelerator.graphs import BucketedGraphs, TorchCapture
from zif.contract import Device, DeviceInfo, Plan
from zif.errors import PlatformUnavailableError
from zif.host.device import HostDevice
from zif_nvidia.architectures import number
from zif_nvidia.claims import INTERPRETER
from zif_nvidia.collectives import NcclGroups
from zif_nvidia.settings import INTERPRET, ORDER, VISIBLE, count_as_the_driver_does
from zif_nvidia.tables import read_tuning

_CODE = re.compile(r"(?:sm|compute)_(\d+)")


def open_gpu(plan: Plan, rank: int, device: DeviceInfo) -> Device:
    """Open one GPU. Raises `PlatformUnavailableError` when torch or Triton do not see what the driver lists."""
    count_as_the_driver_does()
    _check_triton(interpreted=False)
    with device_faults(device.device_id):
        _check_torch(device)
    # Kernels are known to Triton as soon as they are imported, so not before it is known in which mode.
    from zif.kernels.attention import PagedAttention
    from zif.kernels.launch import DeviceLauncher
    from zif.kernels.ops import KernelOps

    launch = DeviceLauncher(read_tuning(device.architecture))
    services = Services(
        attention=PagedAttention(launch, device.device_id),
        ops=KernelOps(launch),
        make_group=NcclGroups(device.device_id),
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
    """Check in which mode triton was imported: the kind of a function of its own tells, once and for all."""
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
    """Check that torch drives CUDA, sees the same GPU under this number, and holds code for it."""
    if torch.version.cuda is None:
        raise PlatformUnavailableError(f"torch {torch.__version__} is not built for CUDA; install a build that is")
    index = torch.device(device.device_id).index
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise PlatformUnavailableError(
            f"torch {torch.__version__} sees {count} devices, so not {device.device_id!r}, although the driver lists "
            f"it ({device.name}); see whether python -c 'import torch; torch.zeros(1).cuda()' says why"
        )
    properties = torch.cuda.get_device_properties(index)
    _check_identity(device, properties)
    seen = number(device.architecture)
    built_for = torch.cuda.get_arch_list()
    if built_for and not any(_runs(name, seen) for name in built_for):
        raise PlatformUnavailableError(
            f"torch {torch.__version__} holds no code for {device.architecture}, only for {', '.join(built_for)}; "
            "install another build"
        )


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
