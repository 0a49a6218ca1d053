"""Intel processors and GPUs as a platform: what is there, what IPEX adds, how a workload is planned.

Imports no array library. Two kinds of device: `cpu`, the host's processors, and `xpu:N`, GPUs with memory of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from zif.errors import PlatformUnavailableError
from zif.host.facts import Host, read_host
from zif.host.layout import kv_layout
from zif.host.packages import installed_version, release, torch_problem
from zif_intel.hardware import Gpu, read_gpus, read_numa_nodes
from zif_intel.settings import IntelSettings, limit_spinning, read_settings

_MIN_TORCH = (2, 8)
_IPEX = "intel_extension_for_pytorch"
_ONECCL = "oneccl_bindings_for_pytorch"
_DTYPES = ("float32", "bfloat16", "float16")
_COLLECTIVE_DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8")

_ATTENTION = frozenset(
    {
        Feature.ATTENTION_FULL,
        Feature.ATTENTION_SLIDING_WINDOW,
        Feature.ATTENTION_SOFTCAP,
        Feature.ATTENTION_SINKS,
        Feature.MIXTURE_OF_EXPERTS,
        Feature.QUANTIZATION_MXFP4_DEQUANTIZED,
        Feature.PREFIX_CACHING,
    }
)
_ALL = _ATTENTION | {Feature.STATE_RECURRENT, Feature.TRANSFORMERS_BACKEND}
_EMULATED = (
    (Feature.MIXTURE_OF_EXPERTS, "zif.reference.ops.ReferenceOps: one matrix product per expert in use"),
    (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, "weights are held in the model's dtype: about four times the bytes"),
)


@dataclass(frozen=True, slots=True)
class _Software:
    """The versions found, None where a package is not there. `ipex_reason`: why IPEX does not serve, "" if it does."""

    torch: str | None
    ipex: str | None
    oneccl: str | None
    ipex_reason: str

    @classmethod
    def read(cls, settings: IntelSettings) -> "_Software":
        torch, ipex = installed_version("torch"), installed_version(_IPEX)
        return cls(torch, ipex, installed_version(_ONECCL), _ipex_reason(torch, ipex, settings))

    def has_xpu(self) -> bool:
        """Say whether this build of torch drives Intel GPUs."""
        return self.torch is not None and "+xpu" in self.torch

    def steps(self) -> tuple[str, ...]:
        """Say what was found."""
        return (
            f"torch: {self.torch or 'not installed'}",
            f"{_IPEX}: {self.ipex or 'not installed'}{f', not used: {self.ipex_reason}' if self.ipex else ''}"
            if self.ipex_reason
            else f"{_IPEX}: {self.ipex}",
            f"{_ONECCL}: {self.oneccl or 'not installed'}",
        )


class IntelPlatform(Platform):
    """Intel processors and GPUs. `root` is where `/proc`, `/sys` and `/dev` are found."""

    name = "intel"
    vendor = "zif"
    preference = 20

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Probe:
        settings = read_settings()
        software = _Software.read(settings)
        host, gpus = read_host(self._root), read_gpus(self._root)
        nodes = read_numa_nodes(self._root)
        steps = (
            *software.steps(),
            *host.steps,
            f"NUMA nodes: {len(nodes) or 'not known'}",
            f"GPUs: {', '.join(f'{gpu.card} ({gpu.device_id}, {gpu.driver})' for gpu in gpus) or 'none'}",
        )
        if problem := torch_problem(software.torch, _MIN_TORCH):
            return Probe((), problem, steps)
        reasons = []
        devices: list[DeviceInfo] = []
        if settings.kind != "cpu":
            devices += _gpu_infos(gpus, software)
            if not devices:
                reasons.append(_no_gpu(gpus, software))
        if settings.kind != "xpu":
            if reason := _no_processor(host):
                reasons.append(reason)
            else:
                devices.append(_host_info(host, software, len(nodes)))
        return Probe(tuple(devices), "" if devices else "; ".join(reasons), steps)

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        device = probe.devices[0]
        on_host = device.device_id == "cpu"
        software = _Software.read(read_settings())
        offer = Offer(
            platform=self.name,
            device=device,
            layout_of=kv_layout,
            implementations=_implementations(software, on_host=on_host),
            emulated=_EMULATED,
            notes=tuple(_plan_notes(workload, device, software)),
            sizing=KVSizing(max_share=0.5 if on_host else 0.9),
        )
        return negotiate(workload, offer)

    def open(self, plan: Plan, rank: int) -> Device:
        if rank < 0:
            raise PlatformUnavailableError(f"rank {rank!r} does not exist; ranks are counted from 0")
        probe = self.probe()
        if not probe.devices:
            raise PlatformUnavailableError(probe.reason)
        settings = read_settings()
        limit_spinning()
        if plan.device_id != "cpu":
            from zif_intel.gpu import GpuDevice

            return GpuDevice(plan, rank)
        from zif_intel.processor import Cores, open_processor

        nodes = {node.number: node.processors for node in read_numa_nodes(self._root)}
        if settings.numa_node is not None and settings.numa_node not in nodes:
            known = ", ".join(map(str, nodes)) or "none"
            raise PlatformUnavailableError(f"there is no NUMA node {settings.numa_node}; nodes: {known}")
        processors = None if settings.numa_node is None else nodes[settings.numa_node]
        uses_ipex = not _Software.read(settings).ipex_reason
        num_threads = settings.num_threads or read_host(self._root).num_cores
        return open_processor(plan, rank, Cores(num_threads, processors), uses_ipex=uses_ipex)


def _ipex_reason(torch: str | None, ipex: str | None, settings: IntelSettings) -> str:
    if not settings.uses_ipex:
        return "ZIF_INTEL_IPEX is off"
    if ipex is None:
        return f"{_IPEX} is not installed"
    if torch is None or release(torch) != release(ipex):
        wanted = ".".join(map(str, release(ipex)))
        return f"{_IPEX} {ipex} needs torch=={wanted}.*, and torch is {torch}"
    return ""


def _no_gpu(gpus: tuple[Gpu, ...], software: _Software) -> str:
    if not gpus:
        return "no Intel GPU with memory of its own and a driver bound to it"
    return f"there are Intel GPUs, but torch {software.torch} is not a build for them; install one that is (+xpu)"


def _no_processor(host: Host) -> str:
    if host.architecture not in ("x86_64", "AMD64"):
        return f"the processor is {host.architecture}, not x86-64; the platform 'cpu' serves it"
    if "avx2" not in host.isa_features:
        return "the processor has no AVX2; the platform 'cpu' serves it"
    return ""


def _host_info(host: Host, software: _Software, num_nodes: int) -> DeviceInfo:
    return DeviceInfo(
        device_id="cpu",
        name=host.processor,
        architecture=host.architecture,
        memory_bytes=host.memory_bytes,
        available_bytes=host.available_bytes,
        capabilities=_capabilities(_ALL, collectives=True),
        runtime=(
            ("torch", str(software.torch)),
            ("ipex", f"off: {software.ipex_reason}" if software.ipex_reason else str(software.ipex)),
            ("cores", str(host.num_cores)),
            ("NUMA nodes", str(num_nodes or "not known")),
            ("instruction set", " ".join(host.isa_features)),
        ),
    )


def _gpu_infos(gpus: tuple[Gpu, ...], software: _Software) -> list[DeviceInfo]:
    if not software.has_xpu():
        return []
    return [
        DeviceInfo(
            device_id=f"xpu:{index}",
            name=f"Intel GPU {gpu.device_id}",
            architecture=gpu.device_id,
            memory_bytes=gpu.memory_bytes,
            available_bytes=gpu.memory_bytes,
            capabilities=_capabilities(_ATTENTION, collectives=True),
            runtime=(("torch", str(software.torch)), ("driver", gpu.driver)),
        )
        for index, gpu in enumerate(gpus)
    ]


def _capabilities(features: frozenset[Feature], *, collectives: bool) -> Capabilities:
    return Capabilities(
        dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in _DTYPES),
        features=features,
        kv_dtypes=_DTYPES,
        block_sizes=(8, 16, 32, 64, 128),
        max_head_size=256,
        collectives=frozenset(Collective) if collectives else frozenset(),
        collective_dtypes=_COLLECTIVE_DTYPES if collectives else (),
    )


def _implementations(software: _Software, *, on_host: bool) -> tuple[tuple[str, str], ...]:
    if not on_host:
        return (
            ("allocator", "zif_intel.gpu.GpuAllocator"),
            ("attention", "zif_intel.gathered.GatheredAttention"),
            ("communicator", "zif_intel.collectives.xccl_communicator"),
            ("graphs", "zif.contract.EagerGraphs"),
            ("ops", "zif.reference.ops.ReferenceOps"),
            ("runner", "core"),
        )
    plain = bool(software.ipex_reason)
    return (
        ("allocator", "zif.host.memory.HostAllocator"),
        ("attention", "zif.host.attention.TiledAttention" if plain else "zif_intel.ipex_attention.IpexAttention"),
        ("communicator", "zif_intel.collectives.host_communicator"),
        ("graphs", "zif.contract.EagerGraphs"),
        ("ops", "zif.reference.ops.ReferenceOps" if plain else "zif_intel.ipex_ops.IpexOps"),
        ("runner", "core"),
        ("state", "zif.reference.state"),
    )


def _plan_notes(workload: Workload, device: DeviceInfo, software: _Software) -> Iterator[str]:
    """Yield what a user should know before the weights load."""
    runtime = dict(device.runtime)
    if device.device_id != "cpu":
        yield "attention copies each step's blocks together and runs torch's fused kernel on them"
        return
    cores, nodes, instructions = runtime["cores"], runtime["NUMA nodes"], runtime["instruction set"]
    yield f"{cores} cores, NUMA nodes: {nodes}, instruction set: {instructions}"
    if nodes.isdecimal() and int(nodes) > 1:
        yield "memory of other NUMA nodes is slower: ZIF_INTEL_NUMA_NODE binds this process to one"
    if not software.ipex_reason:
        yield "IPEX serves decoding without window and sinks; torch's own kernels serve the rest of attention"
    else:
        lost = "paged attention, norms and rotations run in torch's own operations"
        yield f"IPEX does not serve ({software.ipex_reason}): {lost}"
    yield f"collectives run over {'oneCCL' if software.oneccl else 'gloo'}"
    native = {"bfloat16": {"amx_bf16", "avx512_bf16"}, "float16": {"avx512_fp16"}}
    if workload.dtype in native and not native[workload.dtype] & {*instructions.split()}:
        yield f"this processor has no {workload.dtype} instructions: float32 may be faster, at twice the bytes"
