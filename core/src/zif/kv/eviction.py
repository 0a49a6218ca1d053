"""The order in which cached blocks are evicted, and who has used up a quota.

Blocks that are kept alike stand in one *line*, least recently used first; nearly always there is only one line. The
first block to go is of the lowest priority, and among the lines of this priority the least recently used one:

    priority 20    line (tenant a)   line (tenant b)
    priority 50    line (default)    line (expired)
    priority 90    line (until 12.5 s)

A line whose time is over falls to the default priority with its blocks; it ends with its last findable block.
"""

import heapq
from array import array
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from zif.contract.request import DEFAULT_RETENTION_PRIORITY
from zif.kv.lists import BlockLists
from zif.kv.retention import DEFAULT_KEEP, Keep

_MIN_TO_CLEAR = 16


@dataclass(slots=True, eq=False)
class _Tenant:
    """A tenant with a quota, in blocks."""

    max_cached: int
    num_cached: int = 0
    lines: "set[_Line]" = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Line:
    """Blocks that are kept alike: `num_blocks` findable ones, of which the cached ones stand in the list `anchor`.

    `keep` falls to the default at its end. `queued` says whether the line stands on the agenda of its priority. It
    is live until its last block leaves.
    """

    number: int
    anchor: int
    keep: Keep
    tenant: _Tenant | None
    num_blocks: int = 0
    queued: bool = False
    is_live: bool = True


class _Agenda:
    """Lines by a number, the smallest first. Those that ended are cleared away before they are the greater part."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, _Line]] = []
        self._num_added = 0
        self._serial = 0

    def add(self, due: float, line: _Line) -> None:
        """Put a line on the agenda."""
        if self._num_added > max(_MIN_TO_CLEAR, len(self._entries) // 2):
            self._entries = [entry for entry in self._entries if entry[2].is_live]
            heapq.heapify(self._entries)
            self._num_added = 0
        self._num_added += 1
        self._serial += 1
        heapq.heappush(self._entries, (due, self._serial, line))

    @property
    def first(self) -> tuple[float, _Line] | None:
        """The smallest entry."""
        return (self._entries[0][0], self._entries[0][2]) if self._entries else None

    def drop_first(self) -> None:
        """Take the smallest entry off."""
        heapq.heappop(self._entries)

    def put_first_off(self, due: float) -> None:
        """Give the smallest entry a new, larger number."""
        _, serial, line = self._entries[0]
        heapq.heapreplace(self._entries, (due, serial, line))


class EvictionOrder:
    """Keep the cached blocks of one pool in order. `quotas` are blocks that a tenant may have cached."""

    def __init__(
        self, lists: BlockLists, num_cells: int, clock: Callable[[], float], quotas: Mapping[str, int]
    ) -> None:
        self._lists = lists
        self._next, self._previous = lists.next, lists.previous
        self._clock = clock
        self._tenants = {name: _Tenant(limit) for name, limit in quotas.items()}
        self._line_of = array("I", bytes(4 * num_cells))
        self._default = _Line(0, lists.open(), DEFAULT_KEEP, None)
        self._lines = [self._default]
        self._unused_numbers: list[int] = []
        self._by_keep = {DEFAULT_KEEP: self._default}
        self._agendas: dict[int, _Agenda] = {}
        self._priorities: list[int] = []
        self._ends = _Agenda()
        self._stamps: array[int] | None = None
        self._num_uses = 0
        self.num_cached = 0
        if quotas:
            self._number_uses()

    def keep(self, block: int, keep: Keep) -> None:
        """Note how a block that became findable is to be kept."""
        line = self._default if keep is DEFAULT_KEEP else self._line_for(keep)
        self._line_of[block] = line.number
        line.num_blocks += 1

    def prolong(self, block: int, keep: Keep) -> None:
        """Keep a findable, owned block as this wish says if it is the longer one; its tenant stays the first one."""
        self._let_fall()
        line = self._lines[self._line_of[block]]
        keep = self._effective(replace(keep, tenant=line.keep.tenant))
        if keep.outlasts(line.keep):
            longer = self._line_for(keep)
            longer.num_blocks += 1
            self._line_of[block] = longer.number
            self._leave(line)

    def drop(self, block: int) -> None:
        """Forget a block that is neither cached nor findable any more."""
        self._leave(self._lines[self._line_of[block]])
        self._line_of[block] = 0

    def push(self, block: int) -> int | None:
        """Put a findable block that became unowned last; return one that must go because its tenant has too many."""
        line = self._lines[self._line_of[block]]
        anchor = line.anchor
        newest = self._previous[anchor]
        self._next[newest] = self._previous[anchor] = block
        self._previous[block], self._next[block] = newest, anchor
        self.num_cached += 1
        if self._stamps is not None:
            self._num_uses += 1
            self._stamps[block] = self._num_uses
        if not line.queued:
            self._queue(line)
        tenant = line.tenant
        if tenant is None:
            return None
        tenant.num_cached += 1
        return self._first_of(tenant) if tenant.num_cached > tenant.max_cached else None

    def remove(self, block: int) -> None:
        """Take out a cached block, which somebody wants or which is evicted."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.num_cached -= 1
        if self._tenants and (tenant := self._lines[self._line_of[block]].tenant):
            tenant.num_cached -= 1

    def first(self) -> int | None:
        """Return the block to evict first."""
        self._let_fall()
        for priority in self._priorities:
            line = self._first_line(priority)
            if line is not None:
                return self._lists.first(line.anchor)
        return None

    def in_order(self) -> Iterator[int]:
        """Go through the cached blocks in the order of eviction; nothing may change meanwhile."""
        self._let_fall()
        for priority in self._priorities:
            lines = [line for line in self._lines if line.is_live and line.keep.priority == priority]
            in_line = [self._lists.blocks(line.anchor) for line in lines]
            yield from heapq.merge(*in_line, key=self._stamp) if len(in_line) > 1 else chain(*in_line)

    def check_integrity(self, cached: list[int], findable: set[int]) -> None:
        """Assert that lines and tenants count their blocks right and that `cached`, the order, misses no line."""
        assert len(cached) == self.num_cached, "the number of cached blocks drifted"
        assert findable.issuperset(cached), "a block is cached that cannot be found"
        lengths = {line: sum(1 for _ in self._lists.blocks(line.anchor)) for line in self._lines if line.is_live}
        assert sum(lengths.values()) == len(cached), "the order of eviction misses a line"
        numbers = Counter(map(self._line_of.__getitem__, findable))
        for number, line in enumerate(self._lines):
            assert line.num_blocks == numbers[number], f"line {number}: number of blocks drifted"
            assert line.queued or not lengths.get(line), f"line {number} is not in order"
        for name, tenant in self._tenants.items():
            num_cached = sum(lengths[line] for line in tenant.lines)
            assert num_cached == tenant.num_cached, f"cached blocks of tenant {name!r} drifted"
            assert num_cached <= tenant.max_cached, f"tenant {name!r} has more cached blocks than its quota"

    def _line_for(self, keep: Keep) -> _Line:
        """Return the line of blocks that are kept so."""
        keep = self._effective(keep)
        return self._by_keep.get(keep) or self._open_line(keep)

    def _effective(self, keep: Keep) -> Keep:
        """Leave out what has no meaning here: a tenant without a quota, an end that has come."""
        tenant = keep.tenant if keep.tenant in self._tenants else ""
        ended = keep.expires_s is not None and keep.expires_s <= self._clock()
        priority = DEFAULT_RETENTION_PRIORITY if ended else keep.priority
        expires_s = None if priority == DEFAULT_RETENTION_PRIORITY else keep.expires_s
        return Keep(priority, expires_s, tenant)

    def _open_line(self, keep: Keep) -> _Line:
        number = self._unused_numbers.pop() if self._unused_numbers else len(self._lines)
        tenant = self._tenants.get(keep.tenant)
        line = self._by_keep[keep] = _Line(number, self._lists.open(), keep, tenant)
        if number == len(self._lines):
            self._lines.append(line)
        self._lines[number] = line
        if tenant is not None:
            tenant.lines.add(line)
        if keep.expires_s is not None:
            self._number_uses()
            self._ends.add(keep.expires_s, line)
        return line

    def _leave(self, line: _Line) -> None:
        """Count a block out of its line, and end the line with its last one."""
        line.num_blocks -= 1
        if line.num_blocks or line is self._default:
            return
        self._lists.close(line.anchor)
        line.is_live = False
        self._unused_numbers.append(line.number)
        if self._by_keep.get(line.keep) is line:
            del self._by_keep[line.keep]
        if line.tenant is not None:
            line.tenant.lines.discard(line)

    def _queue(self, line: _Line) -> None:
        """Put a line in order among those of its priority, by its least recently used block."""
        first = self._lists.first(line.anchor)
        if first is None:
            return
        priority = line.keep.priority
        if priority not in self._agendas:
            self._agendas[priority] = _Agenda()
            insort(self._priorities, priority)
        self._agendas[priority].add(self._stamp(first), line)
        line.queued = True

    def _first_line(self, priority: int) -> _Line | None:
        """Return the line of this priority with the least recently used block, putting those off that lost theirs."""
        agenda = self._agendas[priority]
        while entry := agenda.first:
            stamp, line = entry
            moved = not line.is_live or line.keep.priority != priority
            first = None if moved else self._lists.first(line.anchor)
            if first is None:
                agenda.drop_first()
                line.queued = line.queued and moved
            elif self._stamp(first) != stamp:
                agenda.put_first_off(self._stamp(first))
            else:
                return line
        return None

    def _let_fall(self) -> None:
        """Let the lines whose time is over fall to the default priority."""
        while (entry := self._ends.first) and entry[0] <= self._clock():
            line = entry[1]
            self._ends.drop_first()
            if line.is_live:
                if self._by_keep.get(line.keep) is line:
                    del self._by_keep[line.keep]
                line.keep = Keep(tenant=line.keep.tenant)
                line.queued = False
                self._queue(line)

    def _first_of(self, tenant: _Tenant) -> int:
        """Return the block of a tenant to evict first."""
        self._let_fall()
        firsts = ((line.keep.priority, self._lists.first(line.anchor)) for line in tenant.lines)
        return min((priority, self._stamp(block), block) for priority, block in firsts if block is not None)[2]

    def _number_uses(self) -> None:
        """Number uses from now on. Until then each priority had one line, whose order is that of its list."""
        if self._stamps is None:
            self._stamps = array("Q", bytes(8 * len(self._line_of)))

    def _stamp(self, block: int) -> int:
        return self._stamps[block] if self._stamps is not None else 0
