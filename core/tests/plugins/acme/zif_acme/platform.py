"""What the device offers, without opening it."""

from zif.contract import (
    Capabilities,
    Device,
    DeviceInfo,
    Feature,
    Numerics,
    Offer,
    Plan,
    Platform,
    Probe,
    Refusal,
    Workload,
    negotiate,
)

_DTYPES = ("float32", "bfloat16")
_MEMORY_BYTES = 1 << 30
_CLAIMS = Capabilities(
    dtypes=tuple(Numerics(storage=dtype, compute=dtype) for dtype in _DTYPES),
    features=frozenset({Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW, Feature.PREFIX_CACHING}),
    kv_dtypes=_DTYPES,
    block_sizes=(16, 32),
    max_head_size=256,
)
_DEVICE = DeviceInfo("acme:0", "Acme One", "acme1", _MEMORY_BYTES, _MEMORY_BYTES, _CLAIMS)


class AcmePlatform(Platform):
    """Runs models through core's torch runner; everything it does not bring itself is core's reference."""

    name = "acme"
    vendor = "Acme"

    def probe(self) -> Probe:
        return Probe(devices=(_DEVICE,), steps=("counted the imaginary devices",))

    def plan(self, workload: Workload) -> Plan | Refusal:
        from zif.reference.attention import ReferenceAttention

        implementations = (
            ("allocator", "zif_acme.device.AcmeAllocator"),
            ("attention", "zif.reference.attention.ReferenceAttention"),
            ("ops", "zif.reference.ops.ReferenceOps"),
        )
        return negotiate(workload, Offer(self.name, _DEVICE, ReferenceAttention().kv_layout, implementations))

    def open(self, plan: Plan, rank: int) -> Device:
        from zif_acme.device import AcmeDevice

        return AcmeDevice(plan)
