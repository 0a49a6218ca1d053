"""Opening: a GPU with kernels compiled for it, or the host with the same kernels interpreted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from zif.accelerator.device import AcceleratorDevice, Services
from zif.accelerator.faults import device_faults
from zif.accelerator.gpu.claims import INTERPRETER
from zif.accelerator.gpu.settings import INTERPRET
from zif.accelerator.graphs import BucketedGraphs, TorchCapture
from zif.contract import Device, DeviceInfo, Plan
from zif.errors import PlatformUnavailableError
from zif.host.device import HostDevice
from zif.host.gloo import MakeGroup
from zif.kernels.tuning import Tuning


@dataclass(frozen=True, slots=True)
class GpuParts:
    """What a vendor brings to opening a GPU.

    `prepare` comes first: it raises `PlatformUnavailableError` when torch does not see what the driver lists.
    `read_tuning` takes an architecture, `make_groups` torch's name of the device; `graph_class` is the name of the
    class of graphs in torch's module for it.
    """

    prepare: Callable[[DeviceInfo], None]
    read_tuning: Callable[[str], Tuning]
    make_groups: Callable[[str], MakeGroup]
    graph_class: str


def open_gpu(plan: Plan, rank: int, device: DeviceInfo, parts: GpuParts) -> Device:
    """Open one GPU. Raises `PlatformUnavailableError` when torch or Triton do not see what the driver lists."""
    _check_triton(interpreted=False)
    with device_faults(device.device_id):
        parts.prepare(device)
    # Kernels are known to Triton as soon as they are imported, so not before it is known in which mode.
    from zif.kernels.attention import PagedAttention
    from zif.kernels.launch import DeviceLauncher
    from zif.kernels.ops import KernelOps

    launch = DeviceLauncher(parts.read_tuning(device.architecture))
    services = Services(
        attention=PagedAttention(launch, device.device_id),
        ops=KernelOps(launch),
        make_group=parts.make_groups(device.device_id),
        graphs=BucketedGraphs(TorchCapture(device.device_id, parts.graph_class)),
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


def check_listed(device: DeviceInfo, advice: str) -> None:
    """Check that torch counts as far as the device; `advice` says where to look when it does not."""
    module = torch.get_device_module(device.device_id)
    count = module.device_count() if module.is_available() else 0
    if torch.device(device.device_id).index >= count:
        raise PlatformUnavailableError(
            f"torch {torch.__version__} sees {count} devices, so not {device.device_id!r}, although the driver lists "
            f"it ({device.name}); {advice}"
        )


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
