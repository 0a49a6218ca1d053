"""KV memory as values: which layers keep what, in which blocks, in which arena.

Layers that keep the same kind of state with the same shape form a *layer group*. Each group has its own block size
and bytes per block. One arena holds the blocks of all groups:

    arena of `num_bytes`
    |<- null slab ->|<--- slab 1 --->|<--- slab 2 --->|<--- slab 3 --->| ...
                    | blocks of g0   | blocks of g1   | blocks of g0   |

Slabs are lent to groups on demand and come back when empty. A group of B bytes per block sees the whole arena as a
grid of cells of B bytes; block `i` of the group is cell `i`, at byte `i * B`. A slab offers a group the cells that lie
wholly inside the slab, so one address rule serves every group and nothing is padded to another group's size.
Slab 0 is never lent: block 0 of every group is the *null block*, an address that is always legal and never meaningful.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVSpec(ABC):
    """What one layer group keeps per token.

    `layers` are the model's layer indices in order. `block_size` is in tokens. `dtype` is the stored element type.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name the kind of state, as plans print it."""


@dataclass(frozen=True, slots=True)
class FullAttentionSpec(KVSpec):
    """Every token sees every earlier token: blocks live as long as the request."""

    @property
    def kind(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class SlidingWindowSpec(KVSpec):
    """The token at position p sees positions p - window + 1 to p: blocks behind the window are returned."""

    window: int = 0

    @property
    def kind(self) -> str:
        return f"sliding[{self.window}]"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a platform stores one block of a group.

    `axes` names the logical axes from slowest to fastest varying, `shape` gives their extents inside one block; the
    product of `shape` times the element size is `block_bytes`.
    """

    block_bytes: int
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class KVGroup:
    """One layer group with the layout its platform chose."""

    spec: KVSpec
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class KVArena:
    """The arena of a worker: `num_slabs` slabs of `slab_bytes`, slab 0 included (the null slab, never lent)."""

    slab_bytes: int
    num_slabs: int
    groups: tuple[KVGroup, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the arena in bytes, null slab included."""
        return self.slab_bytes * self.num_slabs

    def num_cells(self, group: int) -> int:
        """Count the cells of `group`'s grid: the first extent of its view of the arena."""
        return self.num_bytes // self.groups[group].layout.block_bytes

    def slab_blocks(self, group: int, slab: int) -> range:
        """Return the block ids that `slab` offers to `group`."""
        block_bytes = self.groups[group].layout.block_bytes
        first = -(-slab * self.slab_bytes // block_bytes)
        return range(first, (slab + 1) * self.slab_bytes // block_bytes)

    def min_slab_blocks(self, group: int) -> int:
        """Return how many blocks of `group` every slab offers at least, wherever it lies in the group's grid."""
        block_bytes = self.groups[group].layout.block_bytes
        return (self.slab_bytes - block_bytes + math.gcd(self.slab_bytes, block_bytes)) // block_bytes
