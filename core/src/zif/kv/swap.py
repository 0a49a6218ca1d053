"""Requests that were preempted and copied out, to go on where they were: swapping, where it is cheaper than computing.

    suspend -> kept -> begin -> resuming -> transfers taken: the copies have served
                 ^                 |
                 +---- release ----+        admission said no: nothing was copied yet

Everything that the next token needs is copied: full blocks, the tail that is not full, the state in use. `manager.py`
is the only caller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zif.contract import KVSpec, Request
from zif.kv.loading import TableCopy
from zif.kv.tiers import TierIndex, TierSetup


@dataclass(frozen=True, slots=True)
class SwappedRequest:
    """What a request had computed when it was copied out."""

    num_tokens: int
    blocks: tuple[TableCopy, ...]


class SwapSpace:
    """The copies of suspended requests."""

    def __init__(self, setup: TierSetup, specs: Sequence[KVSpec], tiers: TierIndex) -> None:
        self._setup = setup
        self._specs = specs
        self._tiers = tiers
        self._kept: dict[int, SwappedRequest] = {}
        self._resuming: set[int] = set()

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._kept

    @property
    def is_open(self) -> bool:
        """Say whether there is host memory at all."""
        return self._setup.host_bytes > 0

    def copy_out(self, request: Request, num_found_tokens: int) -> SwappedRequest | None:
        """Copy a request's blocks if that is cheaper than computing what the device's index will not find again.

        The cost model is that of `TierSetup`. None when it says no, or when there is no room in host memory.
        """
        indices = [*self._needed(request)]
        blocks = [(group, request.block_ids[group][index]) for group, index in indices]
        if not blocks:
            return None
        swap_s = 2 * self._tiers.num_bytes(blocks) / self._setup.host_bytes_per_s
        recompute_s = (request.num_computed_tokens - num_found_tokens) / self._setup.prefill_tokens_per_s
        handles = self._tiers.keep_private(blocks) if swap_s < recompute_s else None
        if handles is None:
            return None
        pairs = zip(indices, handles, strict=True)
        return SwappedRequest(
            request.num_computed_tokens, tuple(TableCopy(group, index, handle) for (group, index), handle in pairs)
        )

    def keep(self, request: Request, swapped: SwappedRequest) -> None:
        """Keep the copies of a request that has given its blocks back."""
        self._kept[request.request_id] = swapped

    def resume(self, request: Request) -> SwappedRequest | None:
        """Return the copies of a request that begins again, if there are any."""
        swapped = self._kept.get(request.request_id)
        if swapped is not None:
            self._resuming.add(request.request_id)
        return swapped

    def release(self, request: Request) -> None:
        """Hear that a request gives its blocks back: it did not begin after all, or has ended."""
        if request.request_id in self._resuming:
            self._resuming.remove(request.request_id)
        elif swapped := self._kept.pop(request.request_id, None):
            self._tiers.discard(block.handle for block in swapped.blocks)

    def settle(self) -> None:
        """Forget the copies of requests that have begun again, as soon as they are loaded."""
        for request_id in self._resuming:
            self._tiers.discard(block.handle for block in self._kept.pop(request_id).blocks)
        self._resuming.clear()

    def handles(self) -> set[int]:
        """Return the handles of all copies, for integrity checks."""
        return {block.handle for swapped in self._kept.values() for block in swapped.blocks}

    def check_integrity(self, live: Sequence[Request]) -> None:
        """Assert that nobody's copies are kept for nothing."""
        assert set(self._kept) <= {request.request_id for request in live}, "copies are kept of a request that is gone"
        assert self._resuming <= set(self._kept), "a request resumes without copies"

    def _needed(self, request: Request) -> Iterator[tuple[int, int]]:
        """Yield group and index of each block that a token after the computed ones needs."""
        computed = request.num_computed_tokens
        for group, (spec, table) in enumerate(zip(self._specs, request.block_ids, strict=True)):
            num_blocks = spec.num_blocks(spec.held_tokens(computed, request.num_encoder_tokens))
            for index in range(spec.first_needed_block(computed), min(num_blocks, len(table))):
                if table[index]:
                    yield group, index
