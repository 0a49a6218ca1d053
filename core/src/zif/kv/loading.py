"""Blocks of requests that are filled from copies: nothing is known to be right until the step that fills them is over.

    fill -> transfers taken -> confirm        the step's result is there, the blocks may be indexed
      |           +-> a copy is lost          the request starts over
      +-> withdraw                            the request did not begin after all

`manager.py` is the only caller.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from zif.contract import Request
from zif.kv.pool import BlockPool
from zif.kv.tiers import TierIndex


@dataclass(frozen=True, slots=True)
class TableCopy:
    """A copy of one block of a request's table."""

    group: int
    index: int
    handle: int


@dataclass(slots=True, eq=False)
class _Filling:
    """Which copies a request was filled from, and the (group, block) pairs whose loads have not been taken yet."""

    request: Request
    handles: frozenset[int]
    pending: list[tuple[int, int]]


class LoadLedger:
    """The requests that hold blocks whose content is still to come."""

    def __init__(self, pools: Sequence[BlockPool], tiers: TierIndex) -> None:
        self._pools = pools
        self._tiers = tiers
        self._fillings: dict[int, _Filling] = {}

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._fillings

    def fill(self, request: Request, copies: Sequence[TableCopy]) -> bool:
        """Put new blocks into a request's table, to be filled from pinned copies. False, and no pins, without room."""
        counts = [0] * len(self._pools)
        for copy in copies:
            counts[copy.group] += 1
        blocks = self._allocate(counts)
        if blocks is None:
            for copy in copies:
                self._tiers.unpin(copy.handle)
            return False
        filling = _Filling(request, frozenset(copy.handle for copy in copies), [])
        for copy in copies:
            block = blocks[copy.group].pop()
            request.block_ids[copy.group][copy.index] = block
            self._tiers.load(copy.handle, block)
            filling.pending.append((copy.group, block))
        self._fillings[request.request_id] = filling
        return True

    def withdraw(self, request: Request) -> None:
        """Forget a request; what was not taken is not loaded."""
        filling = self._fillings.pop(request.request_id, None)
        for group, block in filling.pending if filling else ():
            self._tiers.withdraw_load(group, block)

    def taken(self) -> None:
        """Hear that the next plan carries the loads."""
        for filling in self._fillings.values():
            filling.pending.clear()

    def confirm(self, request: Request) -> None:
        """Hear that the step that filled a request's blocks has a result, in which they were not lost."""
        self._fillings.pop(request.request_id, None)

    def holders(self, handles: Collection[int]) -> list[Request]:
        """Return the requests that hold blocks filled from one of these copies."""
        return [filling.request for filling in self._fillings.values() if not filling.handles.isdisjoint(handles)]

    def _allocate(self, counts: Sequence[int]) -> list[list[int]] | None:
        """Take `counts[g]` blocks of each group g, or none."""
        allocated: list[list[int]] = []
        for pool, count in zip(self._pools, counts, strict=True):
            blocks = pool.allocate(count)
            if blocks is None:
                for earlier, taken in zip(self._pools, allocated, strict=False):
                    for block in taken:
                        earlier.release(block)
                return None
            allocated.append(blocks)
        return allocated
