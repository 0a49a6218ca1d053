"""L1: the device itself and its memory: open and close, allocate, run out, recover, free, refuse."""

import gc
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from zif.contract import Buffer, Device, Health, Refusal
from zif.errors import OutOfMemoryError
from zif_conformance.gates import GateResult, hold
from zif_conformance.marks import Safety, cases, conforms
from zif_conformance.subject import Subject

TAG = "conformance.l1"
SIZES = (1, 7, 63, 64, 65, 4095, 4096, 4097, 1 << 20)
HEALTH_DEADLINE_S = 5.0


@conforms(level="L1", gate="G1", clause="6.1", safety=Safety.MEMORY)
@pytest.mark.parametrize("alignment", [1, 2, 64, 256, 4096, 1 << 16])
def test_alignment(device: Device, alignment: int) -> None:
    buffers = [device.allocator.allocate(size, TAG, alignment) for size in SIZES]
    assert [buffer.array.data_ptr() % alignment for buffer in buffers] == [0] * len(SIZES)
    device.allocator.free_tag(TAG)


@conforms(level="L1", gate="G1", clause="6.1")
@pytest.mark.parametrize("size", SIZES)
def test_memory_is_zero_filled_bytes(device: Device, size: int, record_gate: Any) -> None:
    for _ in range(3):  # what comes back used must be zero again
        buffer = device.allocator.allocate(size, TAG)
        assert (buffer.num_bytes, buffer.array.shape, buffer.array.dtype) == (size, (size,), torch.uint8)
        assert str(buffer.array.device) == device.array_device or buffer.array.device.type == device.array_device
        hold(record_gate, GateResult("G1", float(buffer.array.count_nonzero()), 0.0, f"{size} bytes that are not zero"))
        buffer.array.fill_(0xA5)
        device.synchronize()
        device.allocator.free(buffer)


@conforms(level="L1", gate="G1", clause="6.1", negative=True, safety=Safety.MEMORY)
def test_buffers_do_not_overlap(device: Device, record_gate: Any) -> None:
    """Each buffer is a canary of the others: all bytes of all are written, and none changes another's."""
    buffers = [device.allocator.allocate(size, TAG) for size in SIZES * 8]
    for number, buffer in enumerate(buffers):
        buffer.array.fill_(number % 251)
    device.synchronize()
    spoiled = sum(int((buffer.array != number % 251).sum()) for number, buffer in enumerate(buffers))
    device.allocator.free_tag(TAG)
    hold(record_gate, GateResult("G1", float(spoiled), 0.0, "bytes that another buffer's writer changed"))


@conforms(level="L1", clause="6.3")
def test_ledger_equals_what_was_lent(device: Device) -> None:
    allocator, live = device.allocator, dict[int, Buffer[torch.Tensor]]()
    before = allocator.stats().allocated_bytes
    for number in range(200):
        tag = f"{TAG}.{number % 3}"
        if number % 4 == 3:
            allocator.free(live.pop(sorted(live)[number % len(live)]))
        buffer = allocator.allocate(1 + number * 37 % 5000, tag)
        live[buffer.buffer_id] = buffer
        wanted: dict[str, int] = {}
        for kept in live.values():
            wanted[kept.tag] = wanted.get(kept.tag, 0) + kept.num_bytes
        stats = allocator.stats()
        assert {name: size for name, size in stats.by_tag if name.startswith(TAG)} == wanted
        assert stats.allocated_bytes == before + sum(wanted.values())
        assert stats.peak_bytes >= stats.allocated_bytes
        assert len({b.buffer_id for b in live.values()}) == len(live), "two live buffers have one id"
    for index in range(3):
        allocator.free_tag(f"{TAG}.{index}")
    assert allocator.stats().allocated_bytes == before


@conforms(level="L1", clause=("6.2", "6.3"), negative=True)
def test_out_of_memory_and_then_usable(subject: Subject) -> None:
    limit = 64 << 20
    workload = replace(subject.workload(), memory_limit_bytes=limit)
    with subject.opened(workload) as device:
        allocator = device.allocator
        for _ in range(10):
            held = allocator.allocate(limit // 2, TAG)
            before = allocator.stats()
            for too_much in (limit // 2 + 1, limit, limit * 1000, 2**62):
                with pytest.raises(OutOfMemoryError, match=str(too_much)):
                    allocator.allocate(too_much, TAG)
            assert allocator.stats() == before, "a refused allocation changed the ledger"
            rest = allocator.allocate(limit // 2, TAG)
            assert not rest.array.any()
            allocator.free(rest)
            allocator.free(held)
        assert allocator.stats().allocated_bytes == 0


@conforms(level="L1", clause="6.2", negative=True)
def test_an_exhausted_allocator_serves_small_requests_again(subject: Subject) -> None:
    """Fill all of the limit in pieces, free every second one, and use the holes."""
    piece, count = 1 << 20, 32
    with subject.opened(replace(subject.workload(), memory_limit_bytes=piece * count)) as device:
        held = [device.allocator.allocate(piece, TAG) for _ in range(count)]
        with pytest.raises(OutOfMemoryError):
            device.allocator.allocate(1, TAG)
        for buffer in held[::2]:
            device.allocator.free(buffer)
        again = [device.allocator.allocate(piece, TAG) for _ in held[::2]]
        assert not any(bool(buffer.array.any()) for buffer in again)


@conforms(level="L1", clause="6.3", negative=True, safety=Safety.MEMORY)
def test_double_free_is_refused(device: Device) -> None:
    buffer, other = device.allocator.allocate(100, TAG), device.allocator.allocate(100, TAG)
    device.allocator.free(buffer)
    before = device.allocator.stats()
    for _ in range(3):
        with pytest.raises(ValueError, match="not on loan"):
            device.allocator.free(buffer)
    assert device.allocator.stats() == before
    device.allocator.free(other)


@conforms(level="L1", clause="6.3", negative=True, safety=Safety.MEMORY)
def test_foreign_and_forged_buffers_are_refused(device: Device, subject: Subject) -> None:
    own = device.allocator.allocate(100, TAG)
    with subject.opened() as other:
        foreign = other.allocator.allocate(100, TAG)
        forged = replace(own)
        for wrong in (foreign, forged, replace(own, buffer_id=10**9), replace(own, buffer_id=-1)):
            with pytest.raises(ValueError, match="not on loan"):
                device.allocator.free(wrong)
    assert dict(device.allocator.stats().by_tag)[TAG] == 100
    device.allocator.free(own)


@conforms(level="L1", clause="6.1", negative=True)
@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_sizes_below_one_are_refused(device: Device, size: int) -> None:
    before = device.allocator.stats()
    with pytest.raises(ValueError, match="num_bytes"):
        device.allocator.allocate(size, TAG)
    assert device.allocator.stats() == before


@conforms(level="L1", clause="6.1", negative=True)
@pytest.mark.parametrize("alignment", [0, -1, -64, 3, 12, 65])
def test_alignments_that_are_no_power_of_two_are_refused(device: Device, alignment: int) -> None:
    before = device.allocator.stats()
    with pytest.raises(ValueError, match="alignment"):
        device.allocator.allocate(64, TAG, alignment)
    assert device.allocator.stats() == before


@conforms(level="L1", clause="6.3")
def test_free_tag_takes_back_its_own_buffers_only(device: Device) -> None:
    device.allocator.allocate(100, TAG)
    device.allocator.allocate(11, TAG)
    kept = device.allocator.allocate(50, TAG + ".kept")
    device.allocator.free_tag(TAG)
    device.allocator.free_tag(TAG)
    device.allocator.free_tag("conformance.never-used")
    assert [size for name, size in device.allocator.stats().by_tag if name.startswith(TAG)] == [50]
    device.allocator.free(kept)


@conforms(level="L1", gate="G1", clause="6.4", negative=True, safety=Safety.MEMORY)
def test_memory_lives_as_long_as_an_array_refers_to_it(device: Device, record_gate: Any) -> None:
    """A view outlives `free`: nothing else may be lent there."""
    buffer = device.allocator.allocate(1 << 16, TAG)
    view = buffer.array[16:]
    view.fill_(0x5A)
    device.allocator.free(buffer)
    del buffer
    gc.collect()
    others = [device.allocator.allocate(1 << 16, TAG) for _ in range(8)]
    for other in others:
        other.array.fill_(0x11)
    device.synchronize()
    hold(record_gate, GateResult("G1", float((view != 0x5A).sum()), 0.0, "bytes of a freed buffer that is in use"))
    device.allocator.free_tag(TAG)


@conforms(level="L1", clause="6.4", negative=True)
def test_freed_memory_can_be_lent_again_without_end(subject: Subject) -> None:
    """A hundred times the limit, one piece after the other."""
    limit = 64 << 20
    with subject.opened(replace(subject.workload(), memory_limit_bytes=limit)) as device:
        for _ in range(100):
            device.allocator.free(device.allocator.allocate(limit, TAG))
        assert device.allocator.stats().peak_bytes == limit


@conforms(level="L1", clause="5.1", deadline_s=120)
def test_open_and_close_many_times(subject: Subject) -> None:
    workload = subject.workload()
    plan = subject.plan(workload)
    for _ in range(100):
        device = subject.platform.open(plan, 0)
        device.allocator.allocate(1 << 20, TAG)
        device.close()


@conforms(level="L1", clause="5.1", negative=True)
def test_close_is_idempotent_and_gives_everything_back(subject: Subject) -> None:
    device = subject.platform.open(subject.plan(subject.workload()), 0)
    device.allocator.allocate(1000, TAG)
    for _ in range(10):
        device.close()
    assert device.allocator.stats().allocated_bytes == 0
    assert not device.health(HEALTH_DEADLINE_S).healthy, "a closed device says that it is healthy"


@conforms(level="L1", clause="5.1")
def test_two_devices_are_open_at_once(subject: Subject) -> None:
    with subject.opened() as first, subject.opened() as second:
        first.allocator.allocate(1000, TAG)
        assert not dict(second.allocator.stats().by_tag), "two open devices share one ledger"
        second.close()
        assert first.health(HEALTH_DEADLINE_S).healthy
        assert first.allocator.allocate(10, TAG).num_bytes == 10


@conforms(level="L1", clause="5.1")
def test_plan_is_the_one_that_was_opened(subject: Subject) -> None:
    plan = subject.plan(subject.workload())
    device = subject.platform.open(plan, 0)
    try:
        assert device.plan == plan
        assert device.allocator.stats().limit_bytes <= plan.memory.available_bytes
        assert plan.device_id in [found.device_id for found in subject.platform.probe().devices]
    finally:
        device.close()


@conforms(level="L1", clause="5.2")
def test_health_answers_within_its_deadline(device: Device) -> None:
    health = device.health(HEALTH_DEADLINE_S)
    assert isinstance(health, Health)
    assert health.healthy, health.detail
    assert health.detail


@conforms(level="L1", clause="5.2", negative=True)
@pytest.mark.parametrize("deadline_s", [0.0, 1e-9, 0.01])
def test_health_with_hardly_any_time_does_not_raise_or_hang(device: Device, deadline_s: float) -> None:
    started = time.monotonic()
    health = device.health(deadline_s)
    assert isinstance(health, Health)
    assert time.monotonic() - started < deadline_s + 1.0, "health took longer than its deadline"
    assert device.health(HEALTH_DEADLINE_S).healthy, "a deadline that passed made the device unhealthy"


@conforms(level="L1", clause="5.2", negative=True)
def test_health_answers_while_another_thread_asks(device: Device) -> None:
    answers: list[Health] = []
    threads = [threading.Thread(target=lambda: answers.append(device.health(HEALTH_DEADLINE_S))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * HEALTH_DEADLINE_S)
    assert [answer.healthy for answer in answers] == [True] * 4


@conforms(level="L1", clause="5.1")
def test_synchronize_shows_what_was_written(device: Device) -> None:
    buffer = device.allocator.allocate(1 << 20, TAG)
    for value in range(1, 50):
        buffer.array.fill_(value)
        device.synchronize()
        device.synchronize()
        assert int(buffer.array[-1]) == int(buffer.array[0]) == value
    device.allocator.free(buffer)


@conforms(level="L1", gate="G1", clause="6.1")
@pytest.mark.parametrize("dtype", [*cases("dtype", "float32", "bfloat16", "float16"), "int64", "uint8"])
def test_copies_between_host_and_device_keep_every_byte(device: Device, dtype: str, record_gate: Any) -> None:
    host = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    buffer = device.allocator.allocate(4096, TAG)
    buffer.array.view(getattr(torch, dtype)).copy_(host.view(getattr(torch, dtype)))
    device.synchronize()
    differs = float((buffer.array.cpu() != host).sum())
    device.allocator.free(buffer)
    hold(record_gate, GateResult("G1", differs, 0.0, f"bytes of a copy as {dtype}"))


@conforms(level="L1", clause=("4.3", "6.2"), negative=True)
def test_more_memory_than_there_is_is_refused_at_plan_time(subject: Subject) -> None:
    answer = subject.platform.plan(replace(subject.workload(), weight_bytes=2**60))
    assert isinstance(answer, Refusal), "2**60 bytes of weights were planned"
    assert any("weights" in reason for reason in answer.reasons), answer.reasons


@conforms(level="L1", clause="5.1", negative=True)
@pytest.mark.parametrize("rank", [-1, -(10**6)])
def test_ranks_that_cannot_be_are_refused(subject: Subject, rank: int) -> None:
    with pytest.raises(Exception, match=str(rank)):
        subject.platform.open(subject.plan(subject.workload()), rank).close()
