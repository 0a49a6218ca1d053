"""Slots for guessed tokens, and what becomes of them when the guesses are settled.

Groups with a slot per token need nothing special: refused tokens leave garbage behind the computed ones, which the next
row overwrites, and blocks that only they reached go back. A state cannot be wound back; so a state group gets a spare
block for the state after the guesses, which takes the place of the one before if all of them were right.

    state table  [ 0, 7 ]    spare 9       all right: [ 0, 9 ], 7 goes back      else: [ 0, 7 ], 9 goes back

`manager.py` is the only caller.
"""

from collections.abc import Iterator, Sequence

from zif.contract import KVSpec, Request
from zif.kv.pool import BlockPool


class DraftSlots:
    """The spare blocks of requests whose guesses are not settled yet."""

    def __init__(self, specs: Sequence[KVSpec], pools: Sequence[BlockPool]) -> None:
        self._specs = specs
        self._pools = pools
        self._spares: dict[int, tuple[int, ...]] = {}

    def take(self, request: Request) -> tuple[int, ...] | None:
        """Take a spare block in each state group; 0 stands for the other groups. None when there are not enough."""
        spares: list[int] = []
        for spec, pool in zip(self._specs, self._pools, strict=True):
            taken = pool.allocate(1) if spec.keeps_checkpoints else [0]
            if taken is None:
                self._give_back(spares)
                return None
            spares += taken
        self._spares[request.request_id] = tuple(spares)
        return tuple(spares)

    def settle(self, request: Request, *, all_accepted: bool) -> None:
        """Return the blocks beyond the computed tokens; let spares take the place of states, or return them too."""
        spares = self._spares.pop(request.request_id)
        for spec, pool, table, spare in zip(self._specs, self._pools, request.block_ids, spares, strict=True):
            if spare and all_accepted:
                self._replace(pool, table, (request.num_computed_tokens - 1) // spec.block_size, spare)
            elif spare:
                pool.release(spare)
        self.trim(request)

    def trim(self, request: Request) -> None:
        """Return the blocks beyond the tokens that are computed or that steps under way compute."""
        num_tokens = max(request.num_computed_tokens, request.num_planned_tokens)
        for spec, pool, table in zip(self._specs, self._pools, request.block_ids, strict=True):
            end = spec.num_blocks(spec.held_tokens(num_tokens, request.num_encoder_tokens))
            for block in filter(None, reversed(table[end:])):
                pool.release(block)
            del table[end:]

    def drop(self, request: Request) -> None:
        """Return the spares of a request that ends before its guesses are settled."""
        self._give_back(self._spares.pop(request.request_id, ()))

    def hands(self, group: int) -> Iterator[int]:
        """Yield the spares in use of one group."""
        for spares in self._spares.values():
            if spares[group]:
                yield spares[group]

    def _replace(self, pool: BlockPool, table: list[int], index: int, spare: int) -> None:
        table.extend([0] * (index + 1 - len(table)))
        if table[index]:
            pool.release(table[index])
        table[index] = spare

    def _give_back(self, spares: Sequence[int]) -> None:
        for pool, spare in zip(self._pools, spares, strict=False):
            if spare:
                pool.release(spare)
