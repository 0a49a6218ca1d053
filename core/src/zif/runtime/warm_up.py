"""Steps of every kind before the first request: what a device compiles on first use is compiled by them.

A plan of warm-up is like any other, of requests that nobody has sent: their tokens are made up and what stands in their
caches is whatever stands there. Their blocks are free ones, no two layer groups share bytes, and one block may serve
several requests of a step: nobody reads what comes out. The torch runner is the only caller.

Kernels are chosen by how many requests and tokens there are, by how many new tokens a request brings, and by whether
its keys reach far. Numbers of requests and tokens go up by half and by double here, because choices that are made for
sizes are made for ranges of them at least that wide.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from zif.contract import (
    Draft,
    EngineConfig,
    HiddenRows,
    KVArena,
    RecurrentStateSpec,
    RequestStart,
    SamplingParams,
    SchedulerConstraints,
    StepPlan,
)

_GREEDY = SamplingParams(temperature=0.0)
_SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.5, top_k=5),
    SamplingParams(top_p=0.9, min_p=0.01),
    SamplingParams(logprobs=1),
    SamplingParams(temperature=0.0, repetition_penalty=1.1),
)
_MAX_SHORT_TOKENS = 8
"""New tokens of a request that kernels may count as few, and for which they may differ number by number."""

_LONG_CONTEXT = 1 << 13
"""Computed tokens that are many: kernels split the keys of few requests, and merge the parts."""

_SEED = 0
_FIRST_REQUEST_ID = -1
"""Requests count down from here: those of the engine are not negative."""


@dataclass(frozen=True, slots=True)
class WarmUpRow:
    """A request of one step: `num_tokens` new tokens, the last `num_guesses` of them guessed, behind `num_computed`."""

    num_computed: int
    num_tokens: int
    sampling: SamplingParams = _GREEDY
    num_guesses: int = 0


class WarmUpSteps:
    """The steps for one engine, as plans. `vocab_size` bounds the tokens that are made up.

    With `hidden`, for models without logits, requests want these rows: they only compute prompts.
    """

    def __init__(
        self,
        config: EngineConfig,
        constraints: SchedulerConstraints,
        arena: KVArena,
        vocab_size: int,
        hidden: HiddenRows | None = None,
    ) -> None:
        self._hidden = hidden
        self._max_rows = min([config.max_num_seqs, *constraints.batch_buckets[-1:]])
        self._max_tokens = min([config.max_num_batched_tokens, *constraints.token_buckets[-1:]])
        self._max_model_len = config.max_model_len
        self._num_guesses = max(1, config.max_draft_tokens)
        self._mixes = not constraints.separate_prefill
        self._arena = arena
        self._vocab_size = vocab_size
        self._blocks = tuple(self._free_blocks(group) for group in range(len(arena.groups)))

    def kinds(self) -> list[tuple[WarmUpRow, ...]]:
        """Return the rows of every step, those that every answer waits for first."""
        generating = [] if self._hidden else [*self._decoding(), *self._sampling()]
        found = [*generating, *self._prompts(), *self._chunks()]
        # Limits make some of them equal, or impossible.
        fitting = (rows for rows in found if rows and self._fits(rows))
        return list(dict.fromkeys(fitting))

    def plan(self, rows: tuple[WarmUpRow, ...]) -> StepPlan:
        """Return the plan of one step, which starts its requests. Its step has the number 0."""
        plan = StepPlan(0)
        for index, row in enumerate(rows):
            request_id = _FIRST_REQUEST_ID - index
            plan.started.append(self._start(request_id, index, row))
            plan.request_ids.append(request_id)
            plan.num_computed.append(row.num_computed)
            plan.num_tokens.append(row.num_tokens)
            plan.samples.append(self._hidden is None)
            plan.total_tokens += row.num_tokens
            if row.num_guesses:
                plan.drafts[request_id] = Draft(self._token_ids(row.num_guesses), self._spares(index))
        return plan

    @staticmethod
    def release(plan: StepPlan) -> StepPlan:
        """Return the plan that releases the requests of another, last one first: as if they had never been."""
        return StepPlan(0, released=plan.request_ids[::-1])

    def _decoding(self) -> Iterator[tuple[WarmUpRow, ...]]:
        """Yield steps of one token for each request."""
        for count in _sizes(self._max_rows):
            yield (WarmUpRow(1, 1),) * count

    def _sampling(self) -> Iterator[tuple[WarmUpRow, ...]]:
        """Yield each way to sample, all of them in one step, and guesses."""
        for sampling in _SAMPLINGS:
            yield (WarmUpRow(1, 1, sampling),)
        yield tuple(WarmUpRow(1, 1, sampling) for sampling in (*_SAMPLINGS, _GREEDY))[: self._max_rows]
        yield (WarmUpRow(1, 1 + self._num_guesses, num_guesses=self._num_guesses),)

    def _prompts(self) -> Iterator[tuple[WarmUpRow, ...]]:
        """Yield whole prompts, from one token to a full step."""
        for num_tokens in _sizes(self._max_tokens):
            count = -(-num_tokens // (self._max_model_len - 1 or 1))
            yield (WarmUpRow(0, num_tokens // count),) * count

    def _chunks(self) -> Iterator[tuple[WarmUpRow, ...]]:
        """Yield few and many new tokens behind short and long contexts, and such a chunk beside a single token."""
        many = _MAX_SHORT_TOKENS + 1
        for context in self._contexts(many):
            for num_tokens in range(2, many + 1):
                yield (WarmUpRow(context, num_tokens),)
            if self._mixes:
                yield WarmUpRow(context, 1), WarmUpRow(0, many)

    def _contexts(self, num_tokens: int) -> tuple[int, ...]:
        """Return numbers of computed tokens that leave room for more: none, one, and many."""
        return 0, 1, min(self._max_model_len - num_tokens, _LONG_CONTEXT)

    def _fits(self, rows: tuple[WarmUpRow, ...]) -> bool:
        longest = max(row.num_computed + row.num_tokens for row in rows)
        total = sum(row.num_tokens for row in rows)
        positive = all(row.num_computed >= 0 and row.num_tokens > 0 for row in rows)
        few = len(rows) <= self._max_rows and total <= self._max_tokens and longest <= self._max_model_len
        return positive and few and all(self._blocks)

    def _start(self, request_id: int, index: int, row: WarmUpRow) -> RequestStart:
        num_known = row.num_computed + row.num_tokens - row.num_guesses
        tables = tuple(
            [
                blocks[(index + block) % len(blocks)]
                for block in range(group.spec.num_blocks(num_known + row.num_guesses))
            ]
            for group, blocks in zip(self._arena.groups, self._blocks, strict=True)
        )
        token_ids = self._token_ids(num_known)
        return RequestStart(request_id, token_ids, num_known, tables, row.sampling, _SEED, hidden=self._hidden)

    def _spares(self, index: int) -> tuple[int, ...]:
        """Return a block for the state after a draft in each group that has states, 0 in the others."""
        return tuple(
            blocks[(index + 1) % len(blocks)] if isinstance(group.spec, RecurrentStateSpec) else 0
            for group, blocks in zip(self._arena.groups, self._blocks, strict=True)
        )

    def _token_ids(self, count: int) -> list[int]:
        return [token % self._vocab_size for token in range(count)]

    def _free_blocks(self, group: int) -> list[int]:
        """Return as many blocks as a full step writes, fewer where there are fewer: none of another group's bytes."""
        slabs = range(1 + group, self._arena.num_slabs, len(self._arena.groups))
        blocks = itertools.chain.from_iterable(self._arena.slab_blocks(group, slab) for slab in slabs)
        most = self._arena.groups[group].spec.num_blocks(self._max_tokens) + self._max_rows
        return list(itertools.islice(blocks, most))


def _sizes(largest: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12 and so on, and the largest."""
    doubled = [size << k for k in range(largest.bit_length()) for size in (2, 3)]
    return sorted({1, largest, *(size for size in doubled if size < largest)})
