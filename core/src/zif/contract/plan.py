"""Plans: what will run, decided before weights load.

A platform answers a `Workload` with a `Plan` or a `Refusal`. Each feature asked for is supported, emulated (its cost
stated) or refused (its reason stated); nothing degrades silently.
"""

from dataclasses import dataclass
from enum import StrEnum

from zif.contract.capabilities import Feature
from zif.contract.kv import KVGroup, KVSpec


@dataclass(frozen=True, slots=True)
class Workload:
    """What the engine wants to run on one device. Bytes are per device.

    `kv_bytes` is the KV memory asked for, or None to let the platform choose. `memory_limit_bytes` caps everything
    that the platform may hold, or None for what the device has. `batch_invariant` asks for results that have the same
    bits whatever else runs.
    """

    dtype: str
    kv_specs: tuple[KVSpec, ...]
    head_sizes: tuple[int, ...]
    features: frozenset[Feature]
    weight_bytes: int
    activation_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes: int | None = None
    memory_limit_bytes: int | None = None
    tensor_parallel_size: int = 1
    batch_invariant: bool = False


class Outcome(StrEnum):
    """How one feature is served."""

    SUPPORTED = "supported"
    EMULATED = "emulated"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one feature: `detail` is the implementation, the cost of emulation, or the reason of refusal."""

    feature: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True)
class SchedulerConstraints:
    """Scheduling needs of a platform, stated as data.

    `token_buckets` and `batch_buckets` are the step sizes the platform runs (empty: any size): no step is larger than
    the largest, and the runner pads to the next. A prompt is cut into chunks only at positions that are multiples of
    `token_alignment`; its end may lie anywhere. With `separate_prefill` no step mixes prompt chunks with single tokens,
    the one outstanding token of a request that the runner holds; a chunk may be one token long, too.
    """

    token_buckets: tuple[int, ...] = ()
    batch_buckets: tuple[int, ...] = ()
    token_alignment: int = 1
    separate_prefill: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device, by purpose. `available_bytes` is what probe saw free, or the limit that was asked for."""

    available_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run on which device. Printable: `zif explain` shows all of it.

    `device_id` names a device of the probe. `implementations` maps each op and service to the code that serves it.
    `tensor_parallel_size` and `batch_invariant` are those of the workload: with the latter a device computes so.
    """

    platform: str
    device_id: str
    decisions: tuple[Decision, ...]
    kv_groups: tuple[KVGroup, ...]
    memory: MemoryPlan
    implementations: tuple[tuple[str, str], ...]
    constraints: SchedulerConstraints = SchedulerConstraints()
    notes: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Every reason why the workload cannot run, in the user's words, each with the next step."""

    platform: str
    reasons: tuple[str, ...]
