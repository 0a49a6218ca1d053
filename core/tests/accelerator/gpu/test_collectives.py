"""How ranks on GPUs meet: torch's process group of a vendor, made with a deadline, connected before its first use."""

import pytest
import torch
from torch.distributed import ProcessGroupGloo

from zif.accelerator.gpu.collectives import ConnectedGroups
from zif.contract import CommunicatorError, CommunicatorGroup
from zif.host.gloo import GlooCommunicator


class SomeGroups(ConnectedGroups):
    class_name = "ProcessGroupOfSomeone"
    library = "SomeCL"
    build = "some system"
    let: list = []  # noqa: RUF012

    def _let_calls_fail(self):
        self.let.append("let")


class Options:
    """What torch's class has: a place for the deadline, and one for the priority of its stream."""

    _timeout = None
    is_high_priority_stream = True


class StandIn:
    """Torch's class on top of gloo. `connected` has the devices that groups were connected for."""

    Options = Options
    connected: list = []  # noqa: RUF012

    def __init__(self, store, rank, size, options):
        assert not options.is_high_priority_stream
        inner = ProcessGroupGloo._Options()
        inner._timeout = options._timeout
        inner._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._gloo = ProcessGroupGloo(store, rank, size, inner)

    def __getattr__(self, name):
        return getattr(self._gloo, name)

    def eager_connect_single_device(self, device):
        self.connected.append(device)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "connected", [])
    monkeypatch.setattr(SomeGroups, "let", [])
    monkeypatch.setattr(torch.distributed, SomeGroups.class_name, StandIn, raising=False)
    return StandIn


def test_a_group_is_connected_for_its_device_before_it_is_used(stand_in, tmp_path):
    group = CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/meet", 20.0)
    communicator = GlooCommunicator(group, SomeGroups("meta:3"))
    assert stand_in.connected == [torch.device("meta", 3)]
    assert SomeGroups.let == ["let"]
    assert communicator.all_reduce(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    communicator.close()


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in, "__init__", lambda self, store, rank, size, options: None)
    group = CommunicatorGroup("half", 0, 2, f"file://{tmp_path}/meet", 0.5)
    with pytest.raises(CommunicatorError, match="rank 0 of 2 could not join"):
        GlooCommunicator(group, SomeGroups("meta:0"))
    assert stand_in.connected == []


def test_a_torch_without_such_groups_is_an_error(tmp_path):
    group = CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/meet", 20.0)
    with pytest.raises(CommunicatorError, match="is built without SomeCL; install a build for some system"):
        GlooCommunicator(group, SomeGroups("meta:0"))
