"""What the GPUs of this platform claim of what zif's kernels do, and facts for people. No array library."""

from zif.accelerator.gpu.claims import DTYPES, ServedGpu
from zif_amd.architectures import Architecture, target_name
from zif_amd.hardware import Gpu, Hardware
from zif_amd.settings import OVERRIDE

ASSUMED = "assumed architecture"
"""The fact that tells that the runtime was told to take the device for another one."""


def served_gpu(gpu: Gpu, architecture: Architecture, hardware: Hardware) -> ServedGpu:
    """Describe a GPU that is served as this architecture, which need not be its own."""
    own = target_name(gpu.target_version)
    assumed = f"{OVERRIDE} makes the runtime take this {own} for {architecture.name}"
    return ServedGpu(
        name=gpu.product or f"AMD {architecture.parts}",
        architecture=architecture.name,
        memory_bytes=gpu.memory_bytes,
        available_bytes=gpu.memory_bytes - gpu.used_bytes,
        facts=(
            ("driver", f"amdgpu {hardware.driver}"),
            ("PCI", f"{gpu.pci_address} {gpu.pci_id}".strip()),
            ("partition", gpu.partition),
            (ASSUMED, "" if own == architecture.name else assumed),
        ),
        notes=tuple(cost for dtype in DTYPES for cost in architecture.costs(dtype)),
    )
