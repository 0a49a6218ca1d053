"""From a step plan to arrays: the requests that the runner holds, one row each, and one batch of them per step.

Rows persist between steps, so a step that only decodes moves no lists: tokens, positions and slots of the whole batch
come from a few array operations. The torch runner is the only caller.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zif.contract import AttentionBatch, KVGroup, RecurrentStateSpec, RequestStart, SlidingWindowSpec, StepPlan
from zif.runtime.tokens import Int64, SamplePositions, TokenTable

Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


class BlockTable:
    """Block ids of one layer group. table: [max_rows, capacity], int32; entries beyond a row's blocks are undefined."""

    def __init__(self, max_rows: int, capacity: int = 16) -> None:
        self.table: Int32 = np.zeros((max_rows, capacity), dtype=np.int32)

    def put(self, row: int, start: int, block_ids: list[int]) -> None:
        """Set logical blocks `start`, `start + 1`, ... of a row; those after them become undefined."""
        end = start + len(block_ids)
        self._grow(end)
        self.table[row, start:end] = block_ids

    def blocks_at(self, rows: Int64, logical: Int64) -> Int64:
        """Return the ids of logical blocks `logical` of `rows`, undefined where a row has none. All: [N]."""
        self._grow(int(logical.max()) + 1)
        return self.table[rows, logical].astype(np.int64)

    def _grow(self, capacity: int) -> None:
        rows, current = self.table.shape
        if capacity > current:
            grown = np.zeros((rows, max(capacity, 2 * current)), dtype=np.int32)
            grown[:, :current] = self.table
            self.table = grown


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
    """The arrays of one step: R requests, T tokens, S of which are sampled after.

    rows: [R]. token_ids, positions: [T], int64. sample_tokens: [S], indices of tokens: the last of each request that
    samples, and as many before it as its draft has. sample_requests: [S], their requests as indices into the plan,
    rising. attention, states: a batch for each layer group that attends or carries a state, by the group's index.
    """

    rows: Int64
    token_ids: Int64
    positions: Int64
    query_start: Int32
    sample_requests: Int64
    sample_tokens: Int64
    attention: dict[int, AttentionBatch]
    states: dict[int, StateBatch]

    def sample_positions(self, tokens: TokenTable) -> SamplePositions:
        """Return where the step samples, in terms of the table that its rows are of."""
        return SamplePositions(tokens, self.rows[self.sample_requests], self.positions[self.sample_tokens] + 1)


class BatchState:
    """The rows of the requests that the runner holds."""

    def __init__(self, max_rows: int, groups: tuple[KVGroup, ...]) -> None:
        self.tokens = TokenTable(max_rows)
        self._specs = tuple(group.spec for group in groups)
        self._state_groups = [i for i, spec in enumerate(self._specs) if isinstance(spec, RecurrentStateSpec)]
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

    def put_blocks(self, request_id: int, group: int, start: int, block_ids: list[int]) -> None:
        """Set a request's block table of one group from logical block `start` on."""
        self._tables[group].put(self._row_of[request_id], start, block_ids)

    def keep_states(self, plan: StepPlan, request: int) -> None:
        """Make the states after the row of `request`, all of whose draft was accepted, those that it goes on from."""
        request_id = plan.request_ids[request]
        last_token = plan.num_computed[request] + plan.num_tokens[request] - 1
        for group in self._state_groups:
            block_id = plan.drafts[request_id].state_blocks[group]
            self.put_blocks(request_id, group, last_token // self._specs[group].block_size, [block_id])

    def batch(self, plan: StepPlan) -> StepBatch:
        """Build the arrays of a plan whose releases, starts and block updates have been applied.

        Drafts go behind the known tokens of their rows and are part of the step like these.
        """
        num_guesses = self._put_drafts(plan)
        rows = np.fromiter(map(self._row_of.__getitem__, plan.request_ids), np.int64, len(plan.request_ids))
        num_computed = np.asarray(plan.num_computed, dtype=np.int64)
        num_tokens = np.asarray(plan.num_tokens, dtype=np.int64)
        query_start = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(num_tokens, out=query_start[1:])
        # Token t of request r stands at position num_computed[r] + t - query_start[r].
        positions = np.arange(query_start[-1]) + np.repeat(num_computed - query_start[:-1], num_tokens)
        token_rows = np.repeat(rows, num_tokens)
        sample_requests = np.flatnonzero(np.asarray(plan.samples, dtype=np.bool_))
        sample_tokens = query_start[1:][sample_requests] - 1
        if num_guesses:
            counts = 1 + np.fromiter((num_guesses.get(i, 0) for i in sample_requests.tolist()), np.int64)
            sample_requests = np.repeat(sample_requests, counts)
            # The positions of a request end with its last token.
            sample_tokens = np.repeat(sample_tokens + 1 - np.cumsum(counts), counts) + np.arange(len(sample_requests))
        seq_lens = (num_computed + num_tokens).astype(np.int32)
        starts = query_start.astype(np.int32)
        return StepBatch(
            rows=rows,
            token_ids=self.tokens.tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            query_start=starts,
            sample_requests=sample_requests,
            sample_tokens=sample_tokens,
            attention={
                group: self._attention_batch(group, rows, token_rows, positions, starts, seq_lens)
                for group in range(len(self._specs))
                if group not in self._state_groups
            },
            states={group: self._state_batch(group, plan, rows, starts, num_guesses) for group in self._state_groups},
        )

    def _put_drafts(self, plan: StepPlan) -> dict[int, int]:
        """Put drafts into the token table. Returns the number of guesses by index of the request in the plan."""
        num_guesses: dict[int, int] = {}
        if not plan.drafts:
            return num_guesses
        for request, request_id in enumerate(plan.request_ids):
            if draft := plan.drafts.get(request_id):
                row, num_guesses[request] = self._row_of[request_id], len(draft.token_ids)
                num_planned = plan.num_computed[request] + plan.num_tokens[request]
                num_known = int(self.tokens.num_tokens[row])
                assert plan.samples[request], f"request {request_id} has a draft and does not sample"
                assert num_planned == num_known + len(draft.token_ids), (
                    f"request {request_id}: {num_planned} tokens are planned for, "
                    f"{num_known} known and {len(draft.token_ids)} guessed"
                )
                self.tokens.put_draft(row, draft.token_ids)
        return num_guesses

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
            group=group,
        )

    def _state_batch(
        self, group: int, plan: StepPlan, rows: Int64, starts: Int32, num_guesses: dict[int, int]
    ) -> StateBatch:
        size, table = self._specs[group].block_size, self._tables[group]
        num_computed = np.asarray(plan.num_computed, dtype=np.int64)
        write_blocks = table.blocks_at(rows, (num_computed + np.asarray(plan.num_tokens) - 1) // size)
        for request in num_guesses:
            write_blocks[request] = plan.drafts[plan.request_ids[request]].state_blocks[group]
        return StateBatch(
            read_blocks=table.blocks_at(rows, np.maximum(num_computed - 1, 0) // size),
            write_blocks=write_blocks,
            starts_fresh=num_computed == 0,
            query_start=starts,
        )
