"""The platform under test: found like any other platform, planned and opened as the engine would.

Called by the fixtures of `zif_conformance.plugin` and by `zif_conformance.describe`. Judges nothing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zif.contract import (
    Capabilities,
    ChunkedLocalSpec,
    Device,
    DeviceInfo,
    Feature,
    FullAttentionSpec,
    KVSpec,
    LatentAttentionSpec,
    Plan,
    Platform,
    Probe,
    Refusal,
    SlidingWindowSpec,
    Workload,
)
from zif.errors import ContractError, PlanRefusedError, PlatformUnavailableError
from zif.plugins import PlatformRegistry

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """A platform with the distribution that brought it and the plugin object with its hooks."""

    platform: Platform
    distribution: str
    plugin: object

    @classmethod
    def find(cls, name: str) -> "Subject":
        """Find the platform among the installed plugins.

        Raises `PlatformNotFoundError` (with the nearest name) or `ContractError` (it failed to load).
        """
        registry = PlatformRegistry.discover()
        if name not in registry.platforms:
            # Raises: the registry knows why, and which name is near.
            registry.select(name)
        entry = registry.platforms[name]
        return cls(entry.platform, entry.distribution, entry.plugin)

    @property
    def name(self) -> str:
        """Return the platform's name."""
        return self.platform.name

    def device_info(self) -> DeviceInfo:
        """Return the first device of the probe. Raises `PlatformUnavailableError` when there is none."""
        probe = self.platform.probe()
        if not isinstance(probe, Probe):
            raise ContractError(f"probe of {self.name!r} returned {probe!r}, which is no zif.contract.Probe")
        if not probe.devices:
            raise PlatformUnavailableError(f"platform {self.name!r} has no device here: {probe.reason}")
        return probe.devices[0]

    def workload(self, **changes: Any) -> Workload:
        """Return a small workload that the claims allow; `changes` replace fields of `Workload`."""
        capabilities = self.device_info().capabilities
        spec = small_spec(capabilities)
        small = Workload(
            dtype=preferred_dtype(capabilities),
            kv_specs=(spec,),
            head_sizes=(head_size(capabilities),),
            features=frozenset(),
            weight_bytes=_MIB,
            activation_bytes=_MIB,
            max_model_len=256,
            max_num_seqs=4,
            max_num_batched_tokens=256,
        )
        return replace(small, **changes)

    def plan(self, workload: Workload) -> Plan:
        """Plan the workload. Raises `PlanRefusedError` with every reason, `ContractError` on an answer of no kind."""
        answer = self.platform.plan(workload)
        if isinstance(answer, Refusal):
            raise PlanRefusedError(f"platform {self.name!r} refused: {'; '.join(answer.reasons)}")
        if not isinstance(answer, Plan):
            raise ContractError(f"plan of {self.name!r} returned {answer!r}, which is neither Plan nor Refusal")
        return answer

    @contextlib.contextmanager
    def opened(self, workload: Workload | None = None, rank: int = 0) -> Iterator[Device]:
        """Open a device for the workload (None: the small one) and close it at the end."""
        device = self.platform.open(self.plan(workload or self.workload()), rank)
        try:
            yield device
        finally:
            device.close()


def preferred_dtype(capabilities: Capabilities) -> str:
    """Return float32 where it is claimed, else the first dtype."""
    offered = [numerics.storage for numerics in capabilities.dtypes]
    return "float32" if "float32" in offered or not offered else offered[0]


def head_size(capabilities: Capabilities, wanted: int = 64) -> int:
    """Return the claimed head size that is nearest to `wanted`."""
    if capabilities.head_sizes:
        return min(capabilities.head_sizes, key=lambda size: (abs(size - wanted), size))
    return min(wanted, capabilities.max_head_size)


def block_size(capabilities: Capabilities, wanted: int = 16) -> int:
    """Return the claimed block size that is nearest to `wanted`."""
    return min(capabilities.block_sizes, key=lambda size: (abs(size - wanted), size))


def small_spec(capabilities: Capabilities) -> KVSpec:
    """Return a one-layer group of a kind that the device claims, full attention where possible."""
    size, blocks = head_size(capabilities), block_size(capabilities)
    dtype = preferred_dtype(capabilities)
    kv_dtype = dtype if dtype in capabilities.kv_dtypes or not capabilities.kv_dtypes else capabilities.kv_dtypes[0]
    specs: dict[Feature, KVSpec] = {
        Feature.ATTENTION_FULL: FullAttentionSpec((0,), 2, size, blocks, kv_dtype),
        Feature.ATTENTION_SLIDING_WINDOW: SlidingWindowSpec((0,), 2, size, blocks, kv_dtype, window=4 * blocks),
        Feature.ATTENTION_CHUNKED_LOCAL: ChunkedLocalSpec((0,), 2, size, blocks, kv_dtype, chunk=4 * blocks),
        Feature.ATTENTION_LATENT: LatentAttentionSpec((0,), size, size // 2, blocks, kv_dtype),
    }
    claimed = [spec for feature, spec in specs.items() if feature in capabilities.features]
    return claimed[0] if claimed else specs[Feature.ATTENTION_FULL]
