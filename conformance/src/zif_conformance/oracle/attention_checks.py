"""How a device's attention is judged: steps against float64, and which bytes a write changes. For the tests of L3."""

from dataclasses import replace

import torch

from zif.contract import Device
from zif_conformance.gates import GateResult, ratio
from zif_conformance.oracle.paged import PagedStep, Span
from zif_conformance.oracle.sequences import AttentionCase, Sequences


def judge(device: Device, case: AttentionCase) -> GateResult:
    """Judge a step of random sequences token by token, all heads together: a head of one element has no size."""
    sequences = Sequences.random(case)
    with PagedStep(device, sequences) as step:
        got = step.run()
    assert got.dtype == sequences.requests[0].query.dtype, got.dtype
    return ratio(got.flatten(1), sequences.exact().flatten(1), [r.flatten(1) for r in sequences.declared()], "tokens")


def judge_sequences(device: Device, sequences: Sequences, gate: str) -> GateResult:
    """Judge a step of sequences made on purpose, head by head, under the gate that they were made for."""
    with PagedStep(device, sequences) as step:
        got = step.run()
    assert got.dtype == sequences.requests[0].query.dtype, got.dtype
    return replace(ratio(got, sequences.exact(), sequences.declared(), "attention"), gate=gate)


def changed_bytes(step: PagedStep, span: Span) -> torch.Tensor:
    """Return which bytes of the arena a write of `span` changes, whatever they were: int32, 1 where it does."""
    changed = torch.zeros_like(step.memory, dtype=torch.bool)
    for pattern in (0x00, 0xFF, 0x5A):
        step.memory.fill_(pattern)
        step.write([span])
        changed |= step.memory != pattern
    return changed.int()
