"""The opened XLA device: the services of one worker process."""

import logging
from pathlib import Path

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch_xla.backends import set_mat_mul_precision

from zif.contract import Communicator, CommunicatorError, CommunicatorGroup, Device, Health, Plan
from zif.host.health import check_health
from zif_tpu.attention import XlaAttention
from zif_tpu.memory import XlaAllocator
from zif_tpu.ops import XlaOps
from zif_tpu.programs import wait_for_late_compilations
from zif_tpu.settings import TpuSettings
from zif_tpu.sharding import Sharding

_CLOSE_DEADLINE_S = 60.0

logger = logging.getLogger(__name__)


class XlaDevice(Device):
    """The chips of this host, or its processor, as XLA sees them. Outside programs, computation is traced and lazy."""

    array_device = "xla"
    allocator: XlaAllocator

    def __init__(self, plan: Plan, rank: int, pjrt_device: str, settings: TpuSettings) -> None:
        self.plan = plan
        self.rank = rank
        self.pjrt_device = pjrt_device
        self.settings = settings
        _set_up_compiler(pjrt_device, settings.cache_folder)
        self.allocator = XlaAllocator(plan.memory.available_bytes, self.array_device)
        self.attention = XlaAttention(self.array_device, uses_kernel=pjrt_device == "TPU")
        self.ops = XlaOps()
        self.sharding = Sharding(plan.tensor_parallel_size)
        self._closed = False

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        raise CommunicatorError(
            f"group {group.name!r}: one process drives all devices of this host, and XLA puts the collectives into its "
            "programs; groups of processes are not served"
        )

    def synchronize(self) -> None:
        torch_xla.sync(wait=True)
        xm.wait_device_ops()

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, "the device is closed")
        return check_health(self.array_device, deadline_s)

    def close(self) -> None:
        self._closed = True
        wait_for_late_compilations(_CLOSE_DEADLINE_S)
        for tag, _ in self.allocator.stats().by_tag:
            self.allocator.free_tag(tag)


def _set_up_compiler(pjrt_device: str, cache_folder: Path | None) -> None:
    """Ask for float32 products in float32, and keep compiled programs where XLA can load them again.

    A TPU multiplies float32 in bfloat16 otherwise. Programs for a host's processor can be stored and not loaded.
    """
    set_mat_mul_precision("highest")
    if pjrt_device == "TPU" and cache_folder is not None and not xr.is_cache_initialized():
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning(
                "compiled programs are not kept: %s; set ZIF_TPU_CACHE to a folder that can be written", error
            )
        else:
            xr.initialize_cache(str(cache_folder), readonly=False)
