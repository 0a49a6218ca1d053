"""The CPU as a platform: what it offers, and how a workload is planned on it. Imports no array library.

Called by discovery through `zif_cpu.plugin`; `open` is the only method that imports torch's device side.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zif.contract import (
    Capabilities,
    Collective,
    Device,
    DeviceInfo,
    Feature,
    KVSizing,
    Numerics,
    Offer,
    Plan,
    Platform,
    Probe,
    Refusal,
    Workload,
    negotiate,
)
from zif.errors import ConfigError, PlatformUnavailableError
from zif.host.facts import Host, read_host
from zif.host.layout import kv_layout
from zif.host.packages import installed_version, torch_problem
from zif_cpu.library import Kernels, choose_kernels
from zif_cpu.settings import instruction_set, limit_spinning, num_threads

_MIN_TORCH = (2, 8)
_DTYPES = ("float32", "bfloat16", "float16")

_CAPABILITIES = Capabilities(
    dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in _DTYPES),
    features=frozenset(
        {
            Feature.ATTENTION_FULL,
            Feature.ATTENTION_SLIDING_WINDOW,
            Feature.ATTENTION_SOFTCAP,
            Feature.ATTENTION_SINKS,
            Feature.STATE_RECURRENT,
            Feature.MIXTURE_OF_EXPERTS,
            Feature.QUANTIZATION_MXFP4_DEQUANTIZED,
            Feature.QUANTIZATION_W8A8,
            Feature.QUANTIZATION_W8A16,
            Feature.QUANTIZATION_W4A16,
            Feature.TRANSFORMERS_BACKEND,
            Feature.PREFIX_CACHING,
        }
    ),
    kv_dtypes=(*_DTYPES, "int8"),
    block_sizes=(8, 16, 32, 64, 128),
    max_head_size=512,
    collectives=frozenset(Collective),
    collective_dtypes=("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8"),
    notes=("threads of one process share the cores: run one rank per socket", "collectives run over gloo"),
)

_NATIVE = (
    ("attention", "zif_cpu.attention.NativeAttention"),
    ("graphs", "zif_cpu.programs.StepPrograms"),
    ("ops", "zif_cpu.operators.NativeOps"),
    ("quantization", "zif_cpu.quantized.QuantizedOps"),
)

_PORTABLE = (
    ("attention", "zif.host.attention.TiledAttention"),
    ("graphs", "zif.contract.EagerGraphs"),
    ("ops", "zif.reference.ops.ReferenceOps"),
)

_IMPLEMENTATIONS = (
    ("allocator", "zif.host.memory.HostAllocator"),
    ("communicator", "zif.host.gloo.GlooCommunicator"),
    ("runner", "core"),
    ("state", "zif.reference.state"),
)

_EMULATED = (
    (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, "weights are held in the model's dtype: about four times the bytes"),
)

_DECODED = "zif.reference.quantization: every product decodes its weight first, into 4 or 8 bytes per element"

_EMULATED_PORTABLY = (
    (Feature.MIXTURE_OF_EXPERTS, "zif.reference.ops.ReferenceOps: one matrix product per expert in use"),
    (Feature.QUANTIZATION_W8A8, _DECODED),
    (Feature.QUANTIZATION_W8A16, _DECODED),
    (Feature.QUANTIZATION_W4A16, _DECODED),
)


class CpuPlatform(Platform):
    """Any CPU that torch runs on. `root` is where `/proc` and `/sys` are found."""

    name = "cpu"
    vendor = "zif"
    preference = 0

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Probe:
        host = read_host(self._root)
        torch_version = installed_version("torch")
        steps = (*host.steps, f"torch: {torch_version or 'not installed'}")
        problem = torch_problem(torch_version, _MIN_TORCH)
        if problem or torch_version is None:
            return Probe((), problem, steps)
        try:
            kernels = choose_kernels(instruction_set())
        except ConfigError as error:
            return Probe((), str(error), steps)
        return Probe((_device_info(host, torch_version, kernels),), steps=steps)

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        kernels = choose_kernels(instruction_set())
        native = kernels.library is not None
        offer = Offer(
            platform=self.name,
            device=probe.devices[0],
            layout_of=kv_layout,
            implementations=tuple(sorted((*_IMPLEMENTATIONS, *(_NATIVE if native else _PORTABLE)))),
            emulated=_EMULATED if native else (*_EMULATED_PORTABLY, *_EMULATED),
            notes=tuple(_plan_notes(workload, probe.devices[0], kernels)),
            sizing=KVSizing(max_share=0.5),
        )
        return negotiate(workload, offer)

    def open(self, plan: Plan, rank: int) -> Device:
        if rank < 0:
            raise PlatformUnavailableError(f"rank {rank!r} does not exist; ranks are counted from 0")
        probe = self.probe()
        if not probe.devices:
            raise PlatformUnavailableError(probe.reason)
        limit_spinning()
        from zif.host.device import HostDevice

        threads = num_threads() or read_host(self._root).num_cores
        kernels = choose_kernels(instruction_set())
        if kernels.library is None:
            return HostDevice(plan, rank, threads)
        from zif_cpu.attention import NativeAttention
        from zif_cpu.operators import NativeOps
        from zif_cpu.programs import StepPrograms

        kernels.library.use(kernels.isa, threads)
        ops = NativeOps(kernels.library, kernels.isa, batch_invariant=plan.batch_invariant)
        attention = NativeAttention(kernels.library, batch_invariant=plan.batch_invariant)
        return HostDevice(plan, rank, threads, attention, ops, StepPrograms(kernels.library, (ops, attention)))


def _device_info(host: Host, torch_version: str, kernels: Kernels) -> DeviceInfo:
    return DeviceInfo(
        device_id="cpu",
        name=host.processor,
        architecture=host.architecture,
        memory_bytes=host.memory_bytes,
        available_bytes=host.available_bytes,
        capabilities=replace(
            _CAPABILITIES, batch_invariant=kernels.library is not None, graph_capture=kernels.library is not None
        ),
        runtime=(
            ("torch", torch_version),
            ("cores", str(host.num_cores)),
            ("instruction set", " ".join(host.isa_features) or "baseline"),
            ("kernels", kernels.isa or "torch"),
        ),
    )


def _plan_notes(workload: Workload, device: DeviceInfo, kernels: Kernels) -> Iterator[str]:
    """Yield what a user should know before the weights load."""
    runtime = dict(device.runtime)
    yield f"{runtime['cores']} cores, instruction set: {runtime['instruction set']}"
    if kernels.library is None:
        yield f"torch computes in place of native kernels: {kernels.reason}"
    else:
        yield f"native kernels: {kernels.isa}" + ("" if kernels.isa != "portable" else ", which are slow")
        if kernels.isa == "amx" and workload.dtype == "bfloat16":
            yield "matrices of bfloat16 take 12 bits per weight, without loss"
        if workload.batch_invariant:
            yield "batch-invariant: torch makes no products"
    native = {"bfloat16": {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}, "float16": {"avx512_fp16", "asimd"}}
    if workload.dtype in native and not native[workload.dtype] & {*runtime["instruction set"].split()}:
        yield f"this processor has no {workload.dtype} instructions: float32 may be faster, at twice the bytes"
