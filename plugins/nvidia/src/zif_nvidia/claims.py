"""What the GPUs of this platform claim of what zif's kernels do, and facts for people. No array library."""

from zif.accelerator.gpu.claims import DTYPES, ServedGpu
from zif_nvidia.architectures import ARCHITECTURES
from zif_nvidia.hardware import Gpu, Hardware

CONTEXT_BYTES = 512 << 20
"""What CUDA, its libraries and their kernels take of a GPU's memory in each process, roughly."""


def served_gpu(gpu: Gpu, hardware: Hardware) -> ServedGpu:
    """Describe a GPU that is served."""
    bfloat16 = ARCHITECTURES[gpu.architecture].bfloat16
    return ServedGpu(
        name=gpu.name,
        architecture=gpu.architecture,
        memory_bytes=gpu.memory_bytes,
        available_bytes=max(0, gpu.free_bytes - CONTEXT_BYTES),
        facts=(
            ("driver", f"{hardware.driver} (CUDA {'.'.join(map(str, hardware.cuda))})"),
            ("UUID", gpu.uuid),
            ("other processes", str(gpu.num_processes) if gpu.num_processes else ""),
            ("busy", f"{gpu.busy_percent} %" if gpu.busy_percent else ""),
        ),
        dtypes=tuple(dtype for dtype in DTYPES if bfloat16 or dtype != "bfloat16"),
        # Heads of 512 elements in float32 take more shared memory than the parts before sm_80 have.
        max_head_size=512 if bfloat16 else 256,
    )
