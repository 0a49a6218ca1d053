"""How ranks on GPUs meet: through torch's class for RCCL, with calls that fail softly."""

from datetime import timedelta

import pytest
import torch

from zif.contract import CommunicatorError, CommunicatorGroup
from zif_amd.collectives import RcclGroups

GROUP = CommunicatorGroup("alone", 0, 1, "file:///nowhere", 20.0)


class _Group:
    """Torch's class for RCCL."""

    class Options:
        pass

    def __init__(self, store, rank, size, options):
        self.connected = []

    def eager_connect_single_device(self, device):
        self.connected.append(str(device))


class _Store(dict):
    set = dict.__setitem__

    def wait(self, keys, deadline):
        assert set(keys) <= set(self)


@pytest.fixture
def softened(monkeypatch):
    """Calls that keep torch from ending the process, instead of the environment that they would change."""
    calls = []
    monkeypatch.setattr("zif_amd.collectives.let_collectives_fail", lambda: calls.append("let_collectives_fail"))
    return calls


def test_a_group_is_one_of_rccl_for_its_device(softened, monkeypatch):
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", _Group, raising=False)
    assert RcclGroups("cuda:3")(_Store(), GROUP, timedelta(seconds=1)).connected == ["cuda:3"]
    assert softened == ["let_collectives_fail"]


def test_a_torch_without_rccl_is_an_error(softened, monkeypatch):
    monkeypatch.delattr(torch.distributed, "ProcessGroupNCCL", raising=False)
    with pytest.raises(CommunicatorError, match="is built without RCCL; install a build for ROCm"):
        RcclGroups("cuda:0")(_Store(), GROUP, timedelta(seconds=1))
