"""Collectives: oneCCL between processes where its bindings are installed, else gloo; XCCL between GPUs."""

import importlib
from datetime import timedelta

import torch
from torch.distributed import Backend, Store  # type: ignore[attr-defined]

from zif.contract import Communicator, CommunicatorError, CommunicatorGroup
from zif.host.gloo import GlooCommunicator
from zif.host.packages import installed_version

_ONECCL = "oneccl_bindings_for_pytorch"


def host_communicator(group: CommunicatorGroup) -> Communicator:
    """Join a group of processes whose arrays lie in host memory."""
    if installed_version(_ONECCL) is None:
        return GlooCommunicator(group)
    return GlooCommunicator(group, _make_oneccl)


def xccl_communicator(group: CommunicatorGroup) -> Communicator:
    """Join a group of processes whose arrays lie on GPUs."""
    return GlooCommunicator(group, _make_xccl)


def _make_oneccl(store: Store, group: CommunicatorGroup, deadline: timedelta) -> object:
    """Make a group with the backend that importing the bindings registers under the name "ccl"."""
    importlib.import_module(_ONECCL)
    registered = Backend._plugins.get("CCL")
    if registered is None:
        raise CommunicatorError(f"{_ONECCL} registers no backend 'ccl'; reinstall it for torch {torch.__version__}")
    return registered.creator_fn(store, group.rank, group.world_size, deadline)


def _make_xccl(store: Store, group: CommunicatorGroup, deadline: timedelta) -> object:
    make = getattr(torch.distributed, "ProcessGroupXCCL", None)
    if make is None:
        raise CommunicatorError(f"torch {torch.__version__} is built without XCCL; install a build for Intel GPUs")
    options = make.Options()
    options._timeout = deadline
    return make(store, group.rank, group.world_size, options)
