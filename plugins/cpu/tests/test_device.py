"""The opened CPU: threads, health, closing; and the plugin's settings."""

import pytest
import torch

from zif.contract import FullAttentionSpec, Workload
from zif.errors import ConfigError
from zif.host import health
from zif.host.device import HostDevice
from zif_cpu.platform import CpuPlatform
from zif_cpu.settings import num_threads


@pytest.fixture(scope="module")
def plan():
    spec = FullAttentionSpec((0,), 1, 16, 16, "float32")
    return CpuPlatform().plan(Workload("float32", (spec,), (16,), frozenset(), 1000, 1000, 128, 2, 64))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_the_device_uses_the_cores_it_may_and_puts_the_threads_back(plan):
    before = torch.get_num_threads()
    device = HostDevice(plan, 0, before + 1)
    assert torch.get_num_threads() == before + 1
    device.close()
    assert torch.get_num_threads() == before


def test_a_step_leaves_torch_the_threads_that_it_had(plan):
    device = HostDevice(plan, 0, 3)
    with device.watch():
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 3
    device.close()


def test_settings_go_before_the_cores(plan, monkeypatch):
    monkeypatch.setenv("ZIF_CPU_THREADS", "1")
    device = CpuPlatform().open(plan, 0)
    assert torch.get_num_threads() == 1
    device.close()


def test_opened_and_closed_fifty_times(plan):
    for _ in range(50):
        device = CpuPlatform().open(plan, 0)
        buffer = device.allocator.allocate(1 << 16, "kv")
        assert device.health(10.0).healthy
        device.synchronize()
        device.close()
        device.close()
        assert device.allocator.stats().allocated_bytes == 0
        assert not device.health(10.0).healthy
        del buffer


def test_health_says_when_arithmetic_is_wrong_fails_or_is_late(plan, monkeypatch):
    device = HostDevice(plan, 0, torch.get_num_threads())
    assert "no answer within 0.0 s" in device.health(0.0).detail or device.health(10.0).healthy

    def fail(_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(health, "_multiply", fail)
    assert "out of order" in device.health(10.0).detail
    assert not device.health(10.0).healthy
    monkeypatch.undo()
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert "is wrong" in device.health(10.0).detail
    device.close()


def test_the_limit_of_the_allocator_is_the_plans(plan):
    device = CpuPlatform().open(plan, 0)
    assert device.allocator.stats().limit_bytes == plan.memory.available_bytes
    device.close()


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"ZIF_CPU_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2),
        ({"ZIF_CPU_THREADS": ""}, None),
    ],
)
def test_settings_are_read_from_the_environment(environ, threads):
    assert num_threads(environ) == threads


@pytest.mark.parametrize("text", ["0", "-1", "many", "5000", "1.5"])
def test_a_wrong_number_of_threads_is_an_error(text):
    with pytest.raises(ConfigError, match="ZIF_CPU_THREADS"):
        num_threads({"ZIF_CPU_THREADS": text})
