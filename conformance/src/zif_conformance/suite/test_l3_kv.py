"""L3: a device under core's block manager: requests come, grow, share, leave and return, and every answer is right.

A small model of serving without a model: keys and values are functions of a token's place and its history's hash, so
that whoever computes them gets the same ones, and prefix hits are real.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from zif.contract import (
    AttentionBatch,
    Buffer,
    Capabilities,
    Device,
    Feature,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    RecurrentStateSpec,
    Request,
    SamplingParams,
    SlidingWindowSpec,
    StateTensor,
    slab_arena,
)
from zif.errors import OutOfMemoryError
from zif.kv import PagedBlockManager
from zif.reference.state import state_views
from zif_conformance.gates import GateResult, exact, hold, ratio
from zif_conformance.marks import Safety, cases, conforms, exercises
from zif_conformance.oracle.attention_cases import fitted
from zif_conformance.oracle.inputs import torch_dtype
from zif_conformance.oracle.paged import NAN_BYTE
from zif_conformance.oracle.sequences import AttentionCase, Sequence, Sequences
from zif_conformance.subject import Subject

DTYPES = ("float32", "bfloat16", "float16")
TAG = "conformance.serving"
CHUNK = 24
WINDOW = 40

by_dtype = pytest.mark.parametrize("dtype", cases("dtype", *DTYPES))
GROUPS = pytest.mark.parametrize(
    "windows",
    [
        pytest.param((None,), marks=exercises(Feature.ATTENTION_FULL), id="full"),
        pytest.param((WINDOW,), marks=exercises(Feature.ATTENTION_SLIDING_WINDOW), id="window"),
        pytest.param(
            (None, WINDOW), marks=exercises(Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW), id="both"
        ),
    ],
)


@dataclass(slots=True)
class Serving:
    """A device's arena under a block manager. `windows` are the layer groups, None for full attention."""

    device: Device
    case: AttentionCase
    windows: tuple[int | None, ...]
    num_blocks: int = 40
    poisons: bool = True
    live: dict[int, Request] = field(default_factory=dict)
    checked: list[GateResult] = field(default_factory=list)
    arena: KVArena = field(init=False)
    buffer: Buffer[torch.Tensor] = field(init=False)
    caches: list[object] = field(init=False)
    blocks: PagedBlockManager = field(init=False)

    def __enter__(self) -> "Serving":
        shape = (self.case.num_kv_heads, self.case.head_dim, self.case.block_size, self.case.stored)
        specs = [
            FullAttentionSpec((index,), *shape)
            if window is None
            else SlidingWindowSpec((index,), *shape, window=window)
            for index, window in enumerate(self.windows)
        ]
        attention = self.device.attention
        groups = [KVGroup(spec, attention.kv_layout(spec)) for spec in specs]
        self.arena = slab_arena(self.num_blocks * sum(group.layout.block_bytes for group in groups), groups)
        self.buffer = self.device.allocator.allocate(self.arena.num_bytes, TAG)
        self.buffer.array.fill_(NAN_BYTE)
        self.caches = [attention.bind(self.arena, index, self.buffer.array)[0] for index in range(len(groups))]
        self.blocks = PagedBlockManager(self.arena, enable_prefix_caching=True, max_step_tokens=CHUNK)
        return self

    def __exit__(self, *_: object) -> None:
        self.device.allocator.free(self.buffer)

    def admit(self, request_id: int, token_ids: list[int]) -> int:
        """Begin a request. Returns how many of its tokens were found computed."""
        request = Request(request_id, list(token_ids), len(token_ids), SamplingParams(), len(token_ids) + 1000)
        self.live[request_id] = request
        self.blocks.begin(request)
        return request.num_computed_tokens

    def step(self, *request_ids: int, chunk: int = CHUNK) -> bool:
        """Compute the next tokens of some requests together and check every row. False: no room, nothing done."""
        spans = {
            i: (r.num_computed_tokens, min(r.num_computed_tokens + chunk, r.num_tokens))
            for i, r in self._named(request_ids)
        }
        for request_id, (_, end) in spans.items():
            if not self.blocks.reserve(self.live[request_id], end):
                return False
        for group in range(len(self.windows)):
            self._check(group, spans)
        for request_id, (_, end) in spans.items():
            self.live[request_id].num_computed_tokens = end
            before = self._owned(self.live[request_id])
            self.blocks.commit(self.live[request_id])
            self._poison_freed(before)
        self.blocks.check_integrity(list(self.live.values()))
        return True

    def finish(self, request_id: int) -> None:
        """Compute what is left of one request."""
        request = self.live[request_id]
        while request.num_computed_tokens < request.num_tokens:
            assert self.step(request_id), f"no room for request {request_id}"

    def leave(self, request_id: int) -> None:
        """Release a request."""
        self.blocks.release(self.live.pop(request_id))
        self.blocks.check_integrity(list(self.live.values()))

    def preempt(self, request_id: int) -> None:
        """Take all blocks from a request, fill what nobody can find again with NaN, and begin it anew."""
        request = self.live[request_id]
        self.blocks.suspend(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.blocks.begin(request)

    def _named(self, request_ids: tuple[int, ...]) -> Iterator[tuple[int, Request]]:
        yield from ((request_id, self.live[request_id]) for request_id in request_ids)

    def _owned(self, request: Request) -> list[set[int]]:
        return [set(filter(None, blocks)) for blocks in request.block_ids]

    def _poison_freed(self, before: list[set[int]]) -> None:
        """Fill blocks that a window has left behind, and that nobody else holds or finds, with NaN."""
        if not self.poisons:
            return
        self.blocks.reset_prefix_cache()
        held = [set[int]().union(*(self._owned(r)[g] for r in self.live.values())) for g in range(len(self.windows))]
        for group, (owned, kept) in enumerate(zip(before, held, strict=True)):
            size = self.arena.groups[group].layout.block_bytes
            for block in owned - kept:
                self.buffer.array[block * size : (block + 1) * size].fill_(NAN_BYTE)

    def _check(self, group: int, spans: dict[int, tuple[int, int]]) -> None:
        """Write and attend on the device, and compare with float64 over the whole sequences."""
        window = self.windows[group]
        found = [_sequence(self.case, group, self.live[i].token_ids[:end], first) for i, (first, end) in spans.items()]
        prepared = self.device.attention.prepare(self._batch(group, spans))
        place, cache = self.device.array_device, self.caches[group]
        fresh = [(s.key[-len(s.query) :], s.value[-len(s.query) :]) for s in found]
        key, value = (torch.cat(parts).to(place) for parts in zip(*fresh, strict=True))
        self.device.attention.write(key, value, cache, prepared)
        requests = tuple((len(s.query), len(s.key)) for s in found)
        truth = Sequences.of(replace(self.case, requests=requests, window=window), found)
        got = self.device.attention.attend(torch.cat([s.query for s in found]).to(place), cache, prepared, truth.params)
        self.device.synchronize()
        declared = [run.flatten(1) for run in truth.declared()]
        result = ratio(
            got.cpu().flatten(1), truth.exact().flatten(1), declared, f"group {group}, requests {list(spans)}"
        )
        assert result.passed, result.message
        self.checked.append(result)

    def _batch(self, group: int, spans: dict[int, tuple[int, int]]) -> AttentionBatch:
        size = self.case.block_size
        tables = [self.live[i].block_ids[group] for i in spans]
        table = np.zeros((len(spans), max(map(len, tables))), dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        positions = [np.arange(*span) for span in spans.values()]
        slots = [table[row, p // size].astype(np.int64) * size + p % size for row, p in enumerate(positions)]
        return AttentionBatch(
            query_start=np.cumsum([0, *map(len, positions)]).astype(np.int32),
            seq_lens=np.array([end for _, end in spans.values()], dtype=np.int32),
            block_table=table,
            slots=np.concatenate(slots),
            block_size=size,
            window=self.windows[group],
            group=group,
        )


@conforms(level="L3", gate="G3", clause=("7.1", "7.6", "8.3", "8.4"), deadline_s=120)
@by_dtype
@GROUPS
@pytest.mark.parametrize("seed", [0, 1])
def test_random_traffic(
    device: Device, capabilities: Capabilities, dtype: str, windows: Any, seed: int, record_gate: Any
) -> None:
    """Requests of shared prompts come, compute in chunks, append tokens, are preempted, leave, and hit prefixes."""
    draw, case = np.random.default_rng(seed), _case(capabilities, dtype)
    prompts = [draw.integers(0, 1000, max(70, 2 * case.block_size + 6)).tolist() for _ in range(2)]
    with Serving(device, case, windows, poisons=False) as serving:
        hits = sum(_act(serving, draw, prompts, number) for number in range(160))
        assert hits, "the traffic hit no prefix"
        assert len(serving.checked) > 30, "the traffic computed next to nothing"
        for request_id in sorted(serving.live):
            serving.leave(request_id)
        assert sum(usage.num_owned for usage in serving.blocks.usage()) == 0
        hold(record_gate, max(serving.checked, key=lambda result: result.measured / result.limit))


@conforms(level="L3", gate="G3", clause=("7.4", "7.6", "8.3"), negative=True, safety=Safety.MEMORY, deadline_s=120)
@by_dtype
@GROUPS
def test_blocks_that_were_given_back_are_never_read(
    device: Device, capabilities: Capabilities, dtype: str, windows: Any, record_gate: Any
) -> None:
    """Every block that a window has passed, or a request has left, is NaN at once."""
    case = _case(capabilities, dtype)
    with Serving(device, case, windows) as serving:
        for request_id in range(6):
            serving.admit(request_id, [request_id, *range(max(90, 3 * case.block_size))])
            serving.step(request_id)
            if request_id % 2:
                serving.finish(request_id - 1)
                before = serving._owned(serving.live[request_id - 1])
                serving.leave(request_id - 1)
                serving._poison_freed(before)
        hold(record_gate, max(serving.checked, key=lambda result: result.measured / result.limit))


@conforms(level="L3", gate="G3", clause=("8.3", "8.4"), claims=(Feature.ATTENTION_FULL, Feature.PREFIX_CACHING))
@by_dtype
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [1, 2])
def test_prefix_hit_at_block_borders(
    device: Device, capabilities: Capabilities, dtype: str, blocks: int, offset: int
) -> None:
    """A request whose first tokens are found computed goes on from there, also where the hit ends inside its prompt."""
    case = _case(capabilities, dtype)
    shared = blocks * case.block_size + offset
    with Serving(device, case, (None,), poisons=False) as serving:
        serving.admit(0, list(range(4 * case.block_size)))
        serving.finish(0)
        hit = serving.admit(1, [*range(shared), *range(5000, 5020)])
        assert hit == shared // case.block_size * case.block_size
        serving.finish(1)


@conforms(level="L3", clause=("6.2", "7.1"), negative=True, claims=(Feature.ATTENTION_FULL,))
def test_full_arena_refuses_and_serves_again(device: Device, capabilities: Capabilities) -> None:
    with Serving(device, _case(capabilities, capabilities.dtypes[0].storage), (None,), num_blocks=8) as serving:
        size = serving.case.block_size
        serving.admit(0, list(range(5 * size)))
        serving.finish(0)
        serving.admit(1, list(range(9000, 9000 + 5 * size)))
        while serving.step(1, chunk=size):
            pass
        assert serving.live[1].num_computed_tokens < 5 * size, "more blocks were used than the arena has"
        serving.leave(0)
        serving.finish(1)


@conforms(level="L3", clause=("6.2", "6.3"), negative=True, claims=(Feature.ATTENTION_FULL,))
def test_an_arena_beyond_the_limit_is_refused_and_a_smaller_one_served(
    subject: Subject, capabilities: Capabilities
) -> None:
    case = _case(capabilities, capabilities.dtypes[0].storage)
    with subject.opened(replace(subject.workload(), memory_limit_bytes=32 << 20)) as device:
        with pytest.raises(OutOfMemoryError), Serving(device, case, (None,), num_blocks=1 << 16):
            pass
        assert device.allocator.stats().allocated_bytes == 0
        with Serving(device, case, (None,)) as serving:
            serving.admit(0, list(range(50)))
            serving.finish(0)


@conforms(level="L3", gate="G3", clause=("8.4", "10.3"), negative=True, claims=(Feature.ATTENTION_FULL,))
@by_dtype
def test_preempted_requests_give_the_same_rows(device: Device, capabilities: Capabilities, dtype: str) -> None:
    with Serving(device, _case(capabilities, dtype), (None,)) as serving:
        for request_id in (0, 1):
            serving.admit(request_id, [request_id, *range(60)])
        for _ in range(3):
            serving.step(0, 1, chunk=7)
            serving.preempt(0)
        serving.finish(0)
        serving.finish(1)


@conforms(level="L3", gate="G1", clause="7.5", claims=(Feature.STATE_RECURRENT,), safety=Safety.MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_have_bytes_of_their_own(
    device: Device, capabilities: Capabilities, dtype: str, record_gate: Any
) -> None:
    """Every tensor of every block is written with a number of its own and read back, by moves within the arena, too."""
    with _States(device, capabilities, dtype) as states:
        views = [view for layer in states.views for view in layer.values()]
        for number, view in enumerate(views):
            for block in range(1, len(view)):
                view[block] = float(number * 8 + block)
        device.synchronize()
        for number, view in enumerate(views):
            view[1] = view[2]
            for block, wanted in ((1, 2), (2, 2), (3, 3)):
                expected = torch.full(view.shape[1:], float(number * 8 + wanted), dtype=view.dtype)
                hold(record_gate, exact(view[block], expected, f"tensor {number}, block {block}"))


@conforms(
    level="L3", gate="G1", clause=("7.2", "7.5"), claims=(Feature.STATE_RECURRENT,), negative=True, safety=Safety.MEMORY
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_written_changes_no_other(
    device: Device, capabilities: Capabilities, dtype: str, record_gate: Any
) -> None:
    with _States(device, capabilities, dtype) as states:
        owned = torch.zeros_like(states.memory, dtype=torch.int32)
        for layer in states.views:
            for view in layer.values():
                for block in range(len(view)):
                    states.memory.zero_()
                    view[block].view(torch.uint8).fill_(0xFF)
                    owned += states.memory != 0
        hold(record_gate, GateResult("G1", float((owned > 1).sum()), 0.0, "bytes that belong to two states"))


class _States:
    """An arena of recurrent states on a device. Use as a context."""

    def __init__(self, device: Device, capabilities: Capabilities, dtype: str) -> None:
        tensors = (StateTensor("conv", (5, 3), dtype), StateTensor("recurrent", (2, 3, 4), "float32"))
        spec = RecurrentStateSpec((1, 4), tensors, capabilities.block_sizes[0], "float32")
        layout = device.attention.kv_layout(spec)
        self._device = device
        self._arena = KVArena(layout.block_bytes, 4, (KVGroup(spec, layout),))

    def __enter__(self) -> "_States":
        self._buffer = self._device.allocator.allocate(self._arena.num_bytes, TAG)
        self.memory = self._buffer.array
        self.views = state_views(self._arena, 0, self.memory)
        return self

    def __exit__(self, *_: object) -> None:
        self._device.allocator.free(self._buffer)


def _act(serving: Serving, draw: np.random.Generator, prompts: list[list[int]], number: int) -> int:
    """Do one random thing. Returns how many tokens a new request found computed."""
    action = draw.integers(0, 8)
    chosen = [int(i) for i in draw.permutation(sorted(serving.live))]
    unfinished = [i for i in chosen if serving.live[i].num_computed_tokens < serving.live[i].num_tokens]
    if len(chosen) < 2 or (action == 0 and len(chosen) < 5):
        prompt = prompts[int(draw.integers(0, len(prompts)))]
        cut = int(draw.integers(1, len(prompt)))
        return serving.admit(number, prompt[:cut] + draw.integers(0, 1000, 3).tolist())
    if action == 1:
        serving.leave(chosen[0])
    elif action == 2:
        serving.preempt(chosen[0])
    elif action == 3:
        serving.live[chosen[0]].token_ids += draw.integers(0, 1000, int(draw.integers(1, 4))).tolist()
    elif unfinished and not serving.step(
        *unfinished[:3], chunk=int(draw.integers(1, max(CHUNK, serving.case.block_size)))
    ):
        serving.leave(chosen[-1])
    return 0


def _case(capabilities: Capabilities, dtype: str) -> AttentionCase:
    case = fitted(AttentionCase(((1, 1),), dtype=dtype, head_dim=32), capabilities)
    return replace(case, kv_dtype=dtype if dtype in capabilities.kv_dtypes else capabilities.kv_dtypes[0])


def _sequence(case: AttentionCase, group: int, token_ids: list[int], first: int) -> Sequence:
    """Make the queries from `first` on, and all keys and values, of a history of tokens."""
    rows = [_row(case, group, token_ids[: position + 1]) for position in range(len(token_ids))]
    heads = torch.stack(rows).to(torch_dtype(case.dtype))
    query, key, value = torch.split(heads, [case.num_heads, case.num_kv_heads, case.num_kv_heads], dim=1)
    return Sequence(query[first:], key, value)


def _row(case: AttentionCase, group: int, history: list[int]) -> torch.Tensor:
    """Return query, key and value heads of a token: a function of the group and all tokens up to it."""
    digest = hashlib.blake2b(np.array([group, *history], dtype=np.int64).tobytes(), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(digest, "little"))
    size = (case.num_heads + 2 * case.num_kv_heads, case.head_dim)
    return torch.from_numpy(draw.standard_normal(size, dtype=np.float32))
