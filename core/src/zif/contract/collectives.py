"""Collective communication between the ranks of one group.

Every call has a deadline: a rank that is late or gone raises `CommunicatorError` on all survivors, and the group is
unusable from then on (open a new one). Reductions are sums. Arrays keep shape and dtype unless stated.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from zif.contract.arrays import Array
from zif.errors import ZifError


class CommunicatorError(ZifError):
    """A collective did not complete: a rank is late, gone, or the group was aborted."""


@dataclass(frozen=True, slots=True)
class CommunicatorGroup:
    """Who takes part: this rank of `world_size`, meeting at `rendezvous` (a `tcp://host:port` or `file:///path`)."""

    name: str
    rank: int
    world_size: int
    rendezvous: str
    deadline_s: float = 60.0


class Communicator(ABC):
    """The collectives of one group. All ranks call the same methods in the same order."""

    group: CommunicatorGroup

    @abstractmethod
    def all_reduce(self, array: Array) -> Array:
        """Return the sum over ranks. Does not mutate `array`."""

    @abstractmethod
    def all_gather(self, array: Array) -> Array:
        """Concatenate the ranks' arrays along the first axis, in rank order."""

    @abstractmethod
    def reduce_scatter(self, array: Array) -> Array:
        """Sum over ranks and return this rank's part of the first axis, which world_size divides."""

    @abstractmethod
    def all_to_all(self, array: Array) -> Array:
        """Send part i of the first axis to rank i; return the parts received, in rank order."""

    @abstractmethod
    def broadcast(self, array: Array, source: int) -> Array:
        """Return rank `source`'s array; the others pass one of equal shape and dtype."""

    @abstractmethod
    def send(self, array: Array, target: int) -> None:
        """Send to one rank, which calls `receive`."""

    @abstractmethod
    def receive(self, array: Array, source: int) -> Array:
        """Return what `source` sent; `array` gives shape and dtype."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called it."""

    @abstractmethod
    def abort(self) -> None:
        """Make pending and later calls on this rank raise. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group. Idempotent."""
