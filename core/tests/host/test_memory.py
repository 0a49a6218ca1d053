"""The host's allocator: ledger, alignment, recovery, and memory that really goes back."""

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zif.errors import OutOfMemoryError
from zif.host.memory import HostAllocator

MIB = 1 << 20
STATM = Path("/proc/self/statm")


def _resident_bytes():
    return int(STATM.read_text().split()[1]) * 4096


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 100_000), st.sampled_from(["weights", "kv"]), st.integers(0, 22)), max_size=8
    )
)
def test_buffers_are_zero_aligned_and_on_the_ledger(sizes):
    allocator = HostAllocator(1 << 30)
    buffers = [allocator.allocate(size, tag, 1 << shift) for size, tag, shift in sizes]
    for buffer, (size, _, shift) in zip(buffers, sizes, strict=True):
        assert buffer.array.shape == (size,)
        assert buffer.array.dtype is torch.uint8
        assert buffer.array.data_ptr() % (1 << shift) == 0
        assert not buffer.array.any()
        buffer.array.fill_(255)
    held = {tag: sum(s for s, t, _ in sizes if t == tag) for tag in {t for _, t, _ in sizes}}
    assert dict(allocator.stats().by_tag) == held
    for buffer in buffers:
        allocator.free(buffer)
    assert allocator.stats().by_tag == ()
    assert allocator.stats().peak_bytes == sum(held.values())


def test_the_limit_holds_and_the_allocator_recovers():
    allocator = HostAllocator(10 * MIB)
    first = allocator.allocate(6 * MIB, "kv")
    with pytest.raises(OutOfMemoryError, match="limit"):
        allocator.allocate(5 * MIB, "kv")
    assert allocator.stats().allocated_bytes == 6 * MIB
    allocator.free(first)
    allocator.free(allocator.allocate(10 * MIB, "kv"))


def test_what_the_system_refuses_is_an_out_of_memory_error():
    allocator = HostAllocator(1 << 70)
    for size in (1 << 62, 1 << 65):
        with pytest.raises(OutOfMemoryError, match="cannot map"):
            allocator.allocate(size, "kv")
    assert allocator.stats().allocated_bytes == 0
    assert allocator.allocate(64, "kv").array.numel() == 64


def test_a_buffer_is_freed_once_and_by_its_owner():
    allocator = HostAllocator(MIB)
    buffer = allocator.allocate(64, "kv")
    with pytest.raises(ValueError, match="not on loan"):
        HostAllocator(MIB).free(buffer)
    allocator.free(buffer)
    with pytest.raises(ValueError, match="not on loan"):
        allocator.free(buffer)


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc to see resident memory")
def test_freed_memory_goes_back_to_the_system():
    allocator = HostAllocator(1 << 30)
    before = _resident_bytes()
    buffer = allocator.allocate(200 * MIB, "kv")
    buffer.array.fill_(1)
    assert _resident_bytes() > before + 150 * MIB
    allocator.free(buffer)
    del buffer
    gc.collect()
    assert _resident_bytes() < before + 50 * MIB


def test_memory_outlives_its_loan_while_a_view_of_it_lives():
    allocator = HostAllocator(1 << 30)
    buffer = allocator.allocate(8 * MIB, "kv")
    view = buffer.array.view(torch.float32)[1000:]
    allocator.free(buffer)
    del buffer
    gc.collect()
    view.fill_(3.0)
    assert float(view.sum()) == 3.0 * view.numel()
