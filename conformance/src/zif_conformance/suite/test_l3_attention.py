"""L3: paged attention: every claimed kind, dtype, block size, head size and group size, at the borders of blocks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from zif.contract import Capabilities, Device, Feature, Refusal
from zif_conformance.gates import GateResult, borders, exact, hold, ratio, scaling
from zif_conformance.marks import Safety, cases, conforms, exercises
from zif_conformance.oracle.attention_cases import KINDS, Kind, fitted, needle_case, prove_needles, prove_stairs
from zif_conformance.oracle.attention_checks import changed_bytes, judge, judge_sequences
from zif_conformance.oracle.codes import CODED
from zif_conformance.oracle.paged import PagedStep, Span, spec_of
from zif_conformance.oracle.sequences import AttentionCase, Sequences
from zif_conformance.subject import Subject

DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HEAD_SIZES = (1, 8, 16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 512)
MIXED = ((1, 1), (5, 5), (1, 40), (16, 48), (7, 33), (1, 17), (33, 70), (1, 16), (2, 18))
NEEDLE_LENGTHS = (17, 300)
LONG = 4096
STAIRS = AttentionCase(((4, 4), (3, 16), (4, 17), (2, 50), (4, 130)))

# The proof, made when this file is collected.
PROOFS = [prove_needles(*needle_case(kind, dtype, n)) for kind in KINDS for dtype in DTYPES for n in NEEDLE_LENGTHS]
PROOFS += [
    prove_stairs(replace(STAIRS, requests=(request,), dtype=dtype)) for request in STAIRS.requests for dtype in DTYPES
]

by_dtype = pytest.mark.parametrize("dtype", cases("dtype", *DTYPES))
by_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=exercises(*kind.features), id=kind.name) for kind in KINDS]
)
FULL = KINDS[0]


@conforms(level="L3", gate="G5", clause=("8.1", "8.2", "8.3", "8.5"))
@by_dtype
@by_kind
@pytest.mark.parametrize("block", cases("block_size", *BLOCK_SIZES))
def test_block_borders(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, block: int, record_gate: Any
) -> None:
    lengths = borders(block, max(2 * block + 2, 40))
    case = kind.of(AttentionCase(tuple((1, n) for n in lengths), dtype=dtype, block_size=block))
    results = _rows(device, replace(fitted(case, capabilities), block_size=block))
    hold(record_gate, *results, scaling(dict(zip(lengths, results, strict=True))))


@conforms(level="L3", gate="G3", clause=("8.3", "9.3"))
@by_dtype
@by_kind
def test_prompts_chunks_and_single_tokens_in_one_step(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    hold(record_gate, judge(device, fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities)))


@conforms(level="L3", gate="G3", clause="8.3")
@by_dtype
@by_kind
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 8), (2, 3), (4, 1), (3, 7), (8, 2)])
def test_group_ratios(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, kv_heads: int, group: int, record_gate: Any
) -> None:
    case = AttentionCase(((1, 37), (5, 21), (9, 9)), dtype=dtype, num_kv_heads=kv_heads, group_size=group)
    hold(record_gate, judge(device, fitted(kind.of(case), capabilities)))


@conforms(
    level="L3", gate="G3", clause="8.3", negative=True, claims=(Feature.ATTENTION_FULL, Feature.ATTENTION_SOFTCAP)
)
@by_dtype
@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
def test_small_soft_caps(
    device: Device, capabilities: Capabilities, dtype: str, softcap: float, record_gate: Any
) -> None:
    """A hidden key that is capped after it was masked has a score of minus the cap: near all others."""
    case = replace(fitted(AttentionCase(MIXED, dtype=dtype), capabilities), softcap=softcap)
    hold(record_gate, judge(device, case))


@conforms(level="L3", gate="G3", clause="8.3", claims=(Feature.ATTENTION_FULL,))
@by_dtype
@pytest.mark.parametrize("size", cases("head_size", *HEAD_SIZES))
def test_head_sizes(device: Device, capabilities: Capabilities, dtype: str, size: int, record_gate: Any) -> None:
    case = fitted(AttentionCase(((1, 37), (5, 21), (9, 9)), dtype=dtype), capabilities)
    hold(record_gate, judge(device, replace(case, head_dim=size)))


@conforms(level="L3", gate="G3", clause="8.3", claims=(Feature.ATTENTION_FULL,))
@by_dtype
@pytest.mark.parametrize("kv_dtype", cases("kv_dtype", *DTYPES))
def test_cache_dtypes(device: Device, capabilities: Capabilities, dtype: str, kv_dtype: str, record_gate: Any) -> None:
    hold(record_gate, judge(device, fitted(AttentionCase(MIXED, dtype=dtype, kv_dtype=kv_dtype), capabilities)))


@conforms(level="L3", gate="G5", clause="8.3", claims=(Feature.ATTENTION_FULL,))
@by_dtype
def test_error_grows_slowly_with_the_length(
    device: Device, capabilities: Capabilities, dtype: str, record_gate: Any
) -> None:
    lengths = (16, 64, 256, 1024, 4096)
    case = fitted(AttentionCase(tuple((1, n) for n in lengths), dtype=dtype), capabilities)
    hold(record_gate, scaling(dict(zip(lengths, _rows(device, case), strict=True))))


@conforms(level="L3", gate="G0", clause=("8.2", "8.3"))
@by_dtype
@by_kind
@pytest.mark.parametrize("length", NEEDLE_LENGTHS)
def test_needle(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, length: int, record_gate: Any
) -> None:
    case, targets = needle_case(kind, dtype, length)
    hold(record_gate, judge_sequences(device, Sequences.needles(fitted(case, capabilities), targets), "G0"))


@conforms(level="L3", gate="G0", clause="8.3", claims=(Feature.ATTENTION_FULL,))
@by_dtype
def test_needle_in_a_long_sequence(device: Device, capabilities: Capabilities, dtype: str, record_gate: Any) -> None:
    case, targets = needle_case(FULL, dtype, LONG)
    hold(record_gate, judge_sequences(device, Sequences.needles(fitted(case, capabilities), targets), "G0"))


@conforms(level="L3", gate="G0", clause="8.3", negative=True)
@by_dtype
@by_kind
def test_no_row_sees_the_next_token(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    """Each key of a chunk fits better than those before it: a mask that is off by one gives a wrong value."""
    sequences = Sequences.stairs(fitted(kind.of(replace(STAIRS, dtype=dtype)), capabilities))
    hold(record_gate, judge_sequences(device, sequences, "G0"))


@conforms(level="L3", gate="G1", clause="8.4", negative=True)
@by_dtype
@by_kind
def test_block_ids_do_not_matter(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    sequences = Sequences.random(fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities))
    outputs = []
    for seed in range(3):
        with PagedStep(device, sequences, seed) as step:
            outputs.append(step.run())
    for other in outputs[1:]:
        hold(record_gate, exact(other, outputs[0], "results under another order of blocks"))


@conforms(level="L3", gate="G1", clause=("7.2", "7.6", "8.3"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_kind
@pytest.mark.parametrize("poison", [0.0, 1e4, float("inf")])
def test_blocks_of_others_do_not_matter(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, poison: float, record_gate: Any
) -> None:
    """NaN, where the first run had it, against another poison: in the null block, free blocks, other layers, tails."""
    sequences = Sequences.random(fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities))
    with PagedStep(device, sequences) as step:
        wanted = step.run()
        assert not wanted.isnan().any(), "NaN outside the visible keys reached the result"
        step.elements.masked_fill_(step.elements.isnan(), poison)
        hold(record_gate, exact(step.attend(), wanted, f"results with {poison} in unused memory"))


@conforms(level="L3", gate="G1", clause="8.3", negative=True, safety=Safety.MEMORY)
@by_dtype
@by_kind
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, -(2**31)])
def test_unused_table_entries_do_not_matter(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, garbage: int, record_gate: Any
) -> None:
    sequences = Sequences.random(fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities))
    with PagedStep(device, sequences) as step:
        wanted = step.run()
        for row, (length, seq_len) in enumerate(step.case.requests):
            step.table[row, -(-seq_len // step.case.block_size) :] = garbage
            step.table[row, : step.case.first_visible(seq_len - length) // step.case.block_size] = garbage
        hold(record_gate, exact(step.attend(), wanted, f"results with {garbage} in unused entries"))


@conforms(level="L3", gate="G1", clause="8.2", negative=True, safety=Safety.MEMORY, claims=(Feature.ATTENTION_FULL,))
@pytest.mark.parametrize("kv_dtype", cases("kv_dtype", *DTYPES))
@pytest.mark.parametrize("block", cases("block_size", *BLOCK_SIZES))
def test_write_changes_the_named_slots_only(
    device: Device, capabilities: Capabilities, kv_dtype: str, block: int, record_gate: Any
) -> None:
    """Each token's slot has bytes of its own: as many as its keys and values need, in its own block and layer."""
    case = AttentionCase(((1, 2 * block + 1), (1, block)), dtype=kv_dtype)
    case = replace(fitted(case, capabilities), block_size=block)
    token_bytes = 2 * case.num_kv_heads * case.head_dim * Sequences.random(case).requests[0].key.itemsize
    places = [(0, 0), (0, block - 1), (0, block), (0, 2 * block), (1, 0), (1, block - 1)]
    with PagedStep(device, Sequences.random(case)) as step:
        owned = torch.zeros_like(step.memory, dtype=torch.int32)
        for request, position in dict.fromkeys(places):
            changed = changed_bytes(step, Span(request, position, position + 1))
            block_id = int(step.table[request, position // block])
            touched = changed.view(step.arena.num_slabs, -1).any(-1).nonzero().flatten().tolist()
            assert touched == [block_id], f"token {position} of request {request} went to blocks {touched}"
            got = torch.tensor([int(changed.sum())])
            hold(record_gate, exact(got, torch.tensor([token_bytes]), f"bytes of token {position}"))
            owned += changed
    hold(record_gate, GateResult("G1", float((owned > 1).sum()), 0.0, "bytes shared by two slots"))


@conforms(level="L3", gate="G1", clause=("8.2", "9.2"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_kind
def test_attend_changes_no_memory(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    with PagedStep(device, Sequences.random(fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities))) as step:
        first = step.run()
        before = step.memory.cpu().clone()
        second = step.attend()
        hold(record_gate, exact(step.memory, before, "the arena"), exact(second, first, "the same step again"))


@conforms(level="L3", gate="G1", clause="8.2", negative=True, claims=FULL.features)
@by_dtype
def test_layers_keep_apart(device: Device, capabilities: Capabilities, dtype: str, record_gate: Any) -> None:
    case = fitted(AttentionCase(MIXED, dtype=dtype), capabilities)
    with PagedStep(device, Sequences.random(case)) as step:
        first, own, caches = step.run(), step.sequences, step.caches
        step.sequences = Sequences.random(replace(case, seed=case.seed + 1))
        for other in (caches[0], caches[-1]):
            step.caches = [other] * len(caches)
            step.write([Span(row, 0, seq_len) for row, (_, seq_len) in enumerate(case.requests)])
        step.sequences, step.caches = own, caches
        hold(record_gate, exact(step.attend(), first, "one layer after others were written"))


@conforms(level="L3", gate="G6", clause="8.6", negative=True)
@by_dtype
@by_kind
@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_nan_stays_in_its_request(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, what: str, record_gate: Any
) -> None:
    case = fitted(kind.of(AttentionCase(MIXED, dtype=dtype)), capabilities)
    starts = np.cumsum([0, *(length for length, _ in case.requests)])
    for sick in (2, 3):
        clean, dirty = Sequences.random(case), Sequences.random(case)
        getattr(dirty.requests[sick], what)[-1] = torch.nan
        outputs = []
        for sequences in (clean, dirty):
            with PagedStep(device, sequences) as step:
                outputs.append(step.run())
        own = np.arange(starts[sick], starts[sick + 1])
        others = np.setdiff1d(np.arange(starts[-1]), own)
        hold(record_gate, exact(outputs[1][others], outputs[0][others], "rows of other requests"))
        assert outputs[1][own[-1]].isnan().all(), f"NaN in the {what} of a token was swallowed"


@conforms(level="L3", gate="G3", clause="8.4", claims=(Feature.ATTENTION_FULL, Feature.PREFIX_CACHING))
@by_dtype
def test_requests_share_blocks(device: Device, capabilities: Capabilities, dtype: str, record_gate: Any) -> None:
    case = fitted(AttentionCase(((1, 40), (8, 40), (1, 33)), dtype=dtype), capabilities)
    sequences = Sequences.random(case)
    shared = 32 // case.block_size * case.block_size
    for other in sequences.requests[1:]:
        other.key[:shared], other.value[:shared] = (
            sequences.requests[0].key[:shared],
            sequences.requests[0].value[:shared],
        )
    with PagedStep(device, sequences) as step:
        step.table[1:, : shared // case.block_size] = step.table[0, : shared // case.block_size]
        got = step.run()
    hold(
        record_gate,
        ratio(got.flatten(1), sequences.exact().flatten(1), [run.flatten(1) for run in sequences.declared()], "shared"),
    )


@conforms(level="L3", gate="G3", clause=("7.1", "8.4"), claims=(Feature.ATTENTION_FULL,), safety=Safety.MEMORY)
def test_addresses_beyond_32_bits(
    device: Device, capabilities: Capabilities, subject: Subject, record_gate: Any
) -> None:
    """Block ids whose elements lie beyond 2**31, as far as the device's memory goes; only a few pages are touched."""
    case = fitted(AttentionCase(((1, 20), (5, 40)), dtype=capabilities.dtypes[-1].storage), capabilities)
    case = replace(case, kv_dtype=case.dtype if case.dtype in capabilities.kv_dtypes else capabilities.kv_dtypes[-1])
    wanted = 5 << 30
    num_bytes = min(wanted, device.plan.memory.available_bytes // 4)
    with PagedStep(device, Sequences.random(case), far_bytes=num_bytes) as step:
        got = step.run()
        sequences = step.sequences
    hold(
        record_gate,
        ratio(got.flatten(1), sequences.exact().flatten(1), [run.flatten(1) for run in sequences.declared()], "far"),
    )


@conforms(level="L3", gate="G1", clause=("7.3", "7.9"))
@by_kind
@pytest.mark.parametrize("kv_dtype", cases("kv_dtype", *DTYPES, CODED))
@pytest.mark.parametrize("layers", [1, 3, 7])
def test_layout_is_what_it_says(
    device: Device, capabilities: Capabilities, kind: Kind, kv_dtype: str, layers: int
) -> None:
    case = fitted(kind.of(AttentionCase(((1, 1),), dtype=kv_dtype)), capabilities)
    before = device.allocator.stats()
    layout = device.attention.kv_layout(spec_of(case, tuple(range(layers))))
    assert device.allocator.stats() == before, "kv_layout must not allocate"
    itemsize = torch.empty(0, dtype=getattr(torch, layout.dtype)).itemsize
    assert layout.block_bytes == int(np.prod(layout.shape)) * itemsize, layout
    assert len(layout.axes) == len(layout.shape), layout
    num_vectors = layers * 2 * case.num_kv_heads * case.block_size
    vector_bytes = case.head_dim * torch.empty(0, dtype=getattr(torch, kv_dtype)).itemsize
    scale_bytes = 4 if kv_dtype == CODED else 0
    assert layout.block_bytes >= num_vectors * (vector_bytes + scale_bytes), layout


@conforms(level="L3", clause=("3.4", "4.3"), negative=True)
@pytest.mark.parametrize("field", ["block_size", "head_dim", "kv_dtype", "dtype"])
def test_what_is_not_claimed_is_refused(subject: Subject, capabilities: Capabilities, field: str) -> None:
    """At plan time, with a reason that names the value: never a fallback."""
    case = fitted(AttentionCase(((1, 1),), dtype=capabilities.dtypes[0].storage), capabilities)
    case = replace(case, kv_dtype=capabilities.kv_dtypes[0])
    workload = subject.workload()
    head_dim = case.head_dim
    value: object = "complex128"
    if field == "dtype":
        workload = replace(workload, dtype="complex128")
    elif field == "kv_dtype":
        case = replace(case, kv_dtype="complex128")
    elif field == "head_dim":
        value = head_dim = max((capabilities.max_head_size, *capabilities.head_sizes)) + 1
        case = replace(case, head_dim=head_dim)
    else:
        value = max(capabilities.block_sizes) * 2 + 1
        case = replace(case, block_size=int(str(value)))
    answer = subject.platform.plan(replace(workload, kv_specs=(spec_of(case),), head_sizes=(head_dim,)))
    assert isinstance(answer, Refusal), f"{field}={value!r} is not claimed, yet it was planned"
    assert any(str(value) in reason for reason in answer.reasons), answer.reasons


def _rows(device: Device, case: AttentionCase) -> list[GateResult]:
    """Judge a step of single tokens request by request."""
    sequences = Sequences.random(case)
    with PagedStep(device, sequences) as step:
        got = step.run()
    wanted, declared = sequences.exact(), sequences.declared()
    return [
        ratio(
            got[row].reshape(1, -1),
            wanted[row].reshape(1, -1),
            [run[row].reshape(1, -1) for run in declared],
            f"length {length}",
        )
        for row, (_, length) in enumerate(case.requests)
    ]
