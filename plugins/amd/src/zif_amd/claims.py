"""What the devices of this platform claim: features, dtypes, collectives, and facts for people. No array library."""

from dataclasses import dataclass

from zif.contract import Capabilities, Collective, DeviceInfo, Feature, Numerics
from zif.host.facts import Host
from zif_amd.architectures import Architecture, target_name
from zif_amd.hardware import Gpu, Hardware
from zif_amd.settings import OVERRIDE
from zif_amd.software import Software

INTERPRETER = "interpreter"
"""The id, and the architecture, of the device that Triton's interpreter simulates."""

ASSUMED = "assumed architecture"
"""The fact that tells that the runtime was told to take the device for another one."""

_DTYPES = ("float32", "bfloat16", "float16")
_COLLECTIVE_DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8")
_FEATURES = frozenset(
    {
        Feature.ATTENTION_FULL,
        Feature.ATTENTION_SLIDING_WINDOW,
        Feature.ATTENTION_SOFTCAP,
        Feature.ATTENTION_SINKS,
        Feature.STATE_RECURRENT,
        Feature.MIXTURE_OF_EXPERTS,
        Feature.QUANTIZATION_MXFP4_DEQUANTIZED,
        Feature.TRANSFORMERS_BACKEND,
        Feature.PREFIX_CACHING,
    }
)


@dataclass(frozen=True, slots=True)
class Served:
    """A GPU that this platform serves: its place among torch's devices, and as which architecture."""

    index: int
    gpu: Gpu
    architecture: Architecture


def gpu_info(served: Served, software: Software, hardware: Hardware, num_gpus: int) -> DeviceInfo:
    """Describe a GPU. `num_gpus` of them are offered: ranks need one each, so one alone claims no collectives."""
    gpu, architecture = served.gpu, served.architecture
    own = target_name(gpu.target_version)
    facts = {
        "torch": str(software.torch),
        "ROCm": software.rocm,
        "triton": str(software.triton),
        "driver": f"amdgpu {hardware.driver}",
        "PCI": f"{gpu.pci_address} {gpu.pci_id}".strip(),
        "partition": gpu.partition,
        ASSUMED: f"{OVERRIDE} makes the runtime take this {own} for {architecture.name}" * (own != architecture.name),
    }
    return DeviceInfo(
        device_id=f"cuda:{served.index}",
        name=gpu.product or f"AMD {architecture.parts}",
        architecture=architecture.name,
        memory_bytes=gpu.memory_bytes,
        available_bytes=gpu.memory_bytes - gpu.used_bytes,
        capabilities=_capabilities(architecture, collectives=num_gpus > 1),
        runtime=tuple((name, fact) for name, fact in facts.items() if fact),
    )


def interpreter_info(host: Host, software: Software) -> DeviceInfo:
    """Describe the device that computes on the host what a GPU would. It takes a quarter of the host's memory."""
    return DeviceInfo(
        device_id=INTERPRETER,
        name="Triton interpreter on the host",
        architecture=INTERPRETER,
        memory_bytes=host.memory_bytes // 4,
        available_bytes=host.available_bytes // 4,
        capabilities=_capabilities(None, collectives=True),
        runtime=(("torch", str(software.torch)), ("triton", str(software.triton)), ("host", host.processor)),
    )


def _capabilities(architecture: Architecture | None, *, collectives: bool) -> Capabilities:
    return Capabilities(
        dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in _DTYPES),
        features=_FEATURES,
        kv_dtypes=_DTYPES,
        block_sizes=(16, 32, 64, 128),
        max_head_size=512,
        collectives=frozenset(Collective) if collectives else frozenset(),
        collective_dtypes=_COLLECTIVE_DTYPES if collectives else (),
        graph_capture=architecture is not None,
        static_code=True,
        simulated=architecture is None,
        notes=() if architecture is None else tuple(cost for dtype in _DTYPES for cost in architecture.costs(dtype)),
    )
