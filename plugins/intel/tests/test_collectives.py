"""Which process group stands behind a communicator: oneCCL's where its bindings are, gloo's else, XCCL's on GPUs."""

import sys
import types

import pytest
import torch
from torch.distributed import Backend, ProcessGroupGloo

from zif.contract import CommunicatorError, CommunicatorGroup
from zif_intel import collectives


@pytest.fixture
def group(tmp_path):
    return CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/meet", 20.0)


@pytest.fixture
def bindings(monkeypatch):
    """A stand-in for oneCCL's bindings, which registers a backend when it is imported; its calls are noted."""
    made = []

    def create(store, rank, size, timeout):
        made.append((rank, size, timeout.total_seconds()))
        options = ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        return ProcessGroupGloo(store, rank, size, options)

    name = "oneccl_bindings_for_pytorch"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(Backend._plugins, "CCL", Backend._BackendPlugin(create, False))
    monkeypatch.setattr(collectives, "installed_version", lambda _: "2.8.0")
    return made


def test_gloo_serves_where_the_bindings_are_not_installed(group):
    communicator = collectives.host_communicator(group)
    assert communicator.all_reduce(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    communicator.close()


def test_the_backend_that_the_bindings_register_serves(group, bindings):
    communicator = collectives.host_communicator(group)
    assert bindings == [(0, 1, 20.0)]
    assert communicator.all_gather(torch.arange(3)).tolist() == [0, 1, 2]
    communicator.close()


def test_bindings_that_register_nothing_are_an_error(group, bindings, monkeypatch):
    monkeypatch.delitem(Backend._plugins, "CCL")
    with pytest.raises(CommunicatorError, match="registers no backend"):
        collectives.host_communicator(group)


def test_a_torch_without_xccl_is_an_error(group):
    if hasattr(torch.distributed, "ProcessGroupXCCL"):
        pytest.skip("this torch is built with XCCL")
    with pytest.raises(CommunicatorError, match="without XCCL"):
        collectives.xccl_communicator(group)
