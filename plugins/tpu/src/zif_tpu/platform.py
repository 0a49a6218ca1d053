"""TPUs as a platform: what is there, whether the versions fit, and how a workload is planned. Imports no array library.

`PJRT_DEVICE=CPU` makes a device of the host's processor: the same programs, compiled by XLA for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zif.contract import (
    AttentionSpec,
    Capabilities,
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
    SchedulerConstraints,
    Workload,
    negotiate,
)
from zif.errors import PlatformUnavailableError
from zif.host.facts import read_host
from zif.host.packages import installed_version, release
from zif_tpu.buckets import Buckets
from zif_tpu.hardware import read_chips
from zif_tpu.layout import kv_layout, unlike_pages
from zif_tpu.settings import TpuSettings, read_settings, set_up_process

_DTYPES = ("float32", "bfloat16")
_FEATURES = frozenset(
    {
        Feature.ATTENTION_FULL,
        Feature.ATTENTION_SLIDING_WINDOW,
        Feature.ATTENTION_SOFTCAP,
        Feature.ATTENTION_SINKS,
        Feature.MIXTURE_OF_EXPERTS,
        Feature.PREFIX_CACHING,
        Feature.QUANTIZATION_MXFP4_DEQUANTIZED,
    }
)
_EMULATED = (
    (Feature.MIXTURE_OF_EXPERTS, "zif_tpu.ops.XlaOps: every expert computes every token, so that shapes are static"),
    (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, "weights are held in the model's dtype: about four times the bytes"),
)
_IMPLEMENTATIONS = (
    ("allocator", "zif_tpu.memory.XlaAllocator"),
    ("attention", "zif_tpu.attention.XlaAttention"),
    ("graphs", "zif.contract.EagerGraphs"),
    ("ops", "zif_tpu.ops.XlaOps"),
    ("parallel", "zif_tpu.sharding.Sharding"),
    ("runner", "zif_tpu.runner.XlaRunner"),
    ("sampler", "zif_tpu.sampling.choose"),
)


@dataclass(frozen=True, slots=True)
class _Versions:
    torch: str | None
    torch_xla: str | None

    def problem(self) -> str:
        """Say why these versions do not run together; "" when they do. Asked before a shared library is loaded."""
        if self.torch_xla is None:
            return "torch_xla is not installed; install zif-tpu with constraints/tpu.txt"
        if self.torch is None:
            return (
                f"torch is not installed, and torch_xla {self.torch_xla} needs it; install it with constraints/tpu.txt"
            )
        if release(self.torch) != release(self.torch_xla):
            wanted = ".".join(map(str, release(self.torch_xla)))
            return (
                f"torch {self.torch} and torch_xla {self.torch_xla} do not fit: torch_xla is built for the torch of "
                f"its own release, torch=={wanted}.*; install both with constraints/tpu.txt in their own environment"
            )
        return ""


class TpuPlatform(Platform):
    """TPUs through XLA. `root` is where `/proc`, `/sys` and `/dev` are found."""

    name = "tpu"
    vendor = "zif"
    preference = 50

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Probe:
        settings = read_settings()
        versions = _Versions(installed_version("torch"), installed_version("torch_xla"))
        steps = (
            f"torch: {versions.torch or 'not installed'}",
            f"torch_xla: {versions.torch_xla or 'not installed'}",
            f"PJRT_DEVICE: {settings.pjrt_device or 'not set'}",
        )
        if problem := versions.problem():
            return Probe((), problem, steps)
        runtime = (("torch", str(versions.torch)), ("torch_xla", str(versions.torch_xla)))
        if settings.pjrt_device == "CPU":
            return Probe((self._host_device(settings, runtime),), steps=steps)
        if settings.pjrt_device not in ("", "TPU"):
            return Probe(
                (), f"PJRT_DEVICE={settings.pjrt_device!r} is neither TPU nor CPU; unset it or set it to one", steps
            )
        return self._probe_chips(runtime, steps)

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        device = probe.devices[0]
        buckets = buckets_of(workload)
        offer = Offer(
            platform=self.name,
            device=device,
            layout_of=kv_layout,
            implementations=_IMPLEMENTATIONS,
            emulated=_EMULATED,
            constraints=SchedulerConstraints(token_buckets=buckets.widths, batch_buckets=buckets.rows),
            notes=_plan_notes(buckets, dict(device.runtime)["pjrt device"], workload.tensor_parallel_size),
            sizing=KVSizing(max_share=0.5 if device.device_id == "xla:cpu" else 0.9),
        )
        answer = negotiate(workload, offer)
        reasons = (*unlike_pages(workload.kv_specs), *_unfit_parallel(workload, device))
        if not reasons:
            return answer
        return Refusal(self.name, (*(answer.reasons if isinstance(answer, Refusal) else ()), *reasons))

    def open(self, plan: Plan, rank: int) -> Device:
        if rank < 0:
            raise PlatformUnavailableError(f"rank {rank!r} does not exist; ranks are counted from 0")
        probe = self.probe()
        if not probe.devices:
            raise PlatformUnavailableError(probe.reason)
        pjrt_device = dict(probe.devices[0].runtime)["pjrt device"]
        set_up_process(pjrt_device)
        from zif_tpu.device import XlaDevice

        settings = read_settings()
        return XlaDevice(plan, rank, pjrt_device, settings)

    def _probe_chips(self, runtime: tuple[tuple[str, str], ...], steps: tuple[str, ...]) -> Probe:
        chips = read_chips(self._root)
        libtpu = installed_version("libtpu")
        steps = (*steps, *chips.steps, f"libtpu: {libtpu or 'not installed'}")
        if chips.generation is None and chips.num_on_bus:
            return Probe((), "there are TPU chips, but no device files of them; load their driver", steps)
        if chips.generation is None:
            return Probe((), "no TPU in this host; PJRT_DEVICE=CPU runs the same programs on its processor", steps)
        if libtpu is None:
            return Probe((), "there are TPU chips, but libtpu is not installed; install 'zif-tpu[hardware]'", steps)
        generation = chips.generation
        device = DeviceInfo(
            device_id="xla:tpu",
            name=f"TPU {generation.name}",
            architecture=generation.name,
            memory_bytes=generation.memory_bytes,
            available_bytes=generation.memory_bytes,
            capabilities=_capabilities("TPU", chips.count),
            runtime=(*runtime, ("libtpu", libtpu), ("pjrt device", "TPU"), ("chips", str(chips.count))),
        )
        return Probe((device,), steps=steps)

    def _host_device(self, settings: TpuSettings, runtime: tuple[tuple[str, str], ...]) -> DeviceInfo:
        host = read_host(self._root)
        return DeviceInfo(
            device_id="xla:cpu",
            name=f"XLA on {host.processor}",
            architecture=host.architecture,
            memory_bytes=host.memory_bytes,
            available_bytes=host.available_bytes,
            capabilities=_capabilities("CPU", settings.num_devices),
            runtime=(
                *runtime,
                ("pjrt device", "CPU"),
                ("devices", str(settings.num_devices)),
                ("cores", str(host.num_cores)),
            ),
        )


def buckets_of(workload: Workload) -> Buckets:
    """Return the sizes of shapes for a workload; without KV there is nothing to attend to, and one size of blocks."""
    block_size = workload.kv_specs[0].block_size if workload.kv_specs else 1
    max_blocks = max(1, -(-workload.max_model_len // max(1, block_size)))
    return Buckets.of(max(1, workload.max_num_seqs), max(1, workload.max_num_batched_tokens), max_blocks)


def _unfit_parallel(workload: Workload, device: DeviceInfo) -> Iterator[str]:
    """Yield why the workload cannot be cut into as many parts as it asks for."""
    size, runtime = workload.tensor_parallel_size, dict(device.runtime)
    num_devices = int(runtime.get("chips") or runtime["devices"])
    if size not in (1, num_devices):
        yield (
            f"tensor_parallel_size={size!r} is neither 1 nor the {num_devices} devices of this host, which XLA drives "
            "together; set it to one of these"
        )
    for spec in workload.kv_specs:
        if isinstance(spec, AttentionSpec) and spec.num_kv_heads % size:
            yield (
                f"tensor_parallel_size={size!r} does not divide the {spec.num_kv_heads} KV heads of {spec.kind} "
                "layers; choose one that does"
            )


def _capabilities(pjrt_device: str, num_devices: int) -> Capabilities:
    return Capabilities(
        dtypes=tuple(Numerics(storage=dtype, compute=dtype, accumulate="float32") for dtype in _DTYPES),
        features=_FEATURES | ({Feature.TENSOR_PARALLEL} if num_devices > 1 else set()),
        kv_dtypes=_DTYPES,
        block_sizes=(8, 16, 32, 64, 128),
        max_head_size=256,
        notes=("one process drives the chips of a host", f"programs are compiled by XLA for {pjrt_device}"),
    )


def _plan_notes(buckets: Buckets, pjrt_device: str, tensor_parallel_size: int) -> tuple[str, ...]:
    num_programs = len(buckets.shapes()) + 3 * len(buckets.samples)
    notes = [
        f"{num_programs} programs are compiled before the first request (drafts and lower tiers take more); none after",
        "requests with logit_bias, allowed_token_ids, bad_words, min_tokens, penalties or log-probabilities are "
        "sampled on the host: their logits are part of the step's one transfer",
        "log-probabilities of prompts take further transfers",
    ]
    if tensor_parallel_size > 1:
        notes.append("memory is planned as if every device held all weights and KV: it holds a part of them")
    if pjrt_device == "TPU":
        notes.append("torch_xla's ragged kernel attends where heads are multiples of 128 and there are no sinks")
    if pjrt_device == "CPU":
        notes.append("XLA cannot load compiled programs for this device: each process compiles anew")
    return tuple(notes)
