"""Collectives between GPUs: NCCL, through torch's process group."""

from zif.accelerator.gpu.collectives import ConnectedGroups
from zif_nvidia.settings import let_collectives_fail


class NcclGroups(ConnectedGroups):
    """Groups of NCCL."""

    class_name = "ProcessGroupNCCL"
    library = "NCCL"
    build = "CUDA on Linux"

    def _let_calls_fail(self) -> None:
        let_collectives_fail()
