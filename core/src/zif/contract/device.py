"""An opened device: the services of one worker process."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from zif.contract.attention import AttentionBackend
from zif.contract.collectives import Communicator, CommunicatorGroup
from zif.contract.graphs import EagerGraphs, GraphRunner
from zif.contract.memory import Allocator
from zif.contract.ops import OpTable
from zif.contract.plan import Plan


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the device answered in time, and what it said."""

    healthy: bool
    detail: str


class Device(ABC):
    """What `Platform.open` returns. Attributes are ready to use and do not change.

    `array_device` is the name under which the array library knows the device. A platform that brings its own model
    runner may leave the services that its runner does not use to core's defaults. `compiles_on_first_use`: kernels are
    compiled when a step first needs them, so core's runner computes steps of every kind before requests come.
    """

    plan: Plan
    array_device: str
    allocator: Allocator[Any]
    attention: AttentionBackend[Any, Any]
    ops: OpTable
    graphs: GraphRunner = EagerGraphs()
    compiles_on_first_use: bool = False

    @abstractmethod
    def communicator(self, group: CommunicatorGroup) -> Communicator:
        """Join a group of ranks. Raises `CommunicatorError` when the others do not come within the deadline."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything submitted has run."""

    def watch(self) -> AbstractContextManager[None]:
        """Return a context in which core computes on the device and reads what was computed.

        An error inside that means that the device is lost leaves it as `DeviceLostError`. By default all errors pass.
        """
        return nullcontext()

    @abstractmethod
    def health(self, deadline_s: float) -> Health:
        """Say within `deadline_s` whether the device still computes correctly. Never raises."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Idempotent; the device is unusable afterwards."""
