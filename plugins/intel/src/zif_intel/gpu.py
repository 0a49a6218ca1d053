"""The opened GPU: the services of one worker process. Only here is `torch.xpu` touched."""

import torch

from zif.contract import Allocator, Buffer, Communicator, CommunicatorGroup, Device, Health, Plan
from zif.errors import OutOfMemoryError, PlatformUnavailableError
from zif.host.health import check_health
from zif.reference.ops import ReferenceOps
from zif_intel.collectives import xccl_communicator
from zif_intel.gathered import GatheredAttention


class GpuAllocator(Allocator[torch.Tensor]):
    """Lend torch's memory of one device."""

    def __init__(self, limit_bytes: int, array_device: str) -> None:
        super().__init__(limit_bytes)
        self._array_device = array_device

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        try:
            memory = torch.zeros(num_bytes + alignment - 1, dtype=torch.uint8, device=self._array_device)
        except RuntimeError as error:
            raise OutOfMemoryError(f"the device cannot hold {num_bytes} bytes more: {error}; free memory") from error
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Do nothing: the ledger has dropped its reference, and torch takes the memory back with the last one."""


class GpuDevice(Device):
    """One GPU, in one process."""

    def __init__(self, plan: Plan, rank: int) -> None:
        if not torch.xpu.is_available():
            raise PlatformUnavailableError(
                f"torch {torch.__version__} finds no usable GPU although a driver is bound to one; check its runtime"
            )
        self.plan = plan
        self.rank = rank
        self.array_device = plan.device_id
        torch.xpu.set_device(plan.device_id)
        self.allocator = GpuAllocator(plan.memory.available_bytes, self.array_device)
        self.attention = GatheredAttention(self.array_device)
        self.ops = ReferenceOps()
        self._communicators: list[Communicator] = []
        self._closed = False

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        communicator = xccl_communicator(group)
        self._communicators.append(communicator)
        return communicator

    def synchronize(self) -> None:
        torch.xpu.synchronize(self.array_device)

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, "the device is closed")
        return check_health(self.array_device, deadline_s)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for communicator in self._communicators:
            communicator.close()
        for tag, _ in self.allocator.stats().by_tag:
            self.allocator.free_tag(tag)
        torch.xpu.empty_cache()
