"""L8: speed relative to the same device in the same run: its own copies and its own products, never a clock alone.

A gate here says how many times too slow something is, at most. The bounds are wide, because machines are shared and
small devices pay most for calls; what they catch is a path that is ten times slower than it has to be, or that grows
with the square of what it should grow with. The figures are in the report.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from zif.contract import AttentionBatch, Capabilities, Device, Feature
from zif_conformance.gates import GateResult, hold
from zif_conformance.marks import conforms
from zif_conformance.oracle.attention_cases import fitted
from zif_conformance.oracle.inputs import torch_dtype
from zif_conformance.oracle.paged import BOUND_LAYER, PagedStep, Span
from zif_conformance.oracle.sequences import AttentionCase, Sequences
from zif_conformance.subject import preferred_dtype
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, prompt_tokens

FULL = (Feature.ATTENTION_FULL,)
REPEATS = 7
COPIED_BYTES = 32 << 20
DECODE = AttentionCase(tuple((1, 1024) for _ in range(16)), num_kv_heads=4, head_dim=64)

MOST_OF_A_COPY = 40.0
MOST_OF_A_PRODUCT = 8.0
MOST_GROWTH = 2.5
"""Times the growth that is due."""


def _seconds(device: Device, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median time of a call, after two to warm up."""
    taken = []
    for _ in range(repeats + 2):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


def _copy_bytes_per_s(device: Device) -> float:
    """Measure the device's own copies: bytes read and written."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device.array_device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(device, lambda: target.copy_(source))


def _attention_seconds(device: Device, case: AttentionCase) -> float:
    """Measure one layer's attention of a step, its tokens written before."""
    with PagedStep(device, Sequences.random(case)) as step:
        step.run()
        prepared = device.attention.prepare(
            step.batch([Span(row, n - 1, n) for row, (_, n) in enumerate(case.requests)])
        )
        query = torch.cat([sequence.query for sequence in step.sequences.requests]).to(device.array_device)
        cache, params = step.caches[BOUND_LAYER], step.sequences.params
        return _seconds(device, lambda: device.attention.attend(query, cache, prepared, params))


def _times(measured: float, due: float, most: float, what: str) -> GateResult:
    """Judge how many times longer something took than is due."""
    return GateResult("none", measured / due, most, what)


@conforms(level="L8", clause="8.3", claims=FULL, deadline_s=180)
def test_decoding_reads_the_cache_at_the_speed_of_copies(
    device: Device, capabilities: Capabilities, record_gate: Any
) -> None:
    case = fitted(AttentionCase(DECODE.requests, preferred_dtype(capabilities), num_kv_heads=4), capabilities)
    taken = _attention_seconds(device, case)
    read = sum(length for _, length in case.requests) * 2 * case.num_kv_heads * case.head_dim
    due = read * torch_dtype(case.stored).itemsize / _copy_bytes_per_s(device)
    hold(record_gate, _times(taken, due, MOST_OF_A_COPY, "times a copy of the same bytes"))


@conforms(level="L8", clause="8.3", claims=FULL, deadline_s=180, negative=True)
@pytest.mark.parametrize(("short", "long"), [(256, 1024), (512, 4096)])
def test_decoding_grows_with_the_length_and_not_with_its_square(
    device: Device, capabilities: Capabilities, short: int, long: int, record_gate: Any
) -> None:
    taken = []
    for length in (short, long):
        requests = tuple((1, length) for _ in range(4))
        case = fitted(AttentionCase(requests, preferred_dtype(capabilities), num_kv_heads=4), capabilities)
        taken.append(_attention_seconds(device, case))
    hold(record_gate, _times(taken[1], taken[0] * long / short, MOST_GROWTH, f"growth from {short} to {long} tokens"))


@conforms(level="L8", clause="8.3", claims=FULL, deadline_s=180, negative=True)
def test_a_step_grows_with_its_requests_and_not_with_their_square(
    device: Device, capabilities: Capabilities, record_gate: Any
) -> None:
    taken = []
    for count in (8, 64):
        requests = tuple((1, 128) for _ in range(count))
        case = fitted(AttentionCase(requests, preferred_dtype(capabilities), num_kv_heads=2), capabilities)
        taken.append(_attention_seconds(device, case))
    hold(record_gate, _times(taken[1], taken[0] * 8, MOST_GROWTH, "growth from 8 to 64 requests"))


@conforms(level="L8", clause="8.1", claims=FULL, deadline_s=180, negative=True)
def test_preparing_grows_with_the_requests(device: Device, capabilities: Capabilities, record_gate: Any) -> None:
    """Host work of a step: tables of 64 and of 512 requests."""

    def batch(count: int) -> AttentionBatch:
        size = fitted(AttentionCase(((1, 1),)), capabilities).block_size
        table = np.arange(count * 8, dtype=np.int32).reshape(count, 8)
        lengths = np.full(count, 8 * size, dtype=np.int32)
        slots = table[:, -1].astype(np.int64) * size + size - 1
        return AttentionBatch(np.arange(count + 1, dtype=np.int32), lengths, table, slots, size, None)

    few, many = (_seconds(device, lambda n=n: device.attention.prepare(batch(n))) for n in (64, 512))  # type: ignore[misc]
    hold(record_gate, _times(many, few * 8, MOST_GROWTH, "growth of prepare from 64 to 512 requests"))


@conforms(level="L8", clause="9.1", deadline_s=180)
@pytest.mark.parametrize("tokens", [1, 256])
def test_products_run_at_the_speed_of_the_best_one(
    device: Device, capabilities: Capabilities, tokens: int, record_gate: Any
) -> None:
    """One token is bounded by reading the weight, many by the best product that the device shows."""
    dtype, place = torch_dtype(preferred_dtype(capabilities)), device.array_device
    inner, outer = 1024, 4096
    x = torch.randn(tokens, inner).to(dtype).to(place)
    weight = torch.randn(outer, inner).to(dtype).to(place)
    taken = _seconds(device, lambda: device.ops.linear(x, weight, None))
    square = torch.randn(1024, 1024).to(dtype).to(place)
    best = _seconds(device, lambda: device.ops.linear(square, square, None)) / 1024**3
    read = weight.numel() * dtype.itemsize / _copy_bytes_per_s(device)
    due = max(best * tokens * inner * outer, read)
    hold(record_gate, _times(taken, due, MOST_OF_A_PRODUCT, f"times what {tokens} tokens are due"))


@conforms(level="L8", clause="9.1", deadline_s=180)
@pytest.mark.parametrize("operator", ["rms_norm", "gated_activation"])
def test_elementwise_operators_run_at_the_speed_of_copies(
    device: Device, capabilities: Capabilities, operator: str, record_gate: Any
) -> None:
    from zif.contract import Activation

    x = torch.randn(2048, 1024).to(torch_dtype(preferred_dtype(capabilities))).to(device.array_device)
    weight = torch.ones_like(x[0])
    calls = {
        "rms_norm": lambda: device.ops.rms_norm(x, weight, 1e-6, 0.0),
        "gated_activation": lambda: device.ops.gated_activation(x, Activation.SILU),
    }
    due = 2 * x.numel() * x.dtype.itemsize / _copy_bytes_per_s(device)
    hold(record_gate, _times(_seconds(device, calls[operator]), due, MOST_OF_A_COPY, "times a copy of the same bytes"))


@conforms(level="L8", clause="10.2", claims=FULL, deadline_s=180, negative=True)
def test_a_step_of_many_requests_costs_less_than_their_steps_alone(tiny: TinyModels, record_gate: Any) -> None:
    """Batching pays: eight requests together against one after the other."""
    prompts = [prompt_tokens(16, number) for number in range(8)]

    def together(llm: Any) -> None:
        answer(llm, prompts, greedy(24))

    def alone(llm: Any) -> None:
        for prompt in prompts:
            answer(llm, [prompt], greedy(24))

    taken = []
    with tiny.open("dense", enable_prefix_caching=False) as llm:
        for work in (together, alone, together, alone, together, alone):
            begin = time.perf_counter()
            work(llm)
            taken.append(time.perf_counter() - begin)
    batched, single = (statistics.median(taken[first::2]) for first in (0, 1))
    hold(record_gate, _times(batched, single, 1.0, "times eight requests one after the other"))


@conforms(level="L8", clause="10.3", claims=(*FULL, Feature.PREFIX_CACHING), deadline_s=180, negative=True)
def test_a_prefix_that_is_found_saves_its_time(tiny: TinyModels, record_gate: Any) -> None:
    """The second request of a long prompt computes less, and takes no longer than the first."""
    taken: tuple[list[float], list[float]] = ([], [])
    with tiny.open("dense", max_num_batched_tokens=16) as llm:
        answer(llm, [prompt_tokens(80, 99)], greedy(1))
        for number in range(5):
            for found in taken:
                begin = time.perf_counter()
                answer(llm, [prompt_tokens(80, number)], greedy(1))
                found.append(time.perf_counter() - begin)
    missed, hit = map(statistics.median, taken)
    hold(record_gate, _times(hit, missed, 1.0, "times the first request of the same prompt"))
