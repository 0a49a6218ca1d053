"""The opened device. A real one would bring its own attention and operators here."""

import torch

from zif.contract import Allocator, Buffer, Communicator, CommunicatorError, CommunicatorGroup, Device, Health, Plan
from zif.reference.attention import ReferenceAttention
from zif.reference.ops import ReferenceOps


class AcmeAllocator(Allocator[torch.Tensor]):
    """Lend memory of the device; the ledger is the contract's."""

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        memory = torch.zeros(num_bytes + alignment, dtype=torch.uint8)
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Leave it to torch, which frees memory that nothing refers to."""


class AcmeDevice(Device):
    """The services that core's torch runner asks for."""

    array_device = "cpu"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.allocator = AcmeAllocator(plan.memory.available_bytes)
        self.attention = ReferenceAttention()
        self.ops = ReferenceOps()

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        raise CommunicatorError("this device claims no collectives; run on one device")

    def synchronize(self) -> None:
        """Everything has run when the call returns."""

    def health(self, deadline_s: float) -> Health:
        return Health(healthy=True, detail="imaginary devices do not break")

    def close(self) -> None:
        """Nothing is held besides tensors."""
