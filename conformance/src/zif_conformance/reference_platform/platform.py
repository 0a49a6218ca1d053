"""The platform: what its virtual devices offer, and how a workload is planned on them. Imports no array library.

Called by discovery through `plugin`; `open` is the only method that imports torch.
"""

import importlib.metadata
import importlib.util

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
from zif_conformance.reference_platform.layout import kv_layout
from zif_conformance.reference_platform.settings import Settings, read_settings

NAME = "reference"

_DTYPES = ("float32", "bfloat16", "float16")

_CAPABILITIES = Capabilities(
    dtypes=tuple(Numerics(storage=dtype, compute="float32", accumulate="float32") for dtype in _DTYPES),
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
    notes=("virtual devices on the host, for tests", "faults: ZIF_REFERENCE_FAULTS"),
)

_ROOM = __name__.rpartition(".")[0]

_IMPLEMENTATIONS = (
    ("allocator", f"{_ROOM}.memory.TorchAllocator"),
    ("attention", f"{_ROOM}.attention.TorchAttention"),
    ("communicator", f"{_ROOM}.collectives.StoreCommunicator"),
    ("graphs", "zif.contract.EagerGraphs"),
    ("ops", f"{_ROOM}.operators.TorchOperators"),
    ("runner", "core"),
    ("state", "zif.reference.state"),
)

_EMULATED = (
    (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, "weights are held in the model's dtype: about four times the bytes"),
)


class ReferencePlatform(Platform):
    """Virtual devices. `settings` None are those of the environment, read when they are needed."""

    name = NAME
    vendor = "zif"
    preference = None

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings

    def probe(self) -> Probe:
        try:
            settings = self._settings()
        except ConfigError as error:
            return Probe((), str(error), ("settings: refused",))
        if importlib.util.find_spec("torch") is None:
            return Probe((), "torch is not installed; install torch", ("torch: not installed",))
        devices = tuple(_device_info(index, settings) for index in range(settings.num_devices))
        return Probe(devices, steps=(f"{settings.num_devices} virtual devices by setting",))

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        offer = Offer(
            platform=self.name,
            device=probe.devices[0],
            layout_of=kv_layout,
            implementations=_IMPLEMENTATIONS,
            emulated=_EMULATED,
            sizing=KVSizing(max_share=0.5),
        )
        return negotiate(workload, offer)

    def open(self, plan: Plan, rank: int) -> Device:
        settings = self._settings()
        if not 0 <= rank < settings.num_devices:
            raise PlatformUnavailableError(
                f"rank {rank!r} has no device of its own: there are {settings.num_devices}; use fewer ranks"
            )
        from zif_conformance.reference_platform.device import TorchDevice

        return TorchDevice(plan, _device_id(rank), rank, settings.faults)

    def _settings(self) -> Settings:
        return self._given or read_settings()


def _device_id(index: int) -> str:
    return f"{NAME}:{index}"


def _device_info(index: int, settings: Settings) -> DeviceInfo:
    return DeviceInfo(
        device_id=_device_id(index),
        name="virtual device",
        architecture="virtual",
        memory_bytes=settings.memory_bytes,
        available_bytes=settings.memory_bytes,
        capabilities=_CAPABILITIES,
        runtime=(("torch", importlib.metadata.version("torch")),),
    )
