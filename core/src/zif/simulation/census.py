"""Who holds which block, counted from the requests' tables alone, and what follows from it.

Hands are counted anew only for requests whose tables have changed, so that a census after every step costs little; the
block manager's own structures are rebuilt from scratch by its `check_integrity`, which costs more and is asked for less
often. `simulation.py` is the only caller.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from zif.contract import BlockManager, Draft, KVSpec, KVUsage, Request, RequestStatus, StepPlan
from zif.simulation.words import Visibility, visibility

_MAX_STATE_BLOCKS = 2

Tables = tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is asked of a layer group here at every step."""

    size: int
    is_state: bool
    is_encoded: bool
    visible_from: Visibility


class Census:
    """The hands on every block of one simulation, as of the last `count`. Every check asserts."""

    def __init__(self, specs: Sequence[KVSpec]) -> None:
        self._kinds = [
            _Kind(spec.block_size, spec.keeps_checkpoints, spec.counts_encoder_tokens, visibility(spec))
            for spec in specs
        ]
        self._hands: list[dict[int, int]] = [{} for _ in specs]
        self._tables: dict[int, Tables] = {}
        self._nothing: Tables = tuple([] for _ in specs)
        self._under_way: dict[int, list[dict[int, int]]] = {}

    def count(self, holders: Collection[Request]) -> None:
        """Count the hands of all requests that may hold blocks; one may be named twice."""
        known, holding = self._tables, {request.request_id for request in holders if request.block_ids}
        for request in holders:
            if known.get(request.request_id, ()) != request.block_ids:
                self._recount(request.request_id, request.block_ids)
        if len(known) > len(holding):
            for number in known.keys() - holding:
                self._recount(number, ())

    def check_writes(self, plan: StepPlan, live: dict[int, Request]) -> None:
        """Check that every block that the step writes is in one hand, and that no step under way fills it for another.

        The step is then under way itself, until it is `applied`.
        """
        writers: list[dict[int, int]] = [{} for _ in self._kinds]
        for request_id, start, num_tokens in zip(plan.request_ids, plan.num_computed, plan.num_tokens, strict=True):
            last_token = start + num_tokens - 1
            tables = live[request_id].block_ids
            for hands, kind, table, owner in zip(self._hands, self._kinds, tables, writers, strict=True):
                last = last_token // kind.size
                first = last if kind.is_state else start // kind.size
                written = table[first : last + 1]
                if kind.is_encoded:
                    written = [] if start else table
                for block in written:
                    assert block, "a step writes into the null block"
                    assert hands[block] == 1, "a step writes into a block that another request holds"
                    owner[block] = request_id
        for earlier in self._under_way.values():
            for old, new in zip(earlier, writers, strict=True):
                for block in old.keys() & new.keys():
                    assert old[block] == new[block], "a step writes into a block that a step under way writes to"
        self._under_way[plan.step] = writers

    def applied(self, step: int) -> None:
        """Hear that a step is over."""
        self._under_way.pop(step, None)

    def restart(self) -> None:
        """Hear that no step is under way any more."""
        self._under_way.clear()

    def check_owned(self, usage: Iterable[KVUsage], drafts: Collection[Draft]) -> None:
        """Check that the block manager counts as owned what requests, and drafts under way, hold."""
        for index, (group, hands) in enumerate(zip(usage, self._hands, strict=True)):
            num_held = len(hands)
            if drafts:
                num_held += len({draft.state_blocks[index] for draft in drafts} - hands.keys() - {0})
            assert group.num_owned == num_held, f"group {index}: {group.num_owned} owned, {num_held} in tables"

    def check_needs(self, requests: Iterable[Request], num_in_flight: int) -> None:
        """Check, after a step, that running requests hold what they need and waste less than a block at either end."""
        for request in requests:
            if request.status is not RequestStatus.RUNNING:
                continue
            computed, planned = request.num_computed_tokens, request.num_planned_tokens
            for kind, table in zip(self._kinds, request.block_ids, strict=True):
                size, visible_from = kind.size, kind.visible_from
                if kind.is_encoded:
                    assert len(table) == -(-request.num_encoder_tokens // size), "the encoder's output has no place"
                    assert 0 not in table, "a block of the encoder's output was given back"
                    continue
                num_slots = len(table) * size
                assert num_slots - planned < size, "slots are allocated beyond the block in use"
                if kind.is_state:
                    # A state is written for guesses too, but outside of the table until they are accepted.
                    assert num_slots >= computed, "a token has no slot"
                    num_states = len(table) - table.count(0)
                    assert num_states <= _MAX_STATE_BLOCKS + num_in_flight, "more than two states are held"
                    assert computed == 0 or table[(computed - 1) // size], "the state in use was given back"
                    continue
                assert num_slots >= planned, "a token has no slot"
                first = visible_from(computed) // size if visible_from else 0
                assert not first or not table[first - 1], "a block that nobody sees is held"
                assert 0 not in (table[first:] if first else table), "a block that is still seen was given back"

    def check_nothing_held(self, blocks: BlockManager) -> None:
        """Check that without requests nothing is owned, and without prefixes nothing is held at all."""
        assert not any(group.num_owned for group in blocks.usage()), "blocks are owned and no request is live"
        blocks.reset_prefix_cache()
        blocks.check_integrity([])
        assert not any(group.num_free + group.num_cached for group in blocks.usage()), "a slab is held for nothing"

    def _recount(self, number: int, tables: Tables) -> None:
        """Take the hands of a request off the blocks that it held, and put them on those that it holds."""
        before = self._tables.pop(number, self._nothing)
        for hands, old, new in zip(self._hands, before, tables or self._nothing, strict=True):
            added = new
            if old and new[: len(old)] == old:
                added = new[len(old) :]
            else:
                for block in filter(None, old):
                    hands[block] -= 1
                    if not hands[block]:
                        del hands[block]
            for block in filter(None, added):
                hands[block] = hands.get(block, 0) + 1
        if tables:
            self._tables[number] = tuple([table.copy() for table in tables])
