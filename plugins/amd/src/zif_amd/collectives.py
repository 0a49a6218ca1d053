"""Collectives between GPUs: RCCL, which builds of torch for ROCm offer as `ProcessGroupNCCL`."""

from zif.accelerator.gpu.collectives import ConnectedGroups
from zif_amd.settings import let_collectives_fail


class RcclGroups(ConnectedGroups):
    """Groups of RCCL."""

    class_name = "ProcessGroupNCCL"
    library = "RCCL"
    build = "ROCm"

    def _let_calls_fail(self) -> None:
        let_collectives_fail()
