"""L3: keys and values held as codes of 8 bits: what is written, what is read back, and that vectors stand alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from zif.contract import Capabilities, Device, Feature
from zif_conformance.gates import GateResult, exact, hold, ratio, ulp
from zif_conformance.marks import Safety, cases, conforms, exercises
from zif_conformance.oracle.attention_cases import KINDS, Kind, fitted, needle_case, prove_needles, prove_stairs
from zif_conformance.oracle.attention_checks import changed_bytes, judge, judge_sequences
from zif_conformance.oracle.codes import CODED, held
from zif_conformance.oracle.inputs import torch_dtype
from zif_conformance.oracle.paged import PagedStep, Span
from zif_conformance.oracle.sequences import AttentionCase, Sequences

DTYPES = ("float32", "bfloat16", "float16")
HEAD_SIZES = (1, 7, 33, 64, 80, 96, 128, 256, 512)
BLOCK_SIZES = (8, 16, 64, 128)
LENGTHS = (17, 300)
MIXED = ((1, 1), (5, 5), (1, 40), (16, 48), (7, 33), (1, 17), (33, 70), (1, 16), (2, 18))
STAIRS = AttentionCase(((4, 4), (3, 16), (4, 17), (2, 50), (4, 130)), kv_dtype=CODED)
CLAIM = f"kv_dtype:{CODED}"
FULL = (Feature.ATTENTION_FULL, CLAIM)


def _needle_case(kind: Kind, dtype: str, length: int) -> tuple[AttentionCase, tuple[int, ...]]:
    case, targets = needle_case(kind, dtype, length)
    return replace(case, kv_dtype=CODED), targets


# The proof, made when this file is collected.
PROOFS = [prove_needles(*_needle_case(kind, dtype, n)) for kind in KINDS for dtype in DTYPES for n in LENGTHS]
PROOFS += [
    prove_stairs(replace(STAIRS, requests=(request,), dtype=dtype)) for request in STAIRS.requests for dtype in DTYPES
]

by_dtype = pytest.mark.parametrize("dtype", cases("dtype", *DTYPES))
by_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=exercises(*kind.features), id=kind.name) for kind in KINDS]
)

VECTORS = {
    # Of scale 1 and of scale 61: halves between two codes go to the even one, also where x / s is not x * (1 / s).
    "ties": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -63.5, 125.5],
    "ties-of-61": [7747.0, 91.5, 213.5, 335.5, -457.5, -579.5, -701.5, 30.5],
    "outlier": [1000.0, 1.0, -1.0, 3.9, 4.0, -12.0, 0.0, 500.0],
    "all-equal": [-0.375] * 8,
    "large": [3e4, -3e4, 1e4, 120.0, 118.0, -60.0, 1e3, 0.0],
    "small": [6e-5, -6e-5, 3e-5, 0.0, 2e-5, 1e-5, -2e-5, 5e-5],
    "zeros": [0.0, -0.0] * 4,
}


@conforms(level="L3", gate="G3", clause=("7.9", "8.3"), claims=(CLAIM,))
@by_dtype
@by_kind
def test_prompts_chunks_and_single_tokens_over_codes(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    hold(record_gate, judge(device, _case(MIXED, dtype, capabilities, kind)))


@conforms(level="L3", gate="G3", clause="7.9", claims=FULL)
@by_dtype
@pytest.mark.parametrize("size", cases("head_size", *HEAD_SIZES))
def test_codes_of_any_head_size(
    device: Device, capabilities: Capabilities, dtype: str, size: int, record_gate: Any
) -> None:
    case = _case(((1, 37), (5, 21), (9, 9)), dtype, capabilities)
    hold(record_gate, judge(device, replace(case, head_dim=size)))


@conforms(level="L3", gate="G0", clause=("7.9", "8.2", "8.3"), claims=(CLAIM,))
@by_dtype
@by_kind
@pytest.mark.parametrize("length", LENGTHS)
def test_needle_among_codes(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, length: int, record_gate: Any
) -> None:
    case, targets = _needle_case(kind, dtype, length)
    hold(record_gate, judge_sequences(device, Sequences.needles(fitted(case, capabilities), targets), "G0"))


@conforms(level="L3", gate="G0", clause=("7.9", "8.3"), claims=(CLAIM,), negative=True)
@by_dtype
@by_kind
def test_no_row_sees_the_next_code(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, record_gate: Any
) -> None:
    sequences = Sequences.stairs(fitted(kind.of(replace(STAIRS, dtype=dtype)), capabilities))
    hold(record_gate, judge_sequences(device, sequences, "G0"))


@conforms(level="L3", gate="G2", clause="7.9", claims=FULL)
@by_dtype
@pytest.mark.parametrize("name", VECTORS)
def test_a_lone_value_is_code_times_scale(
    device: Device, capabilities: Capabilities, dtype: str, name: str, record_gate: Any
) -> None:
    """All weight is on the only key there is: the result is what the cache holds, but for two roundings, of the product
    and of the weight."""
    case = _case(((1, 1),), dtype, capabilities)
    sequences = Sequences.random(case)
    sequences.requests[0].value[0, 0] = _vector(name, case)
    with PagedStep(device, sequences) as step:
        got = step.run()
    stored = held(sequences.requests[0].value, CODED, torch.float64).repeat_interleave(case.group_size, 1)
    hold(record_gate, ulp(got, stored, roundings=2, compute=torch_dtype(case.compute)))


@conforms(level="L3", gate="G3", clause="7.9", claims=FULL)
@by_dtype
@pytest.mark.parametrize("name", VECTORS)
def test_a_key_is_code_times_scale(
    device: Device, capabilities: Capabilities, dtype: str, name: str, record_gate: Any
) -> None:
    """A key of zeros stands beside the key, and each query asks for one of its elements."""
    case = _case(((1, 2),), dtype, capabilities)
    case = replace(case, requests=((1, 2),) * min(len(VECTORS[name]), case.head_dim))
    sequences = Sequences.random(case)
    largest = float(_vector(name, case).abs().max()) or 1.0
    for element, sequence in enumerate(sequences.requests):
        sequence.query.zero_()
        sequence.query[..., element] = min(4.0 * case.head_dim**0.5 / largest, 1e4)
        sequence.key[0] = 0.0
        sequence.key[1] = _vector(name, case)
    hold(record_gate, judge_sequences(device, sequences, "G3"))


@conforms(level="L3", gate="G6", clause=("7.9", "8.6"), claims=FULL, negative=True)
@by_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["key", "value"])
def test_what_is_not_finite_spoils_its_vector_alone(
    device: Device, capabilities: Capabilities, dtype: str, bad: float, what: str, record_gate: Any
) -> None:
    """One element: the whole vector is NaN, and with it all heads that see it; no other head, and no other request."""
    case = _case(MIXED, dtype, capabilities)
    clean, dirty = Sequences.random(case), Sequences.random(case)
    starts = np.cumsum([0, *(length for length, _ in MIXED)])
    getattr(dirty.requests[2], what)[7, 1, case.head_dim // 2] = bad
    outputs = []
    for sequences in (clean, dirty):
        with PagedStep(device, sequences) as step:
            outputs.append(step.run())
    spoilt = torch.zeros(outputs[0].shape[:2], dtype=torch.bool)
    spoilt[starts[2], case.group_size :] = True
    assert outputs[1][spoilt].isnan().all(), f"{bad} in a {what} was swallowed"
    hold(record_gate, exact(outputs[1][~spoilt], outputs[0][~spoilt], "heads that do not see the vector"))


@conforms(level="L3", gate="G1", clause=("7.6", "7.9", "8.3"), claims=(CLAIM,), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_kind
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80])
def test_codes_of_others_do_not_matter(
    device: Device, capabilities: Capabilities, dtype: str, kind: Kind, byte: int, record_gate: Any
) -> None:
    """All memory that was not written is NaN in the first run and another byte in the second."""
    sequences = Sequences.random(_case(MIXED, dtype, capabilities, kind))
    with PagedStep(device, sequences) as step:
        wanted = step.run()
    assert not wanted.isnan().any(), "NaN outside the visible keys reached the result"
    with PagedStep(device, sequences) as step:
        step.memory.fill_(byte)
        hold(record_gate, exact(step.run(), wanted, f"results with {byte:#04x} in unused memory"))


@conforms(level="L3", gate="G1", clause=("7.9", "8.2"), claims=FULL, negative=True, safety=Safety.MEMORY)
@pytest.mark.parametrize("block", cases("block_size", *BLOCK_SIZES))
def test_codes_are_written_to_the_named_slots_only(
    device: Device, capabilities: Capabilities, block: int, record_gate: Any
) -> None:
    """Each token has bytes of its own, codes and scales, and no more than its share of the block."""
    dtype = capabilities.dtypes[0].storage
    case = replace(_case(((1, 2 * block + 1), (1, block)), dtype, capabilities), block_size=block)
    least = 2 * case.num_kv_heads * (case.head_dim + 4)
    with PagedStep(device, Sequences.random(case)) as step:
        owned = torch.zeros_like(step.memory, dtype=torch.int32)
        layout = step.arena.groups[0].layout
        share = layout.block_bytes // (block * len(step.caches))
        for request, position in ((0, 0), (0, block - 1), (0, block), (0, 2 * block), (1, 0), (1, block - 1)):
            changed = changed_bytes(step, Span(request, position, position + 1))
            touched = changed.view(step.arena.num_slabs, -1).any(-1).nonzero().flatten().tolist()
            assert touched == [int(step.table[request, position // block])], touched
            assert least <= int(changed.sum()) <= share, f"{int(changed.sum())} bytes, not {least} to {share}"
            owned += changed
    hold(record_gate, GateResult("G1", float((owned > 1).sum()), 0.0, "bytes shared by two slots"))


@conforms(level="L3", gate="G1", clause=("7.9", "8.4"), claims=FULL, negative=True)
@by_dtype
def test_a_vector_is_coded_the_same_alone_and_among_others(
    device: Device, capabilities: Capabilities, dtype: str, record_gate: Any
) -> None:
    """A scale that tokens of a step, of a block or of a head shared would show in the bytes."""
    sequences = Sequences.random(_case(((1, 40), (1, 21)), dtype, capabilities))
    sequences.requests[0].key[::3] *= 50.0
    sequences.requests[1].value[:, 1] *= 0.02
    spans = [Span(row, 0, length) for row, (_, length) in enumerate(sequences.case.requests)]
    arenas = []
    single = [Span(span.request, i, i + 1) for span in reversed(spans) for i in reversed(range(span.last))]
    for steps in ([spans], [[span] for span in single]):
        with PagedStep(device, sequences) as step:
            for named in steps:
                step.write(named)
            arenas.append(step.memory.cpu().clone())
    hold(record_gate, exact(arenas[1], arenas[0], "the arena after single tokens"))


@conforms(level="L3", gate="G1", clause=("7.1", "7.9", "10.10"), claims=FULL, negative=True)
@by_dtype
def test_blocks_that_were_copied_hold_their_scales(
    device: Device, capabilities: Capabilities, dtype: str, record_gate: Any
) -> None:
    """As swapping and tiers do it: bytes of blocks go away, come back under other ids, and all else is NaN."""
    sequences = Sequences.random(_case(MIXED, dtype, capabilities))
    with PagedStep(device, sequences) as step:
        wanted = step.run()
        kept = step.cells.cpu().clone()
    with PagedStep(device, sequences, order_seed=1) as other:
        moved = {int(old): int(new) for old, new in zip(step.table.flat, other.table.flat, strict=True) if old}
        for old, new in moved.items():
            other.cells[new] = kept[old].to(other.memory.device)
        hold(record_gate, exact(other.attend(), wanted, "results over copied blocks"))


@conforms(level="L3", gate="G3", clause=("7.9", "8.4"), claims=(*FULL, Feature.PREFIX_CACHING), negative=True)
@by_dtype
def test_requests_share_coded_blocks(device: Device, capabilities: Capabilities, dtype: str, record_gate: Any) -> None:
    """Only the first request writes the prefix that all read."""
    case = _case(((1, 40), (8, 40), (1, 33)), dtype, capabilities)
    sequences = Sequences.random(case)
    shared = 32 // case.block_size * case.block_size
    first = sequences.requests[0]
    for other in sequences.requests[1:]:
        other.key[:shared], other.value[:shared] = first.key[:shared], first.value[:shared]
    with PagedStep(device, sequences) as step:
        step.table[1:, : shared // case.block_size] = step.table[0, : shared // case.block_size]
        spans = [Span(0, 0, 39), Span(1, shared, 32), Span(2, shared, 32)]
        step.write([span for span in spans if span.first < span.last])
        got = step.attend()
    declared = [run.flatten(1) for run in sequences.declared()]
    hold(record_gate, ratio(got.flatten(1), sequences.exact().flatten(1), declared, "shared"))


def _case(
    requests: tuple[tuple[int, int], ...], dtype: str, capabilities: Capabilities, kind: Kind = KINDS[0]
) -> AttentionCase:
    return fitted(kind.of(AttentionCase(requests, dtype=dtype, kv_dtype=CODED)), capabilities)


def _vector(name: str, case: AttentionCase) -> torch.Tensor:
    """Return the vector of that name, repeated or cut to the head size, [D]."""
    values = VECTORS[name]
    repeated = torch.tensor((values * (case.head_dim // len(values) + 1))[: case.head_dim])
    return repeated.to(torch_dtype(case.dtype))
