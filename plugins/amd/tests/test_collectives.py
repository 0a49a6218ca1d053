"""How ranks on GPUs meet: torch's process group for RCCL, made with a deadline and connected before its first use."""

import pytest
import torch
from torch.distributed import ProcessGroupGloo

from zif.contract import CommunicatorError, CommunicatorGroup
from zif.host.gloo import GlooCommunicator
from zif_amd.collectives import RcclGroups


@pytest.fixture
def group(tmp_path):
    return CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/meet", 20.0)


class _Options:
    """What torch's class has: a place for the deadline."""

    _timeout = None


class _StandIn:
    """Torch's class for RCCL on top of gloo. `connected` has the devices that groups were connected for."""

    Options = _Options
    connected: list[torch.device]

    def __init__(self, store, rank, size, options):
        inner = ProcessGroupGloo._Options()
        inner._timeout = options._timeout
        inner._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._gloo = ProcessGroupGloo(store, rank, size, inner)

    def __getattr__(self, name):
        return getattr(self._gloo, name)

    def eager_connect_single_device(self, device):
        self.connected.append(device)


@pytest.fixture
def softened(monkeypatch):
    """Calls that keep torch from ending the process, instead of the environment that they would change."""
    calls = []
    monkeypatch.setattr("zif_amd.collectives.let_collectives_fail", lambda: calls.append("let_collectives_fail"))
    return calls


def test_a_group_is_connected_for_its_device_before_it_is_used(group, softened, monkeypatch):
    monkeypatch.setattr(_StandIn, "connected", [], raising=False)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", _StandIn, raising=False)
    communicator = GlooCommunicator(group, RcclGroups("cuda:3"))
    assert _StandIn.connected == [torch.device("cuda", 3)]
    assert softened == ["let_collectives_fail"]
    assert communicator.all_reduce(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    communicator.close()


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(tmp_path, softened, monkeypatch):
    monkeypatch.setattr(_StandIn, "connected", [], raising=False)
    monkeypatch.setattr(_StandIn, "__init__", lambda self, store, rank, size, options: None)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", _StandIn, raising=False)
    group = CommunicatorGroup("half", 0, 2, f"file://{tmp_path}/meet", 0.5)
    with pytest.raises(CommunicatorError, match="rank 0 of 2 could not join"):
        GlooCommunicator(group, RcclGroups("cuda:0"))
    assert _StandIn.connected == []


def test_a_torch_without_rccl_is_an_error(group, softened, monkeypatch):
    monkeypatch.delattr(torch.distributed, "ProcessGroupNCCL", raising=False)
    with pytest.raises(CommunicatorError, match="without RCCL"):
        GlooCommunicator(group, RcclGroups("cuda:0"))
