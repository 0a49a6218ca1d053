"""A reference block model: what a correct block manager may and must answer, written without looking at the real one.

The model lends no blocks. It hears every call with its answer, keeps as a *ghost* what each block holds, and raises
`Disagreement` at an answer that no correct manager gives. What layers see is written out anew here: no rule of a
`KVSpec` is called. The ghost of a block of tokens is the cache key and every token up to the last one written; that of
a block of state the key and exactly the tokens that the state has seen.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from zif.contract import (
    CacheKey,
    ChunkedLocalSpec,
    KVArena,
    KVSpec,
    KVUsage,
    PrefixMiss,
    PrefixReport,
    RecurrentStateSpec,
    Request,
    SlidingWindowSpec,
    Transfers,
)

Content = tuple[CacheKey, tuple[int, ...]]


class Disagreement(AssertionError):
    """The manager answered what no correct manager answers."""


def demand(truth: object, complaint: str) -> None:
    if not truth:
        raise Disagreement(complaint)


def first_seen(spec: KVSpec, position: int) -> int:
    """Return the first position that the token at `position` sees; for a state, the one that it follows on."""
    if isinstance(spec, SlidingWindowSpec):
        return max(0, position - spec.window + 1)
    if isinstance(spec, ChunkedLocalSpec):
        return position - position % spec.chunk
    return max(0, position - 1) if isinstance(spec, RecurrentStateSpec) else 0


def content(request: Request, end: int) -> Content:
    return request.cache_key, tuple(request.token_ids[:end])


@dataclass
class Mirror:
    """What the model knows of a request that holds blocks; steps up to `asked` are reserved and not computed yet."""

    computed: int
    reserved: int
    tables: tuple[tuple[int, ...], ...]
    asked: list[int] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)


class ReferenceModel:
    """Follow one manager. `final` is what the index may hold, `lasting` what it must while nothing is evicted."""

    def __init__(self, arena: KVArena, *, caching: bool, max_step_tokens: int) -> None:
        self.arena, self.caching, self.max_step_tokens = arena, caching, max_step_tokens
        self.specs = [group.spec for group in arena.groups]
        self.states = [isinstance(spec, RecurrentStateSpec) for spec in self.specs]
        self.has_windows = any(isinstance(spec, SlidingWindowSpec | ChunkedLocalSpec) for spec in self.specs)
        self.unit = math.lcm(*(spec.block_size for spec in self.specs))
        self.num_slabs = arena.num_slabs - 1
        self.per_slab = [arena.slab_bytes // group.layout.block_bytes for group in arena.groups]
        self.is_even = not any(arena.slab_bytes % group.layout.block_bytes for group in arena.groups)
        self.num_offered = sum(len(arena.slab_blocks(0, slab)) for slab in range(1, arena.num_slabs))
        self.live: dict[Request, Mirror] = {}
        self.ghosts: list[dict[int, Content]] = [{} for _ in self.specs]
        self.final: list[set[Content]] = [set() for _ in self.specs]
        self.lasting: list[set[Content]] = [set() for _ in self.specs]
        self.newest: dict[Request, Content] = {}
        self.computed_ever: set[Content] = set()
        self.computed_since_reset: set[Content] = set()
        self.reports: dict[Request, PrefixReport] = {}
        self.stored: dict[int, Content] = {}
        self.was_refused = False
        self.num_given = [0] * len(self.specs)

    # What is needed, and what there is.

    def needed(self, request: Request, end: int) -> Iterator[tuple[int, int, Content]]:
        """Yield group, logical block and its content, of all that a token at position `end` needs from before it."""
        for group, spec in enumerate(self.specs):
            size = spec.block_size
            for block in range(first_seen(spec, end) // size, -(-end // size)):
                yield group, block, content(request, end if self.states[group] else min(end, (block + 1) * size))

    def longest(self, request: Request, limit: int, *, with_states: bool) -> int:
        """Return the longest prefix that must be found, as far as groups with states have a say or as if not."""
        newest = set(self.newest.values())
        kept = [known | newest if state else known for known, state in zip(self.lasting, self.states, strict=True)]
        for end in range(limit, 0, -self.unit):
            wanted = self.needed(request, end)
            if all(text in kept[group] or (self.states[group] and not with_states) for group, _, text in wanted):
                return end
        return 0

    def offered(self, source: Request, request: Request, limit: int) -> int:
        """Return the longest shareable part of the prompt if `source` holds all that is needed of it, else 0."""
        end, tables = min(limit, request.num_prompt_tokens // self.unit * self.unit), self.live[source].tables
        wanted = self.needed(request, end)
        return end if all(self.ghosts[group].get(tables[group][block]) == text for group, block, text in wanted) else 0

    def hands(self, group: int) -> Counter[int]:
        """Count in how many tables each block is."""
        return Counter(block for mirror in self.live.values() for block in mirror.tables[group] if block)

    @property
    def has_room(self) -> bool:
        """Say whether all blocks ever asked for fit into the arena side by side: then nothing need be evicted."""
        lent = sum(-(-count // blocks) for count, blocks in zip(self.num_given, self.per_slab, strict=True))
        return self.is_even and not self.was_refused and lent <= self.num_slabs

    def is_possible(self, request: Request, num_tokens: int) -> bool:
        """Say whether what nobody holds suffices for `num_tokens` tokens, wherever cached blocks lie."""
        slabs = 0
        for group, (spec, blocks) in enumerate(zip(self.specs, self.per_slab, strict=True)):
            owned = list(self.hands(group))
            lent = len({block // blocks for block in owned})
            num_new = max(0, -(-num_tokens // spec.block_size) - len(self.live[request].tables[group]))
            num_new = min(num_new, 1) if self.states[group] else num_new
            if len(self.specs) == 1:
                return num_new + len(owned) <= self.num_offered
            slabs += lent + max(0, -(-(num_new + len(owned) - lent * blocks) // blocks))
        return not self.is_even or slabs <= self.num_slabs

    def said_to_fit(self, num_tokens: int, answer: bool) -> None:
        """Check what `fits` said of an arena of one group; behind a window it may be careful by one block."""
        held, room = self._peak_blocks(num_tokens), self.num_offered
        demand(not answer or held <= room, f"{num_tokens} tokens are said to fit, with {held} blocks into {room}")
        is_sure = not answer and held + self.has_windows <= room
        demand(not is_sure, f"{num_tokens} tokens are said not to fit, with {held} blocks into {room}")

    def said_to_hold(self, request: Request, num_tokens: int, answer: bool) -> None:
        """Check what `can_hold` said of an arena of one group: behind a window and for states it may be careful."""
        demand(not answer or self.is_possible(request, num_tokens), "can_hold promised blocks that there are not")
        more = self._peak_blocks(num_tokens) + self.has_windows - sum(map(bool, self.live[request].tables[0]))
        left = self.num_offered - len(self.hands(0))
        is_sure = more <= left and self.is_possible(request, num_tokens)
        demand(answer or not is_sure, f"can_hold denied {num_tokens} tokens with {left} blocks in nobody's hand")

    def _peak_blocks(self, num_tokens: int) -> int:
        """Return the most blocks of the first group that a request of `num_tokens` holds at once."""
        size, step = self.specs[0].block_size, self.max_step_tokens
        if self.states[0]:
            return min(2, -(-num_tokens // size))
        starts = ((first_seen(self.specs[0], start) // size, start + step) for start in range(num_tokens))
        return max(-(-min(num_tokens, end) // size) - first for first, end in starts)

    # Calls and their answers.

    def began(self, request: Request, source: Request | None) -> None:
        """Check what `begin` gave, once the transfers that it asked for are done."""
        found, limit = request.num_computed_tokens, (request.num_tokens - 1) // self.unit * self.unit
        mirror = self.live[request] = Mirror(found, found, tables_of(request))
        is_asked = request.sampling.prompt_logprobs is not None
        is_looked_up = self.caching and not is_asked
        demand(0 <= found < request.num_tokens, f"{found} of {request.num_tokens} known tokens are found computed")
        demand(found <= request.capacity < found + self.unit, f"capacity {request.capacity} with {found} tokens found")
        # What was copied out when a request was preempted is its own, and comes back whatever the settings.
        may_reuse = not is_asked and (self.caching or source)
        demand(may_reuse or request.num_preemptions or not found, "a prefix was reused that must not be")
        self._check_tables(request)
        if not request.num_preemptions:
            self._check_origin(request, source)
        if source and not is_asked:
            demand(found >= (must := self.offered(source, request, limit)), f"{found} of {must} tokens taken over")
        if is_looked_up and self.has_room:
            must = self.longest(request, limit, with_states=True)
            demand(found >= must, f"{found} tokens found where {must} were kept")
        self._check_report(request, limit)
        if is_looked_up and any(self.states):
            mirror.stops = {stop for stop in self._stops(request, limit, source) if stop > found}

    def _stops(self, request: Request, limit: int, source: Request | None) -> Iterator[int]:
        """Yield where steps must end: at the prompt's last whole unit, and where groups without states would go on."""
        yield (request.num_prompt_tokens - 1) // self.unit * self.unit
        if self.has_room and not source and not all(self.states):
            junction = self.longest(request, limit, with_states=False)
            later = {content(request, end) for end in range(junction + self.unit, limit + 1, self.unit)}
            # A state that is found beyond what the other groups can serve hides the junction.
            if not any(later & final for final, state in zip(self.final, self.states, strict=True) if state):
                yield junction

    def step_ended(self, request: Request, start: int, asked: int, answer: int) -> None:
        """Check where a step from `start` to `asked` tokens should end."""
        demand(start < answer <= asked, f"a step from {start} to {asked} should end at {answer}")
        may_stop = self.caching and any(self.states) and answer % self.unit == 0
        demand(answer == asked or may_stop, f"a step to {asked} is cut at {answer}, where nothing is resumed")
        passed = [stop for stop in self.live[request].stops if start < stop < answer]
        demand(not passed, f"a step from {start} to {answer} passes the checkpoints {passed}")

    def reserved(self, request: Request, num_tokens: int, answer: bool) -> None:
        """Check what `reserve` gave."""
        mirror, tables, is_possible = self.live[request], tables_of(request), self.is_possible(request, num_tokens)
        if not answer:
            self.was_refused = True
            demand(tables == mirror.tables, "a refused reservation changed the block table")
            demand(len(self.specs) > 1 or not is_possible, "a reservation was refused although there are blocks")
            return
        demand(is_possible, "a reservation was granted that there are no blocks for")
        demand(request.capacity >= num_tokens, f"capacity {request.capacity} after {num_tokens} were reserved")
        for group, (old, new) in enumerate(zip(mirror.tables, tables, strict=True)):
            given = [block for block in new[len(old) :] if block]
            demand(new[: len(old)] == old, "a reservation changed blocks that were held before")
            in_use = len(set(given)) < len(given) or self.hands(group).keys() & set(given)
            demand(not in_use, f"of {given} some are in use already")
            self.num_given[group] += len(given)
            for block in given:
                self.ghosts[group].pop(block, None)
        mirror.tables, mirror.reserved = tables, max(mirror.reserved, num_tokens)
        mirror.asked.append(num_tokens)

    def computed(self, request: Request, end: int) -> None:
        """Check what a step up to `end` reads and writes, and write the ghosts."""
        mirror, start = self.live[request], self.live[request].computed
        self._check_contents(request)
        for group, spec in enumerate(self.specs):
            hands, size, table = self.hands(group), spec.block_size, mirror.tables[group]
            for index in range((end - 1 if self.states[group] else start) // size, (end - 1) // size + 1):
                block = table[index] if index < len(table) else 0
                demand(block, f"{spec.kind}: a step to {end} has no block {index} to write to")
                demand(hands[block] == 1, f"{spec.kind}: block {block} is written and in {hands[block]} hands")
                self.ghosts[group][block] = content(request, min(end, (index + 1) * size))
            mirror.computed = end
            self._finish(request, group, start)
        prefixes = {content(request, position) for position in range(start + 1, end + 1)}
        self.computed_ever |= prefixes
        if not start or content(request, start) in self.computed_since_reset:
            self.computed_since_reset |= prefixes
        mirror.asked = [asked for asked in mirror.asked if asked > end]

    def _finish(self, request: Request, group: int, start: int) -> None:
        """Note which contents of a group became final by a step; a newer state of a request may replace an older."""
        mirror, size = self.live[request], self.specs[group].block_size
        end, text = mirror.computed, content(request, mirror.computed)
        if not self.states[group]:
            ends = range((start // size + 1) * size, end + 1, size)
            self.lasting[group] |= (final := {content(request, stop) for stop in ends})
            self.final[group] |= final
        elif end % size == 0:
            self.final[group].add(text)
            if end in mirror.stops:
                self.lasting[group].add(text)
            elif end >= request.num_prompt_tokens and end % self.unit == 0:
                self.newest.setdefault(request, text)
                # The older one goes for all, also for requests that came to the same state.
                if (older := self.newest[request]) != text:
                    self.newest = {other: kept for other, kept in self.newest.items() if kept != older}
                    self.lasting[group].discard(older)
                self.newest[request] = text

    def released(self, request: Request) -> None:
        """Hear that a request has given its blocks back."""
        demand(not any(map(any, request.block_ids)), "a released request still has blocks in its table")
        del self.live[request]

    def reset(self) -> None:
        """Hear that every prefix is forgotten."""
        for known in (*self.final, *self.lasting, self.newest, self.computed_since_reset):
            known.clear()

    def transferred(self, transfers: Transfers | None) -> None:
        """Carry out copies between blocks and stores."""
        for save in transfers.saves if transfers else ():
            demand(save.handle not in self.stored, f"handle {save.handle} was used before")
            self.stored[save.handle] = self.ghosts[save.group][save.block_id]
        for load in transfers.loads if transfers else ():
            self.ghosts[load.group][load.block_id] = self.stored[load.handle]

    # What must hold between calls.

    def check(self, usage: Sequence[KVUsage], changed: Request | None = None) -> None:
        """Check the tables and contents of all requests, of which only one was spoken of, and the census."""
        for request, mirror in self.live.items():
            demand(request.num_computed_tokens == mirror.computed, "a count of computed tokens changed by itself")
            tables = tables_of(request)
            demand(request is changed or tables == mirror.tables, "the block table of another request changed")
            entries = zip(sum(mirror.tables, ()), sum(tables, ()), strict=True)
            demand(all(new in (0, old) for old, new in entries), "a block table changed by itself")
            mirror.tables = tables
        for request in self.live:
            self._check_tables(request)
        self._check_census(usage)

    def _check_tables(self, request: Request) -> None:
        mirror = self.live[request]
        for spec, is_state, table in zip(self.specs, self.states, mirror.tables, strict=True):
            first, size = first_seen(spec, mirror.computed) // spec.block_size, spec.block_size
            demand(len(table) == -(-mirror.reserved // size), f"{spec.kind}: {table} for {mirror.reserved} tokens")
            ends = [end for end in (mirror.computed, *mirror.asked) if end]
            used = {(end - 1) // size for end in ends} if is_state else range(first, len(table))
            held = {index for index, block in enumerate(table) if block}
            demand(held <= set(used), f"{spec.kind}: {table} holds more than {list(used)} after {mirror.computed}")
            demand(is_state or held == set(used), f"{spec.kind}: {table} lacks some of {used} after {mirror.computed}")
        self._check_contents(request)

    def _check_contents(self, request: Request) -> None:
        mirror = self.live[request]
        for group, index, text in self.needed(request, mirror.computed):
            block, kind = mirror.tables[group][index], self.specs[group].kind
            demand(block, f"{kind}: logical block {index} is needed after {mirror.computed} tokens and not held")
            ghost = self.ghosts[group].get(block)
            demand(ghost == text, f"{kind}: logical block {index} must hold {text}, block {block} holds {ghost}")

    def _check_origin(self, request: Request, source: Request | None) -> None:
        """Check that what was found was computed, and is known to the index or held by the source."""
        found, has_needs = request.num_computed_tokens, False
        for group, index, text in self.needed(request, found):
            has_needs = True
            theirs = self.live[source].tables[group][index : index + 1] if source else ()
            is_known = request.block_ids[group][index] in theirs or text in self.final[group]
            demand(is_known, f"{self.specs[group].kind}: logical block {index} was found, which nobody may find")
        demand(not has_needs or content(request, found) in self.computed_ever, f"nobody computed {found} tokens")

    def _check_report(self, request: Request, limit: int) -> None:
        """Check that the report of the first admission is true, and stays."""
        report, found = request.prefix, request.num_computed_tokens
        demand(report, "there is no report of what was found")
        if request.num_preemptions:
            demand(report is self.reports[request], "the report of the first admission changed")
        else:
            self.reports[request] = report
            demand(report.num_tokens == found, f"{report}, and {found} tokens were given")
            demand(report.max_tokens in (limit, 0) and report.max_tokens >= found, f"{report} of at most {limit}")
            demand(sum(count for _, count in report.by_tier) in (found, 0), f"{report} adds up to something else")
            reasons = self._true_reasons(request, found, limit)
            demand(report.miss in reasons, f"{report} of at most {limit}, true were {reasons}")
            is_state = report.kind in {spec.kind for spec, state in zip(self.specs, self.states, strict=True) if state}
            demand(report.miss is not PrefixMiss.NO_CHECKPOINT or is_state, f"{report} blames a group without states")
            demand(report.kind in {"", *(spec.kind for spec in self.specs)}, f"{report} names no group")

    def _true_reasons(self, request: Request, found: int, limit: int) -> set[PrefixMiss | None]:
        """Return the reasons that can truly be given for having found no more."""
        if found == limit > 0:
            return {None}
        reasons: set[PrefixMiss | None] = {PrefixMiss.SHORT_PROMPT} if not limit else set()
        if request.sampling.prompt_logprobs is not None:
            reasons.add(PrefixMiss.PROMPT_LOGPROBS)
        if not self.caching:
            reasons.add(PrefixMiss.CACHING_OFF)
        if reasons:
            return reasons
        # Behind a window, a longer prefix may be missed than the next. Where all groups keep states, what was computed
        # between two of them leaves no trace. What was evicted is remembered as far as the memory for it goes.
        next_end = limit if self.has_windows else found + self.unit
        was_begun = content(request, found + 1) in self.computed_ever
        is_known = self.has_room and content(request, next_end) in self.computed_since_reset
        if all(self.states) or not is_known:
            reasons.add(PrefixMiss.NOT_SEEN)
        if was_begun and not self.has_room:
            reasons.add(PrefixMiss.EVICTED)
        if all(self.states) or (was_begun and any(self.states)):
            reasons.add(PrefixMiss.NO_CHECKPOINT)
        return reasons

    def _check_census(self, usage: Sequence[KVUsage]) -> None:
        """Check that free, cached and owned blocks are what whole slabs offer, and that the rest can be lent."""
        demand(len(usage) == len(self.specs), f"{len(usage)} groups are counted")
        totals = [count.num_free + count.num_cached + count.num_owned for count in usage]
        lent = sum(-(-total // blocks) for total, blocks in zip(totals, self.per_slab, strict=True))
        for group, (count, total, blocks) in enumerate(zip(usage, totals, self.per_slab, strict=True)):
            num_owned = len(self.hands(group))
            demand(min(count.num_free, count.num_cached) >= 0, f"{count} has less than nothing")
            demand(count.num_owned == num_owned, f"{count.num_owned} owned blocks, {num_owned} in tables")
            demand(self.caching or not count.num_cached, "blocks are cached although caching is off")
            if self.is_even:
                demand(total % blocks == 0, f"{count} is no number of whole slabs of {blocks} blocks")
                demand(count.num_lendable == (self.num_slabs - lent) * blocks, f"{count} with {lent} slabs lent")
        demand(lent <= self.num_slabs, f"{lent} slabs are lent of {self.num_slabs}")


def tables_of(request: Request) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(table) for table in request.block_ids)
