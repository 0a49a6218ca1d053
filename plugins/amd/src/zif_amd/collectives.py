"""Collectives between GPUs: RCCL, which builds of torch for ROCm offer as `ProcessGroupNCCL`."""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from zif.contract import CommunicatorError, CommunicatorGroup
from zif_amd.settings import let_collectives_fail


class RcclGroups:
    """Makes process groups for one device, which each of them is bound to."""

    def __init__(self, array_device: str) -> None:
        self._device = torch.device(array_device)

    def __call__(self, store: Store, group: CommunicatorGroup, deadline: timedelta) -> object:
        """Make a group; returns when every rank is connected. Raises `RuntimeError` when they do not come in time.

        Raises `CommunicatorError` when this build of torch has no RCCL.
        """
        make: Any = getattr(torch.distributed, "ProcessGroupNCCL", None)
        if make is None:
            raise CommunicatorError(f"torch {torch.__version__} is built without RCCL; install a build for ROCm")
        let_collectives_fail()
        options = make.Options()
        options._timeout = deadline
        joined = make(store, group.rank, group.world_size, options)
        # RCCL waits without end for ranks that do not come, so they meet in the store first.
        store.set(f"here/{group.rank}", "yes")
        store.wait([f"here/{rank}" for rank in range(group.world_size)], deadline)
        # Connected now and not at the first call, of which a barrier would have to guess the device.
        joined.eager_connect_single_device(self._device)
        return joined
