"""The attention cases of the suite, and for each needle the proof that its fault would be seen.

Proofs are made when tests are collected, on the reference alone: a needle that hides a fault fails there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from zif.contract import Capabilities, Feature
from zif_conformance.gates import GateResult, proof, prove
from zif_conformance.gates.ratio import tolerance
from zif_conformance.oracle.inputs import Inputs
from zif_conformance.oracle.sequences import DECOY_SIZE, AttentionCase, Sequences
from zif_conformance.subject import block_size, head_size

SOFTCAP = 100.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of layer: what it asks of attention, and the features that a device must claim for it."""

    name: str
    features: tuple[Feature, ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def of(self, case: AttentionCase) -> AttentionCase:
        """Return the case as a layer of this kind."""
        return replace(case, window=self.window, softcap=self.softcap, sinks=self.sinks)


KINDS = (
    Kind("full", (Feature.ATTENTION_FULL,)),
    Kind("window", (Feature.ATTENTION_SLIDING_WINDOW,), window=21),
    Kind("window-one", (Feature.ATTENTION_SLIDING_WINDOW,), window=1),
    Kind("softcap", (Feature.ATTENTION_FULL, Feature.ATTENTION_SOFTCAP), softcap=SOFTCAP),
    Kind("sinks", (Feature.ATTENTION_FULL, Feature.ATTENTION_SINKS), sinks=True),
    Kind(
        "all",
        (Feature.ATTENTION_SLIDING_WINDOW, Feature.ATTENTION_SOFTCAP, Feature.ATTENTION_SINKS),
        window=32,
        softcap=SOFTCAP,
        sinks=True,
    ),
)


def fitted(case: AttentionCase, capabilities: Capabilities) -> AttentionCase:
    """Return the case with the head size and block size that the device claims nearest to its own."""
    numerics = capabilities.numerics(case.dtype)
    return replace(
        case,
        compute="float32" if numerics is None else numerics.compute,
        head_dim=head_size(capabilities, case.head_dim),
        block_size=block_size(capabilities, case.block_size),
    )


def needle_case(kind: Kind, dtype: str, length: int, block: int = 16) -> tuple[AttentionCase, tuple[int, ...]]:
    """Return a step of single queries over `length` tokens, and the position of each one's needle."""
    first = 0 if kind.window is None else max(0, length - kind.window)
    places = (first, first + 1, block - 1, block, 2 * block - 1, length // 2, length - block, length - 2, length - 1)
    targets = tuple(sorted({place for place in places if first <= place < length}))
    return kind.of(AttentionCase(((1, length),) * len(targets), dtype=dtype)), targets


def prove_needles(case: AttentionCase, targets: tuple[int, ...]) -> GateResult:
    """Prove, row by row, that a dropped, overwritten, mismatched or stale key, or one key too many, would be seen."""
    sequences = Sequences.needles(case, targets)
    correct = sequences.exact()
    allowed = tolerance(correct, sequences.declared(), sequences.requests[0].key.dtype)
    results = []
    for request, target in enumerate(targets):
        row = slice(request, request + 1)
        for name, faulty in _faults(sequences, request, target):
            result = prove_row(name, correct[row], allowed[row], faulty.exact()[row])
            results.append(result)
    return max(results, key=lambda result: result.measured)


def prove_stairs(case: AttentionCase) -> GateResult:
    """Prove that rows which see one key too few or too many would be seen."""
    sequences = Sequences.stairs(case)
    faulty = {}
    for name, step in (("last key hidden", -1), ("next key seen", 1)):
        shifted = [s.query.roll(step, 0) for s in sequences.requests]
        moved = [replace(s, query=q) for s, q in zip(sequences.requests, shifted, strict=True)]
        # All queries are the same: a row that sees one key more gives what the next row gives.
        faulty[name] = replace(sequences, requests=moved).exact().roll(-step, 0)
    return prove(sequences.exact(), sequences.declared(), sequences.requests[0].key.dtype, faulty)


def prove_row(name: str, correct: torch.Tensor, allowed: torch.Tensor, faulty: torch.Tensor) -> GateResult:
    """Prove that one fault changes one row by more than 100 tolerances. Raises `AssertionError` otherwise."""
    result = proof(correct, allowed, {name: faulty})
    assert result.passed, f"the needle proves nothing: {result.message}"
    return result


def _faults(sequences: Sequences, request: int, target: int) -> Iterator[tuple[str, Sequences]]:
    """Yield the sequences with one fault at the needle each; where only the needle is visible, those that remain."""
    case, found = sequences.case, sequences.requests[request]
    first = case.first_visible(len(found.key) - 1)
    draw = Inputs(case.dtype, 99)
    key, value = found.key[target], found.value[target]
    stale = draw.signs(*key.shape), draw.normal(*value.shape, scale=DECOY_SIZE)
    yield "stale key and value", sequences.with_key(request, target, *stale)
    yield "value of another token", sequences.with_key(request, target, key, stale[1])
    if len(found.key) - first > 1:
        neighbour = target - 1 if target > first else target + 1
        yield "dropped key", sequences.with_key(request, target, torch.zeros_like(key), value)
        copied = found.key[neighbour], found.value[neighbour]
        yield "neighbour twice", sequences.with_key(request, target, *copied)
    if first:
        wider = replace(case, window=(case.window or 0) + 1)
        params = replace(sequences.params, window=wider.window)
        yield "window too wide", replace(sequences, case=wider, params=params)
