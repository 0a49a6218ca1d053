"""From a step plan to arrays: the requests that the runner holds, one row each, and one batch of them per step.

Rows persist between steps, so a step that only decodes moves no lists: tokens, positions and slots of the whole batch
come from a few array operations. The torch runner is the only caller.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zif.contract import AttentionBatch, KVGroup, RecurrentStateSpec, RequestStart, SlidingWindowSpec, StepPlan
from zif.runtime.tokens import TokenTable

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


class BlockTable:
    """Block ids of one layer group. table: [max_rows, capacity], int32; entries beyond a row's blocks are undefined."""

    def __init__(self, max_rows: int, capacity: int = 16) -> None:
        self.table: Int32 = np.zeros((max_rows, capacity), dtype=np.int32)

    def put(self, row: int, start: int, block_ids: list[int]) -> None:
        """Set logical blocks `start`, `start + 1`, ... of a row."""
        end = start + len(block_ids)
        rows, capacity = self.table.shape
        if end > capacity:
            grown = np.zeros((rows, max(end, 2 * capacity)), dtype=np.int32)
            grown[:, :capacity] = self.table
            self.table = grown
        self.table[row, start:end] = block_ids


@dataclass(frozen=True, slots=True)
class StateBatch:
    """One step's batch as one group of recurrent layers sees it.

    read_blocks, write_blocks: [R], block ids of the states before and after the step. starts_fresh: [R], where there is
    no state before, and the read block is undefined. query_start: [R + 1].
    """

    read_blocks: Int64
    write_blocks: Int64
    starts_fresh: Bool
    query_start: Int32


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The arrays of one step: R requests, T tokens, S of the requests sample.

    rows: [R]. token_ids, positions: [T], int64. sample_requests: [S], indices of requests in the plan. sample_tokens:
    [S], indices of their last tokens. attention, states: a batch for each layer group that attends or carries a state,
    by the group's index.
    """

    rows: Int64
    token_ids: Int64
    positions: Int64
    query_start: Int32
    sample_requests: Int64
    sample_tokens: Int64
    attention: dict[int, AttentionBatch]
    states: dict[int, StateBatch]


class BatchState:
    """The rows of the requests that the runner holds."""

    def __init__(self, max_rows: int, groups: tuple[KVGroup, ...]) -> None:
        self.tokens = TokenTable(max_rows)
        self._specs = tuple(group.spec for group in groups)
        self._tables = tuple(BlockTable(max_rows) for _ in groups)
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._row_of: dict[int, int] = {}

    def release(self, request_id: int) -> int | None:
        """Free a request's row and return it; None when the request is not held."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
        return row

    def start(self, start: RequestStart) -> int:
        """Give a request a row and return it."""
        assert start.request_id not in self._row_of, f"request {start.request_id} is started twice"
        row = self._row_of[start.request_id] = self._free_rows.pop()
        self.tokens.set_row(row, start.token_ids, start.num_prompt_tokens)
        for table, block_ids in zip(self._tables, start.block_ids, strict=True):
            table.put(row, 0, block_ids)
        return row

    def add_blocks(self, request_id: int, group: int, start: int, block_ids: list[int]) -> None:
        """Extend a request's block table of one group."""
        self._tables[group].put(self._row_of[request_id], start, block_ids)

    def batch(self, plan: StepPlan) -> StepBatch:
        """Build the arrays of a plan whose releases, starts and block updates have been applied."""
        rows = np.fromiter(map(self._row_of.__getitem__, plan.request_ids), np.int64, len(plan.request_ids))
        num_computed = np.asarray(plan.num_computed, dtype=np.int64)
        num_tokens = np.asarray(plan.num_tokens, dtype=np.int64)
        query_start = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(num_tokens, out=query_start[1:])
        # Token t of request r stands at position num_computed[r] + t - query_start[r].
        positions = np.arange(query_start[-1]) + np.repeat(num_computed - query_start[:-1], num_tokens)
        token_rows = np.repeat(rows, num_tokens)
        sample_requests = np.flatnonzero(np.asarray(plan.samples, dtype=np.bool_))
        seq_lens = (num_computed + num_tokens).astype(np.int32)
        starts = query_start.astype(np.int32)
        return StepBatch(
            rows=rows,
            token_ids=self.tokens.tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            query_start=starts,
            sample_requests=sample_requests,
            sample_tokens=query_start[1:][sample_requests] - 1,
            attention={
                group: self._attention_batch(group, rows, token_rows, positions, starts, seq_lens)
                for group, spec in enumerate(self._specs)
                if not isinstance(spec, RecurrentStateSpec)
            },
            states={
                group: self._state_batch(group, rows, num_computed, starts, seq_lens)
                for group, spec in enumerate(self._specs)
                if isinstance(spec, RecurrentStateSpec)
            },
        )

    def _attention_batch(
        self, group: int, rows: Int64, token_rows: Int64, positions: Int64, starts: Int32, seq_lens: Int32
    ) -> AttentionBatch:
        spec, table = self._specs[group], self._tables[group].table
        size = spec.block_size
        slots = table[token_rows, positions // size].astype(np.int64) * size + positions % size
        return AttentionBatch(
            query_start=starts,
            seq_lens=seq_lens,
            block_table=table[rows, : -(-int(seq_lens.max()) // size)],
            slots=slots,
            block_size=size,
            window=spec.window if isinstance(spec, SlidingWindowSpec) else None,
        )

    def _state_batch(self, group: int, rows: Int64, num_computed: Int64, starts: Int32, seq_lens: Int32) -> StateBatch:
        size, table = self._specs[group].block_size, self._tables[group].table
        return StateBatch(
            read_blocks=table[rows, np.maximum(num_computed - 1, 0) // size].astype(np.int64),
            write_blocks=table[rows, (seq_lens - 1) // size].astype(np.int64),
            starts_fresh=num_computed == 0,
            query_start=starts,
        )
