"""Recurrent states in the arena: where they lie, which blocks a step reads and writes, which requests run together."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zif.contract import (
    KVArena,
    KVGroup,
    KVLayout,
    RecurrentStateSpec,
    RequestStart,
    SamplingParams,
    StateTensor,
    StepPlan,
)
from zif.reference.state import ALIGNMENT, state_layout, state_views
from zif.runtime.batch import BatchState, StateBatch
from zif.runtime.states import StateMemory

BLOCK_SIZE = 8
SPEC = RecurrentStateSpec(
    layers=(1, 4),
    tensors=(StateTensor("conv", (5, 3), "bfloat16"), StateTensor("recurrent", (2, 3, 4), "float32")),
    block_size=BLOCK_SIZE,
    dtype="bfloat16",
)


def arena_of(num_blocks: int) -> KVArena:
    layout = state_layout(SPEC)
    return KVArena(layout.block_bytes, num_blocks, (KVGroup(SPEC, layout),))


def memory_of(arena: KVArena) -> torch.Tensor:
    return torch.zeros(arena.num_bytes, dtype=torch.uint8)


def test_every_tensor_of_a_block_has_bytes_of_its_own_inside_the_block() -> None:
    arena = arena_of(3)
    memory = memory_of(arena)
    views = [view for tensors in state_views(arena, 0, memory) for view in tensors.values()]
    assert [(view.shape, view.dtype) for view in views[:2]] == [
        ((3, 5, 3), torch.bfloat16),
        ((3, 2, 3, 4), torch.float32),
    ]
    owned: set[int] = set()
    for view in views:
        for block in range(3):
            memory.zero_()
            view[block] = 1.0
            touched = set(memory.nonzero().flatten().tolist())
            assert touched
            assert not touched & owned
            assert {byte // arena.slab_bytes for byte in touched} == {block}
            assert view[block].data_ptr() % ALIGNMENT == memory.data_ptr() % ALIGNMENT
            owned |= touched


def test_another_layout_than_cores_is_an_error() -> None:
    size = 2 * state_layout(SPEC).block_bytes
    arena = KVArena(size, 3, (KVGroup(SPEC, KVLayout(size, ("byte",), (size,), "uint8")),))
    with pytest.raises(AssertionError, match="states are stored as"):
        state_views(arena, 0, memory_of(arena))


def batch_of(num_computed: list[int], num_tokens: list[int]) -> StateBatch:
    """Build the state batch of requests whose block i has the id 100 * request + i + 1."""
    state = BatchState(len(num_computed), arena_of(1).groups)
    for request, tokens in enumerate(zip(num_computed, num_tokens, strict=True)):
        blocks = [100 * request + i + 1 for i in range(-(-sum(tokens) // BLOCK_SIZE))]
        state.start(RequestStart(request, [7] * sum(tokens), sum(tokens), (blocks,), SamplingParams(), 0))
    plan = StepPlan(
        step=0,
        request_ids=list(range(len(num_computed))),
        num_computed=num_computed,
        num_tokens=num_tokens,
        samples=[False] * len(num_computed),
    )
    batch = state.batch(plan)
    assert not batch.attention
    return batch.states[0]


def test_a_step_reads_the_block_of_the_last_token_and_writes_that_of_the_newest() -> None:
    batch = batch_of([0, 3, 8, 15, 16], [20, 1, 1, 2, 24])
    assert batch.starts_fresh.tolist() == [True, False, False, False, False]
    assert batch.read_blocks[1:].tolist() == [101, 201, 302, 402]
    assert batch.write_blocks.tolist() == [3, 101, 202, 303, 405]
    assert batch.query_start.tolist() == [0, 20, 21, 22, 24, 48]


@st.composite
def steps(draw: st.DrawFn) -> Iterator[tuple[list[int], list[int]]]:
    size = draw(st.integers(1, 6))
    lists = st.lists(st.integers(1, 5), min_size=size, max_size=size)
    return draw(st.lists(st.sampled_from([0, 0, 3, 8]), min_size=size, max_size=size)), draw(lists)  # type: ignore[return-value]


@given(steps())
def test_each_token_runs_once_beside_requests_of_its_kind(step: tuple[list[int], list[int]]) -> None:
    num_computed, num_tokens = step
    starts = np.cumsum([0, *num_tokens]).tolist()
    rows = StateMemory().step({0: batch_of(num_computed, num_tokens)}, "cpu").rows
    spans = {starts[i]: (num_tokens[i], num_computed[i] == 0) for i in range(len(num_tokens))}
    seen = []
    for together in rows:
        for tokens in together.tokens.tolist():
            assert (len(tokens), together.fresh) == spans[tokens[0]]
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            seen += tokens
    assert sorted(seen) == list(range(starts[-1]))
    assert len(rows) == len({*spans.values()})


def test_states_move_from_the_block_read_to_the_block_written_and_others_stay() -> None:
    arena = arena_of(6)
    memory = memory_of(arena)
    states = StateMemory()
    states.bind(arena, 0, memory)
    kept = state_views(arena, 0, memory)[1]  # layer 4
    for block in range(6):
        kept["conv"][block], kept["recurrent"][block] = float(block), block + 0.5
    batch = StateBatch(
        read_blocks=np.array([1, 4]),
        write_blocks=np.array([2, 4]),
        starts_fresh=np.array([False, False]),
        query_start=np.array([0, 1, 2], dtype=np.int32),
    )
    step = states.step({0: batch}, "cpu")
    read = step.read(4, 0)
    assert read["conv"][:, 0, 0].tolist() == [1.0, 4.0]
    assert read["recurrent"].dtype == torch.float32
    read["recurrent"] += 10
    assert kept["recurrent"][:, 0, 0, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], "what is read is a copy"
    step.write(4, 0, {"conv": read["conv"].float() + 20, "recurrent": read["recurrent"]})
    assert kept["recurrent"][:, 1, 2, 3].tolist() == [0.5, 1.5, 11.5, 3.5, 14.5, 5.5]
    assert kept["conv"][:, 4, 2].tolist() == [0.0, 1.0, 21.0, 3.0, 24.0, 5.0]
    assert not step.read(1, 0)["conv"].any(), "another layer's states stay as they were"
