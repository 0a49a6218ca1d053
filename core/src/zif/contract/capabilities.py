"""What a device says it can do, and what a workload asks for, in one closed vocabulary.

A capability that is not declared is not there: silence is "no".
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Feature(StrEnum):
    """One thing a workload may need and a device may offer.

    The value is the name that plans, refusals and reports print.
    """

    ATTENTION_FULL = "attention.full"
    ATTENTION_SLIDING_WINDOW = "attention.sliding_window"
    ATTENTION_CHUNKED_LOCAL = "attention.chunked_local"
    ATTENTION_CROSS = "attention.cross"
    ATTENTION_LATENT = "attention.latent"
    STATE_RECURRENT = "state.recurrent"
    ATTENTION_SOFTCAP = "attention.softcap"
    ATTENTION_SINKS = "attention.sinks"
    MIXTURE_OF_EXPERTS = "moe"
    QUANTIZATION_MXFP4_DEQUANTIZED = "quantization.mxfp4.dequantized_at_load"
    QUANTIZATION_W8A8 = "quantization.w8a8"
    QUANTIZATION_W8A16 = "quantization.w8a16"
    QUANTIZATION_W4A16 = "quantization.w4a16"
    TRANSFORMERS_BACKEND = "model.transformers_backend"
    PREFIX_CACHING = "kv.prefix_caching"
    TENSOR_PARALLEL = "parallel.tensor"


class Collective(StrEnum):
    """One collective operation of a `Communicator`."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    SEND_RECV = "send_recv"
    BARRIER = "barrier"


@dataclass(frozen=True, slots=True)
class Numerics:
    """How one dtype is handled: kept in `storage`, multiplied in `compute`, summed in `accumulate`."""

    storage: str
    compute: str
    accumulate: str = "float32"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The claims of one device. Each claim is an obligation: the conformance suite exercises it.

    `dtypes` and `kv_dtypes` use torch's names without the prefix ("float32", "bfloat16"); the KV dtype "int8" is codes
    with scales, see `KVSpec`. `head_sizes` empty means any size from 1 to `max_head_size`. `block_sizes` are the tokens
    per KV block that attention accepts. With `static_code`, `Platform.compiled_kernels` shows the code of the kernels.
    A `simulated` device computes on the host what the hardware would, for proofs without it: it serves only who names
    its platform, and every report says so.
    """

    dtypes: tuple[Numerics, ...]
    features: frozenset[Feature]
    kv_dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...]
    max_head_size: int
    head_sizes: tuple[int, ...] = ()
    collectives: frozenset[Collective] = frozenset()
    collective_dtypes: tuple[str, ...] = ()
    graph_capture: bool = False
    batch_invariant: bool = False
    fork_safe: bool = False
    spawn_safe: bool = True
    static_code: bool = False
    simulated: bool = False
    notes: tuple[str, ...] = field(default=())

    def numerics(self, dtype: str) -> Numerics | None:
        """Return how `dtype` is handled, or None when the device does not offer it."""
        return next((n for n in self.dtypes if n.storage == dtype), None)

    def accepts_head_size(self, head_size: int) -> bool:
        """Say whether attention serves heads of `head_size` elements."""
        if self.head_sizes:
            return head_size in self.head_sizes
        return 1 <= head_size <= self.max_head_size
