"""One opened virtual device: the services of one worker process."""

import threading

import torch

from zif.contract import Communicator, CommunicatorGroup, Device, Health, Plan
from zif.errors import ZifError
from zif_conformance.reference_platform.attention import TorchAttention
from zif_conformance.reference_platform.collectives import StoreCommunicator
from zif_conformance.reference_platform.faults import FaultInjector, Faults
from zif_conformance.reference_platform.memory import TorchAllocator
from zif_conformance.reference_platform.operators import TorchOperators


class TorchDevice(Device):
    """A share of the host's memory, and torch to compute with."""

    array_device = "cpu"

    def __init__(self, plan: Plan, device_id: str, rank: int, faults: Faults) -> None:
        self.plan = plan
        self._device_id = device_id
        self._faults = FaultInjector(faults, device_id, rank)
        self.allocator = TorchAllocator(plan.memory.available_bytes, self._faults)
        self.attention = TorchAttention(self._faults)
        self.ops = TorchOperators(self._faults)
        self._communicators: list[Communicator] = []
        self._closed = False

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        self._communicators.append(StoreCommunicator(group, self._faults))
        return self._communicators[-1]

    def synchronize(self) -> None:
        """Return at once: every call of torch on the host has run when it returns."""

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, f"device {self._device_id!r} is closed")
        answers: list[Health] = []
        # In a thread, because a kernel that hangs cannot be called off.
        thread = threading.Thread(target=lambda: answers.append(self._check()), daemon=True)
        thread.start()
        thread.join(deadline_s)
        return answers[0] if answers else Health(False, f"no answer within {deadline_s} s")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for communicator in self._communicators:
            communicator.close()
        for tag, _ in self.allocator.stats().by_tag:
            self.allocator.free_tag(tag)

    def _check(self) -> Health:
        """Multiply small integers, which every float dtype does exactly."""
        left = torch.arange(16.0).view(4, 4)
        try:
            product = self.ops.linear(left, torch.eye(4).flip(0), None)
        except (ZifError, RuntimeError) as error:
            return Health(False, f"a matrix product failed: {error}")
        right = torch.equal(product, left.flip(1))
        return Health(right, f"a checked matrix product is {'right' if right else 'wrong'}")
