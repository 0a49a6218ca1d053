"""Collectives between GPUs through one of torch's process groups, without touching torch's default one."""

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from zif.contract import CommunicatorError, CommunicatorGroup


class ConnectedGroups(ABC):
    """Makes process groups for one device, which each of them is bound to and connected for.

    Vendors name torch's class, the library behind it, and the build of torch that has it.
    """

    class_name: str
    library: str
    build: str

    def __init__(self, array_device: str) -> None:
        self._device = torch.device(array_device)

    @abstractmethod
    def _let_calls_fail(self) -> None:
        """Let the group's calls wait on the host, and raise past their deadline instead of ending the process."""

    def __call__(self, store: Store, group: CommunicatorGroup, deadline: timedelta) -> object:
        """Make a group; returns when every rank is connected. Raises `RuntimeError` when they do not come in time.

        Raises `CommunicatorError` when this build of torch has no such groups.
        """
        make: Any = getattr(torch.distributed, self.class_name, None)
        if make is None:
            raise CommunicatorError(
                f"torch {torch.__version__} is built without {self.library}; install a build for {self.build}"
            )
        self._let_calls_fail()
        options = make.Options()
        options._timeout = deadline
        options.is_high_priority_stream = False
        joined = make(store, group.rank, group.world_size, options)
        # Libraries wait without end for ranks that do not come, so they meet in the store first.
        store.set(f"here/{group.rank}", "yes")
        store.wait([f"here/{rank}" for rank in range(group.world_size)], deadline)
        # Connected now and not at the first call, of which a barrier would have to guess the device.
        joined.eager_connect_single_device(self._device)
        return joined
