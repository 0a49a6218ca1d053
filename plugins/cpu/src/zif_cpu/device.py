"""The opened CPU: the services of one worker process."""

import threading

import torch

from zif.contract import Communicator, CommunicatorGroup, Device, Health, Plan
from zif.reference.ops import ReferenceOps
from zif_cpu.attention import CpuAttention
from zif_cpu.collectives import GlooCommunicator
from zif_cpu.memory import CpuAllocator
from zif_cpu.settings import CpuSettings, read_settings


class CpuDevice(Device):
    """One process's share of the host. Computation is synchronous.

    Sets torch's thread count, which is the process's, and puts it back at `close`.
    """

    array_device = "cpu"

    def __init__(self, plan: Plan, rank: int, num_cores: int, settings: CpuSettings | None = None) -> None:
        self.plan = plan
        self.rank = rank
        self.allocator = CpuAllocator(plan.memory.available_bytes)
        self.attention = CpuAttention()
        self.ops = ReferenceOps()
        self._communicators: list[Communicator] = []
        self._closed = False
        chosen = (settings or read_settings()).num_threads or num_cores
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(chosen)

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        communicator = GlooCommunicator(group)
        self._communicators.append(communicator)
        return communicator

    def synchronize(self) -> None:
        """Return at once: every call of torch on a CPU has run when it returns."""

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, "the device is closed")
        answer: list[Health] = []
        thread = threading.Thread(target=lambda: answer.append(_check_arithmetic()), daemon=True)
        thread.start()
        thread.join(deadline_s)
        return answer[0] if answer else Health(False, f"no answer within {deadline_s} s")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for communicator in self._communicators:
            communicator.close()
        for tag, _ in self.allocator.stats().by_tag:
            self.allocator.free_tag(tag)
        torch.set_num_threads(self._previous_threads)


def _check_arithmetic() -> Health:
    """Multiply small integers, which float32 does exactly, and compare with integer arithmetic."""
    try:
        return _multiply()
    except (RuntimeError, MemoryError) as error:
        return Health(False, f"a matrix product failed: {error!r}")


def _multiply() -> Health:
    left = torch.arange(64, dtype=torch.int64).view(8, 8)
    right = left.flip(0)
    expected = (left[:, :, None] * right[None, :, :]).sum(1)
    product = (left.float() @ right.float()).long()
    if torch.equal(product, expected):
        return Health(True, "a checked matrix product is right")
    return Health(False, f"a checked matrix product is wrong: {product.tolist()!r}, not {expected.tolist()!r}")
