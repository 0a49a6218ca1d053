"""What GPUs claim that run zif's kernels: features, dtypes, collectives, and facts for people. No array library."""

from dataclasses import dataclass

from zif.accelerator.gpu.software import GpuSoftware, dotted
from zif.contract import Capabilities, Collective, DeviceInfo, Feature, Numerics
from zif.host.facts import Host

INTERPRETER = "interpreter"
"""The id, and the architecture, of the device that Triton's interpreter simulates."""

DTYPES = ("float32", "bfloat16", "float16")
"""What the kernels compute with, where the hardware can."""

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
class ServedGpu:
    """A GPU that a platform serves, in its vendor's words. `facts` are for people; those without a value are not told.

    `dtypes` and `max_head_size` are less than the kernels' own where the hardware cannot; `notes` are those of claims.
    """

    name: str
    architecture: str
    memory_bytes: int
    available_bytes: int
    facts: tuple[tuple[str, str], ...]
    dtypes: tuple[str, ...] = DTYPES
    max_head_size: int = 512
    notes: tuple[str, ...] = ()


def gpu_info(device_id: str, gpu: ServedGpu, software: GpuSoftware, *, collectives: bool) -> DeviceInfo:
    """Describe a GPU, with the software that serves it."""
    facts = (
        ("torch", str(software.torch)),
        (software.toolkit, dotted(software.build)),
        ("triton", str(software.triton)),
        *gpu.facts,
    )
    return DeviceInfo(
        device_id=device_id,
        name=gpu.name,
        architecture=gpu.architecture,
        memory_bytes=gpu.memory_bytes,
        available_bytes=gpu.available_bytes,
        capabilities=_capabilities(gpu, collectives=collectives),
        runtime=tuple((name, fact) for name, fact in facts if fact),
    )


def interpreter_info(host: Host, software: GpuSoftware) -> DeviceInfo:
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


def _capabilities(gpu: ServedGpu | None, *, collectives: bool) -> Capabilities:
    """Claim what the kernels do; None is the interpreter, which does all of it."""
    dtypes = DTYPES if gpu is None else gpu.dtypes
    return Capabilities(
        dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in dtypes),
        features=_FEATURES,
        kv_dtypes=dtypes,
        block_sizes=(16, 32, 64, 128),
        max_head_size=512 if gpu is None else gpu.max_head_size,
        collectives=frozenset(Collective) if collectives else frozenset(),
        collective_dtypes=_COLLECTIVE_DTYPES if collectives else (),
        graph_capture=gpu is not None,
        static_code=True,
        simulated=gpu is None,
        notes=() if gpu is None else gpu.notes,
    )
