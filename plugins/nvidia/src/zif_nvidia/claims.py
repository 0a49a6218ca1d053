"""What the devices of this platform claim: features, dtypes, collectives, and facts for people. No array library."""

from dataclasses import dataclass

from zif.contract import Capabilities, Collective, DeviceInfo, Feature, Numerics
from zif.host.facts import Host
from zif_nvidia.architectures import Architecture
from zif_nvidia.hardware import Gpu, Hardware
from zif_nvidia.software import Software

INTERPRETER = "interpreter"
"""The id, and the architecture, of the device that Triton's interpreter simulates."""

CONTEXT_BYTES = 512 << 20
"""What CUDA, its libraries and their kernels take of a GPU's memory in each process, roughly."""

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
    """A GPU that this platform serves: its place among torch's devices, and its architecture."""

    index: int
    gpu: Gpu
    architecture: Architecture


def gpu_info(served: Served, software: Software, hardware: Hardware, num_gpus: int) -> DeviceInfo:
    """Describe a GPU. `num_gpus` of them are offered: ranks need one each, so one alone claims no collectives."""
    gpu = served.gpu
    facts = {
        "torch": str(software.torch),
        "CUDA": ".".join(map(str, software.cuda)),
        "triton": str(software.triton),
        "driver": f"{hardware.driver} (CUDA {'.'.join(map(str, hardware.cuda))})",
        "UUID": gpu.uuid,
        "other processes": str(gpu.num_processes) if gpu.num_processes else "",
        "busy": f"{gpu.busy_percent} %" if gpu.busy_percent else "",
    }
    return DeviceInfo(
        device_id=f"cuda:{served.index}",
        name=gpu.name,
        architecture=served.architecture.name,
        memory_bytes=gpu.memory_bytes,
        available_bytes=max(0, gpu.free_bytes - CONTEXT_BYTES),
        capabilities=_capabilities(served.architecture, collectives=num_gpus > 1),
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
    dtypes = tuple(d for d in _DTYPES if architecture is None or architecture.bfloat16 or d != "bfloat16")
    return Capabilities(
        dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in dtypes),
        features=_FEATURES,
        kv_dtypes=dtypes,
        block_sizes=(16, 32, 64, 128),
        # Heads of 512 elements in float32 take more shared memory than the parts before sm_80 have.
        max_head_size=512 if architecture is None or architecture.bfloat16 else 256,
        collectives=frozenset(Collective) if collectives else frozenset(),
        collective_dtypes=_COLLECTIVE_DTYPES if collectives else (),
        graph_capture=architecture is not None,
        static_code=True,
        simulated=architecture is None,
    )
