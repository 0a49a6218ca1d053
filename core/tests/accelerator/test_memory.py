"""The allocator over torch's memory, on torch's device "cpu": ledger, recovery, pools, sleep and wake."""

import contextlib
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zif.accelerator import memory
from zif.accelerator.memory import AcceleratorAllocator
from zif.errors import DeviceLostError, OutOfMemoryError, PlatformError

MIB = 1 << 20


@pytest.fixture
def allocator():
    return AcceleratorAllocator(1 << 30, "cpu")


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 100_000), st.sampled_from(["weights", "kv"]), st.integers(0, 16)), max_size=8
    )
)
def test_buffers_are_zero_aligned_and_on_the_ledger(sizes):
    allocator = AcceleratorAllocator(1 << 30, "cpu")
    buffers = [allocator.allocate(size, tag, 1 << shift) for size, tag, shift in sizes]
    for buffer, (size, _, shift) in zip(buffers, sizes, strict=True):
        assert (buffer.array.shape, buffer.array.dtype) == ((size,), torch.uint8)
        assert buffer.array.data_ptr() % (1 << shift) == 0
        assert not buffer.array.any()
        buffer.array.fill_(255)
    held = {tag: sum(s for s, t, _ in sizes if t == tag) for tag in {t for _, t, _ in sizes}}
    assert dict(allocator.stats().by_tag) == held
    for tag in held:
        allocator.free_tag(tag)
    assert allocator.stats().by_tag == ()


def test_the_limit_holds_and_the_allocator_recovers():
    allocator = AcceleratorAllocator(10 * MIB, "cpu")
    first = allocator.allocate(6 * MIB, "kv")
    with pytest.raises(OutOfMemoryError, match="limit"):
        allocator.allocate(5 * MIB, "kv")
    allocator.free(first)
    allocator.free(allocator.allocate(10 * MIB, "kv"))


@pytest.mark.parametrize("size", [1 << 50, (1 << 63) - 100, 1 << 65])
def test_what_torch_refuses_is_an_out_of_memory_error(size):
    allocator = AcceleratorAllocator(1 << 70, "cpu")
    with pytest.raises(OutOfMemoryError, match="cannot hold"):
        allocator.allocate(size, "kv")
    assert allocator.stats().allocated_bytes == 0
    assert allocator.allocate(64, "kv").array.numel() == 64


def test_memory_outlives_its_loan_while_a_view_of_it_lives(allocator):
    buffer = allocator.allocate(8 * MIB, "kv")
    view = buffer.array.view(torch.float32)[1000:]
    allocator.free(buffer)
    del buffer
    gc.collect()
    view.fill_(3.0)
    assert float(view.sum()) == 3.0 * view.numel()


def _refusing(monkeypatch, *errors):
    """Let the next allocations of torch fail in this way; returns how often the caches were emptied."""
    zeros, left, emptied = torch.zeros, list(errors), []

    def maybe(*arguments, **named):
        if left and (error := left.pop(0)) is not None:
            raise error
        return zeros(*arguments, **named)

    monkeypatch.setattr(torch, "zeros", maybe)
    monkeypatch.setattr(memory, "empty_caches", emptied.append)
    return emptied


def test_caches_are_emptied_and_the_allocation_tried_again(allocator, monkeypatch):
    emptied = _refusing(monkeypatch, torch.OutOfMemoryError("device out of memory"))
    assert allocator.allocate(100, "kv").num_bytes == 100
    assert emptied == ["cpu"]


def test_after_the_second_refusal_the_allocator_is_usable(allocator, monkeypatch):
    _refusing(monkeypatch, torch.OutOfMemoryError("Tried to allocate"), RuntimeError("error: out of memory"))
    with pytest.raises(OutOfMemoryError, match="cannot hold 100 bytes more"):
        allocator.allocate(100, "kv")
    assert allocator.stats().allocated_bytes == 0
    assert allocator.allocate(100, "kv").num_bytes == 100


def test_a_lost_device_is_no_shortage(allocator, monkeypatch):
    emptied = _refusing(monkeypatch, RuntimeError("device error: an illegal memory access was encountered"))
    with pytest.raises(DeviceLostError, match="outside its memory"):
        allocator.allocate(100, "kv")
    assert emptied == []


def test_other_errors_pass(allocator, monkeypatch):
    _refusing(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        allocator.allocate(100, "kv")


class PoolModule:
    """A stand-in for torch's module of a device that has memory pools; `log` notes what is asked of them."""

    def __init__(self):
        self.log, self.num_pools = [], 0

    def MemPool(self):
        self.num_pools += 1
        return self.num_pools

    @contextlib.contextmanager
    def use_mem_pool(self, pool, device):
        self.log.append(f"in {pool}")
        yield
        self.log.append("out")

    def empty_cache(self):
        self.log.append("empty")


@pytest.fixture
def pools(monkeypatch):
    module = PoolModule()
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


def test_each_tag_has_a_pool_as_long_as_it_has_buffers(pools):
    allocator = AcceleratorAllocator(1 << 30, "cpu")
    for tag in ("weights", "kv", "weights"):
        allocator.allocate(100, tag)
    assert pools.log == ["in 1", "out", "in 2", "out", "in 1", "out"]
    pools.log.clear()
    allocator.free_tag("weights")
    allocator.allocate(100, "weights")
    assert pools.log == ["empty", "in 3", "out"]


def test_sleep_leaves_the_pools_and_wake_makes_new_ones(pools):
    allocator = AcceleratorAllocator(1 << 30, "cpu")
    allocator.allocate(100, "weights")
    pools.log.clear()
    allocator.sleep()
    assert pools.log == ["empty"]
    allocator.wake()
    assert pools.log == ["empty", "in 2", "out"]


@pytest.mark.parametrize("mode", [torch.inference_mode(False), torch.inference_mode()])
def test_kept_bytes_come_back_and_others_are_zero(mode):
    allocator = AcceleratorAllocator(1 << 30, "cpu")
    with mode:
        weights, kv = allocator.allocate(10_000, "weights"), allocator.allocate(MIB, "kv", alignment=64)
        view = weights.array[16:].view(torch.int16)[3:]
        weights.array.copy_(torch.arange(10_000) % 251)
        kv.array.fill_(7)
    wanted = view.clone()
    allocator.sleep({"weights"})
    assert [buffer.array.untyped_storage().nbytes() for buffer in (weights, kv)] == [0, 0]
    assert dict(allocator.stats().by_tag) == {"weights": 10_000, "kv": MIB}
    allocator.sleep({"weights"})
    allocator.wake()
    allocator.wake()
    assert torch.equal(view, wanted), "views see the memory that they saw before"
    assert torch.equal(weights.array.long(), torch.arange(10_000) % 251)
    assert not kv.array.any()
    allocator.allocate(100, "kv")


def test_a_sleeping_allocator_lends_nothing_and_takes_buffers_back(allocator):
    kept, freed = allocator.allocate(100, "kv"), allocator.allocate(200, "kv")
    kept.array.fill_(5)
    allocator.sleep({"kv"})
    with pytest.raises(PlatformError, match="sleeps"):
        allocator.allocate(100, "kv")
    allocator.free(freed)
    allocator.wake()
    assert kept.array.tolist() == [5] * 100
    assert allocator.stats().allocated_bytes == 100


class FullDevice:
    """Refuse to grow storages beyond this many bytes in all."""

    def __init__(self, monkeypatch):
        self.room = 0
        resize = torch.UntypedStorage.resize_

        def maybe(storage, num_bytes):
            if num_bytes > self.room:
                raise torch.OutOfMemoryError("the device is out of memory")
            self.room -= num_bytes
            return resize(storage, num_bytes)

        monkeypatch.setattr(torch.UntypedStorage, "resize_", maybe)


def test_waking_without_memory_can_be_tried_again(allocator, monkeypatch):
    first, second = allocator.allocate(100, "weights"), allocator.allocate(200, "weights")
    first.array.fill_(1)
    second.array.fill_(2)
    allocator.sleep({"weights"})
    device = FullDevice(monkeypatch)
    device.room = 150
    with pytest.raises(OutOfMemoryError, match="cannot hold 200 bytes"):
        allocator.wake()
    with pytest.raises(PlatformError, match="sleeps"):
        allocator.allocate(1, "kv")
    device.room = 200
    allocator.wake()
    assert first.array.tolist() == [1] * 100
    assert second.array.tolist() == [2] * 200


def test_without_host_memory_nothing_falls_asleep(allocator, monkeypatch):
    buffer = allocator.allocate(100, "weights")
    buffer.array.fill_(3)

    def refuse(*_, **__):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfMemoryError, match="host memory cannot keep"):
        allocator.sleep({"weights"})
    monkeypatch.undo()
    assert buffer.array.tolist() == [3] * 100
    allocator.allocate(100, "kv")


def test_memory_that_would_wake_misaligned_is_refused(allocator, monkeypatch):
    buffer = allocator.allocate(64, "kv", alignment=1 << 20)
    allocator.sleep()
    resize, blocks = torch.UntypedStorage.resize_, []

    def elsewhere(storage, num_bytes):
        """Make room in front of the storage until it is at another offset from a multiple of the alignment."""
        resize(storage, num_bytes)
        while num_bytes and buffer.array.data_ptr() % (1 << 20) == 0:
            resize(storage, 0)
            blocks.append(torch.empty((1 << 20) + 4096 * len(blocks), dtype=torch.uint8))
            resize(storage, num_bytes + 4096 * len(blocks))
        return storage

    monkeypatch.setattr(torch.UntypedStorage, "resize_", elsewhere)
    with pytest.raises(PlatformError, match="multiple of 1048576"):
        allocator.wake()
    assert buffer.array.untyped_storage().nbytes() == 0
