"""L8: speed relative to the same device in the same run: its own copies and its own products, never a clock alone.

A limit here says how many times too slow something may be. The limits are wide, because machines are shared and small
devices pay most for calls; what they catch is a path that is ten times slower than it has to be, or that grows with
the square of what it should grow with. What is compared is measured in turn, so that a busy moment meets both. The
figures are in the report. Synchronizations that hide in a call are not counted: the contract has no counter for them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from zif import LLM
from zif.contract import Activation, AttentionBatch, Capabilities, Device, Feature
from zif_conformance.gates import GateResult, hold
from zif_conformance.marks import conforms
from zif_conformance.oracle.attention_cases import fitted
from zif_conformance.oracle.inputs import torch_dtype
from zif_conformance.oracle.paged import BOUND_LAYER, PagedStep, Span
from zif_conformance.oracle.sequences import AttentionCase, Sequences
from zif_conformance.subject import preferred_dtype
from zif_conformance.tiny_models.checkpoints import CONTEXT
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, prompt_tokens

TIMED_FULL = (Feature.ATTENTION_FULL, "hardware")
"""What a host takes to simulate a device says nothing about its speed."""
ROUNDS, WARM_UP = 15, 2
COPIED_BYTES = 32 << 20
GROWTH = 16
NUM_TOKENS = 24

MOST_OF_A_COPY = 18.0
MOST_ELEMENTWISE = 10.0
MOST_OF_A_PRODUCT = 3.0
MOST_GROWTH = 2.5
"""Times the growth that is due: what grows with the square is found at 4 or more."""
MOST_OF_ALONE = 0.6
MOST_OF_A_MISS = 0.8

Work = Callable[[], object]


def _seconds(work: Work, device: Device | None = None) -> float:
    """Time one call, from an idle device to an idle device."""
    if device is not None:
        device.synchronize()
    begin = time.perf_counter()
    work()
    if device is not None:
        device.synchronize()
    return time.perf_counter() - begin


def _fastest(works: Sequence[Work], device: Device | None = None, rounds: int = ROUNDS) -> list[float]:
    """Return the shortest time of each of several calls that take turns, after two rounds to warm up.

    The shortest, because others on the machine only ever add to it.
    """
    taken = [[_seconds(work, device) for work in works] for _ in range(rounds + WARM_UP)][WARM_UP:]
    return [min(times) for times in zip(*taken, strict=True)]


def _result(measured: float, due: float, most: float, what: str) -> GateResult:
    """Judge how many times longer something took than is due."""
    return GateResult("none", measured / due, most, f"{what}: {measured * 1e6:.0f} us, due {due * 1e6:.0f} us")


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a byte copied (read or written), of a call, of a multiplication and addition."""

    byte: float
    call: float
    product: float


class Yardsticks:
    """What a device does with the array library alone: a copy, the shortest call, a large product."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        place = device.array_device
        source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=place)
        target = torch.empty_like(source)
        tiny, square = torch.ones(1, 16, dtype=dtype, device=place), torch.ones(1024, 1024, dtype=dtype, device=place)
        self.copy: Work = lambda: target.copy_(source)
        self.call: Work = lambda: tiny + tiny
        self.product: Work = lambda: square @ square

    def times(self, device: Device, work: Work) -> tuple[float, Pace]:
        """Measure work between the yardsticks."""
        taken, copy, call, product = _fastest((work, self.copy, self.call, self.product), device)
        return taken, Pace(copy / (2 * COPIED_BYTES), call, product / 1024**3)


@pytest.fixture
def yardsticks(device: Device, capabilities: Capabilities) -> Yardsticks:
    """What to measure against."""
    return Yardsticks(device, torch_dtype(preferred_dtype(capabilities)))


@contextlib.contextmanager
def _attending(device: Device, case: AttentionCase) -> Iterator[Work]:
    """Yield one layer's attention of a step, its tokens written before."""
    with PagedStep(device, Sequences.random(case)) as step:
        step.run()
        spans = [Span(row, length - 1, length) for row, (_, length) in enumerate(case.requests)]
        prepared = device.attention.prepare(step.batch(spans))
        query = torch.cat([sequence.query for sequence in step.sequences.requests]).to(device.array_device)
        cache, params = step.caches[BOUND_LAYER], step.sequences.params
        yield lambda: device.attention.attend(query, cache, prepared, params)


def _decoding(capabilities: Capabilities, count: int, length: int) -> AttentionCase:
    """Return a step of so many requests of one new token each."""
    requests = tuple((1, length) for _ in range(count))
    return fitted(AttentionCase(requests, preferred_dtype(capabilities), num_kv_heads=4, head_dim=64), capabilities)


@conforms(level="L8", clause="8.3", claims=TIMED_FULL, deadline_s=180)
def test_decoding_reads_the_cache_at_the_speed_of_copies(
    device: Device, capabilities: Capabilities, yardsticks: Yardsticks, record_gate: Any
) -> None:
    case = _decoding(capabilities, 16, 1024)
    with _attending(device, case) as attend:
        taken, pace = yardsticks.times(device, attend)
    read = 16 * 1024 * 2 * case.num_kv_heads * case.head_dim * torch_dtype(case.stored).itemsize
    hold(record_gate, _result(taken, pace.call + read * pace.byte, MOST_OF_A_COPY, "attention, 16 x 1024 tokens"))


@conforms(level="L8", clause="8.3", claims=TIMED_FULL, deadline_s=180, negative=True)
@pytest.mark.parametrize(("short", "long"), [(256, 1024), (512, 4096)])
def test_decoding_grows_with_the_length_and_not_with_its_square(
    device: Device, capabilities: Capabilities, short: int, long: int, record_gate: Any
) -> None:
    cases = (_decoding(capabilities, 4, short), _decoding(capabilities, 4, long))
    with _attending(device, cases[0]) as few, _attending(device, cases[1]) as many:
        taken = _fastest((few, many), device)
    due = taken[0] * long / short
    hold(record_gate, _result(taken[1], due, MOST_GROWTH, f"attention over {long} tokens by that over {short}"))


@conforms(level="L8", clause="8.3", claims=TIMED_FULL, deadline_s=180, negative=True)
def test_a_step_grows_with_its_requests_and_not_with_their_square(
    device: Device, capabilities: Capabilities, record_gate: Any
) -> None:
    cases = (_decoding(capabilities, 8, 128), _decoding(capabilities, 8 * GROWTH, 128))
    with _attending(device, cases[0]) as few, _attending(device, cases[1]) as many:
        short, long = _fastest((few, many), device)
    hold(record_gate, _result(long, GROWTH * short, MOST_GROWTH, f"{GROWTH} times as many requests as 8"))


@conforms(level="L8", clause="8.1", claims=TIMED_FULL, deadline_s=180, negative=True)
def test_preparing_grows_with_the_requests(device: Device, capabilities: Capabilities, record_gate: Any) -> None:
    """The host's work of a step, for tables of 64 and of 1024 requests."""
    size = _decoding(capabilities, 1, 1).block_size

    def preparing(count: int) -> Work:
        table = np.arange(1, 1 + count * 8, dtype=np.int32).reshape(count, 8)
        lengths = np.full(count, 8 * size, dtype=np.int32)
        slots = table[:, -1].astype(np.int64) * size + size - 1
        batch = AttentionBatch(np.arange(count + 1, dtype=np.int32), lengths, table, slots, size, None)
        return lambda: device.attention.prepare(batch)

    few, many = _fastest((preparing(64), preparing(64 * GROWTH)), device)
    hold(record_gate, _result(many, GROWTH * few, MOST_GROWTH, f"preparing {GROWTH} times as many requests as 64"))


@conforms(level="L8", clause="9.1", claims=("hardware",), deadline_s=180)
@pytest.mark.parametrize("tokens", [1, 256])
def test_products_run_at_the_speed_of_the_best_one(
    device: Device, capabilities: Capabilities, yardsticks: Yardsticks, tokens: int, record_gate: Any
) -> None:
    """One token is bounded by reading the weight, many by the best product that the device shows."""
    dtype, place = torch_dtype(preferred_dtype(capabilities)), device.array_device
    x, weight = (torch.randn(rows, 1024).to(dtype).to(place) for rows in (tokens, 4096))
    taken, pace = yardsticks.times(device, lambda: device.ops.linear(x, weight, None))
    bound = max(pace.product * tokens * weight.numel(), pace.byte * weight.numel() * dtype.itemsize)
    hold(record_gate, _result(taken, pace.call + bound, MOST_OF_A_PRODUCT, f"a product of {tokens} tokens"))


@conforms(level="L8", clause="9.1", claims=("hardware",), deadline_s=180)
@pytest.mark.parametrize("operator", ["rms_norm", "gated_activation"])
def test_elementwise_operators_run_at_the_speed_of_copies(
    device: Device, capabilities: Capabilities, yardsticks: Yardsticks, operator: str, record_gate: Any
) -> None:
    x = torch.randn(2048, 1024).to(torch_dtype(preferred_dtype(capabilities))).to(device.array_device)
    weight = torch.ones_like(x[0])
    calls: dict[str, Work] = {
        "rms_norm": lambda: device.ops.rms_norm(x, weight, 1e-6, 0.0),
        "gated_activation": lambda: device.ops.gated_activation(x, Activation.SILU),
    }
    written = x.numel() if operator == "rms_norm" else x.numel() // 2
    taken, pace = yardsticks.times(device, calls[operator])
    due = pace.call + pace.byte * (x.numel() + written) * x.dtype.itemsize
    hold(record_gate, _result(taken, due, MOST_ELEMENTWISE, operator))


@conforms(level="L8", clause="10.2", claims=TIMED_FULL, deadline_s=180, negative=True)
def test_a_step_of_many_requests_costs_less_than_their_steps_alone(tiny: TinyModels, record_gate: Any) -> None:
    """Batching pays: eight requests together against one after the other."""
    prompts = [prompt_tokens(16, number) for number in range(8)]

    def alone(llm: LLM) -> None:
        for prompt in prompts:
            answer(llm, [prompt], greedy(NUM_TOKENS))

    with tiny.open("dense", enable_prefix_caching=False) as llm:
        batched, single = _fastest((lambda: answer(llm, prompts, greedy(NUM_TOKENS)), lambda: alone(llm)), rounds=5)
    per_step = f"eight requests together, {batched / NUM_TOKENS * 1e6:.0f} us a step"
    hold(record_gate, _result(batched, single, MOST_OF_ALONE, per_step))


@conforms(level="L8", clause="10.3", claims=(*TIMED_FULL, Feature.PREFIX_CACHING), deadline_s=180, negative=True)
def test_a_prefix_that_is_found_saves_its_time(tiny: TinyModels, record_gate: Any) -> None:
    """The second request of a prompt finds all of its blocks but the last."""
    length, numbers = min(CONTEXT - 16, max(96, 3 * tiny.block_size)), iter(range(1000))
    prompt: list[int] = []

    def missed(llm: LLM) -> None:
        prompt[:] = prompt_tokens(length, next(numbers))
        answer(llm, [prompt], greedy(1))

    with tiny.open("dense", max_num_batched_tokens=16, max_model_len=CONTEXT) as llm:
        first, second = _fastest((lambda: missed(llm), lambda: answer(llm, [prompt], greedy(1))), rounds=7)
    hold(record_gate, _result(second, first, MOST_OF_A_MISS, f"a prompt of {length} tokens again"))
