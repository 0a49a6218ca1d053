"""The device on torch's "cpu", with stand-ins where a module of torch drives one with memory of its own."""

import pytest
import torch

from zif.accelerator.device import AcceleratorDevice, Services
from zif.accelerator.graphs import BucketedGraphs, Capture
from zif.contract import CommunicatorGroup, EagerGraphs, MemoryPlan, Plan
from zif.errors import DeviceLostError
from zif.host.attention import TiledAttention
from zif.host.gloo import _make_gloo
from zif.reference.ops import ReferenceOps


class Repeat(Capture):
    def capture(self, function):
        function()
        return function


def _plan(device_id="cpu"):
    return Plan("some", device_id, (), (), MemoryPlan(1 << 20, 0, 0, 0), ())


def _services(**changes):
    return Services(**({"attention": TiledAttention(), "ops": ReferenceOps(), "make_group": _make_gloo} | changes))


@pytest.fixture
def device():
    device = AcceleratorDevice(_plan(), 0, _services())
    yield device
    device.close()


def test_services_are_those_given(device):
    assert isinstance(device.attention, TiledAttention)
    assert isinstance(device.graphs, EagerGraphs)
    assert (device.array_device, device.rank) == ("cpu", 0)
    assert device.allocator.stats().limit_bytes == 1 << 20
    device.synchronize()


def test_a_loss_while_core_computes_is_told(device):
    lost = r"device 'cpu' is lost: .*outside its memory; start the process anew"
    with pytest.raises(DeviceLostError, match=lost), device.watch():
        raise RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="shapes"), device.watch():
        raise RuntimeError("shapes do not fit")


def test_health_until_it_is_closed(device):
    assert device.health(20.0).healthy
    device.allocator.allocate(100, "kv")
    device.close()
    device.close()
    assert device.allocator.stats().allocated_bytes == 0
    assert device.health(20.0).detail == "the device is closed"


def test_health_never_raises(device, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch, "arange", fail)
    assert not device.health(20.0).healthy


def test_communicators_are_of_the_group_that_the_vendor_makes_and_closed_with_the_device(tmp_path):
    made = []

    def make(store, group, deadline):
        made.append(group.name)
        return _make_gloo(store, group, deadline)

    device = AcceleratorDevice(_plan(), 0, _services(make_group=make))
    communicator = device.communicator(CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/meet", 20.0))
    assert communicator.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
    device.close()
    assert made == ["alone"]
    with pytest.raises(Exception, match="closed"):
        communicator.barrier()


def test_sleep_forgets_graphs_and_keeps_tags(device):
    device.close()
    device = AcceleratorDevice(_plan(), 0, _services(graphs=BucketedGraphs(Repeat())))
    buffer = device.allocator.allocate(100, "weights")
    buffer.array.fill_(9)
    device.sleep({"weights"})
    device.wake()
    assert buffer.array.tolist() == [9] * 100
    device.close()


class Module:
    """A stand-in for torch's module of a device; `error` is what it says when asked to wait."""

    def __init__(self):
        self.current, self.error, self.num_emptied = 3, None, 0

    def current_device(self):
        return self.current

    def set_device(self, name):
        self.current = torch.device(name).index

    def synchronize(self, _):
        if self.error:
            raise self.error

    def empty_cache(self):
        self.synchronize(None)
        self.num_emptied += 1

    use_mem_pool = MemPool = None


@pytest.fixture
def module(monkeypatch):
    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


def test_the_device_is_the_current_one_while_it_is_open(module):
    device = AcceleratorDevice(_plan("meta:1"), 0, _services())
    assert module.current == 1
    device.close()
    assert module.current == 3
    assert module.num_emptied >= 1


def test_a_lost_device_is_named_and_can_be_closed(module):
    device = AcceleratorDevice(_plan("meta:1"), 0, _services())
    module.error = RuntimeError("device error: an illegal memory access was encountered")
    with pytest.raises(DeviceLostError, match="'meta:1'"):
        device.synchronize()
    device.close()
    device.close()
