"""Attention over paged KV: the interface each platform's attention kernels implement.

Shapes: T tokens of the step, R requests in it, H query heads, K key/value heads (H a multiple of K), D head size.
Tokens of one request are adjacent and in order; request r owns rows query_start[r] to query_start[r + 1] - 1:

    tokens       | r0 r0 r0 | r1 | r2 r2 | ...
    query_start  0          3    4       6

Query, key and value may be views with a strided first axis (parts of one fused projection); their last two axes are
dense.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from zif.contract.arrays import Array, HostArray
from zif.contract.kv import KVArena, KVLayout, KVSpec

CacheT = TypeVar("CacheT")
PreparedT = TypeVar("PreparedT")


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's batch as one layer group sees it, in host memory.

    query_start: [R + 1], int32. seq_lens: [R], int32, known tokens with KV after this step's write (so the last query
    of request r is at position seq_lens[r] - 1). block_table: [R, max_blocks], int32, logical block to block id;
    entries that no query can see are undefined. slots: [T], int64, block id * block_size + offset, where each token's
    KV goes. `window` is the group's window in tokens, or None. `group` is its index in the arena.
    """

    query_start: HostArray
    seq_lens: HostArray
    block_table: HostArray
    slots: HostArray
    block_size: int
    window: int | None
    group: int = 0


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What one layer asks of attention.

    score(q, k) = softcap * tanh(scale * q.k / softcap) with a soft cap, scale * q.k without. The query at position p
    sees keys at positions max(0, p - window + 1) to p. `sinks`: [H], model dtype, one extra logit per head that takes
    part in the softmax's denominator and carries no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Array | None = None


class AttentionBackend(ABC, Generic[CacheT, PreparedT]):
    """A platform's attention. `CacheT` is its view of one layer's KV, `PreparedT` its plan for one step."""

    @abstractmethod
    def kv_layout(self, spec: KVSpec) -> KVLayout:
        """Say how a block of `spec` is stored. Called before the device is used; must not allocate."""

    @abstractmethod
    def bind(self, arena: KVArena, group: int, memory: Array) -> Sequence[CacheT]:
        """View the arena's memory as the caches of one group's layers, in the order of `spec.layers`.

        memory: [arena.num_bytes], uint8. Block i of the group is at byte i * block_bytes.
        """

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> PreparedT:
        """Do the work of a step that all layers of a group share. Called once per group and step."""

    @abstractmethod
    def write(self, key: Array, value: Array, cache: CacheT, prepared: PreparedT) -> None:
        """Store this step's keys and values at the batch's slots.

        key, value: [T, K, D], model dtype. Mutates `cache`; slots not named keep their bytes.
        """

    @abstractmethod
    def attend(self, query: Array, cache: CacheT, prepared: PreparedT, params: AttentionParams) -> Array:
        """Attend from each query to the KV of its own request, after `write` of the same layer and step.

        query: [T, H, D], model dtype. Returns [T, H, D], model dtype. Softmax accumulates in float32 or wider.
        A NaN in one request's rows stays in that request's rows.
        """
