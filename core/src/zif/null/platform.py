"""The null platform: plans any workload on a device that exists everywhere and computes nothing."""

from zif.contract import (
    Capabilities,
    Communicator,
    CommunicatorError,
    CommunicatorGroup,
    Device,
    DeviceInfo,
    Feature,
    Health,
    KVLayout,
    KVSpec,
    Numerics,
    Offer,
    Plan,
    Platform,
    Probe,
    Refusal,
    Workload,
    negotiate,
)

NAME = "null"
SLOT_BYTES = 8
"""One 64-bit word a token, whatever the model would keep."""

_MEMORY_BYTES = 1 << 40
_NOTE = "computes nothing: each token is a hash of the request's history"
_DTYPES = ("float32", "bfloat16", "float16")


class NullPlatform(Platform):
    """Run only when named: its text means nothing."""

    name = NAME
    vendor = "zif"
    preference = None

    def probe(self) -> Probe:
        return Probe(devices=(_device_info(),), steps=("nothing to look for",))

    def plan(self, workload: Workload) -> Plan | Refusal:
        offer = Offer(
            platform=self.name,
            device=_device_info(),
            layout_of=null_layout,
            implementations=(("attention", "zif.null.runner"), ("model_runner", "zif.null.runner")),
            notes=(_NOTE,),
        )
        return negotiate(workload, offer)

    def open(self, plan: Plan, rank: int) -> Device:
        return NullDevice(plan)


class NullDevice(Device):
    """Hold the plan. The null runner needs no other service."""

    array_device = "none"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        raise CommunicatorError("the null platform claims no collectives; use a platform that does")

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def health(self, deadline_s: float) -> Health:
        return Health(healthy=True, detail="nothing to break")

    def close(self) -> None:
        """Nothing is held."""


def null_layout(spec: KVSpec) -> KVLayout:
    """Keep one word per token for the whole group."""
    return KVLayout(spec.block_size * SLOT_BYTES, ("token",), (spec.block_size,), "uint64")


def _device_info() -> DeviceInfo:
    numerics = tuple(Numerics(storage=dtype, compute=dtype) for dtype in _DTYPES)
    claims = frozenset(Feature) - {Feature.TENSOR_PARALLEL}
    capabilities = Capabilities(
        dtypes=numerics,
        features=claims,
        kv_dtypes=_DTYPES,
        block_sizes=tuple(range(1, 257)),
        max_head_size=1 << 16,
        batch_invariant=True,
        fork_safe=True,
        notes=(_NOTE,),
    )
    return DeviceInfo("null:0", "no device", "none", _MEMORY_BYTES, _MEMORY_BYTES, capabilities)
