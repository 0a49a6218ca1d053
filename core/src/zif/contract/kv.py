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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from zif.contract.capabilities import Feature

NEVER: Final = 2**62
"""A number of computed tokens that no request reaches."""

BlockTest = Callable[[int], bool]
"""Says whether a logical block is found computed."""


class KVSpec(ABC):
    """What the layers of one group keep per request, and which of it later tokens still need.

    A kind of layer is one subclass, a frozen dataclass: it carries its own retention rule, so block manager, planning
    and the null platform serve a new kind without knowing it. `layers` are the model's layer indices in order,
    `block_size` is in tokens, `dtype` is the stored element type. Logical block i covers the tokens from
    i * block_size to (i + 1) * block_size - 1.

    Where attention keeps keys and values as "int8", each head's vector x of each token is held as codes and a scale s =
    max|x| / 127 in float32; a code is x / s in float32, rounded to the nearest integer with ties to even, within -127
    to 127, and 0 where s is 0. Attention computes with code * s. Where an element of x is not finite, s is NaN and so
    is the vector. How codes and scales lie in a block is up to the layout. States are never held so.

    The rule is one question, `first_needed_token`; the other methods follow from it and are overridden for speed, or
    by kinds that do not keep every block.
    """

    __slots__ = ()
    layers: tuple[int, ...]
    block_size: int
    dtype: str

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name the kind of state, as plans print it."""

    @property
    @abstractmethod
    def feature(self) -> Feature:
        """Name the feature that a device must claim to serve this kind."""

    @abstractmethod
    def first_needed_token(self, num_computed_tokens: int) -> int:
        """Return the first token whose state a token at position `num_computed_tokens` needs. Never falls."""

    @abstractmethod
    def next_release(self, num_computed_tokens: int) -> int:
        """Return the number of computed tokens at which the next block is no longer needed, or `NEVER`."""

    @abstractmethod
    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        """Bound the blocks held at once by a request of `num_tokens` that computes `max_step_tokens` a step."""

    @property
    def counts_encoder_tokens(self) -> bool:
        """Say whether blocks hold tokens of the encoder's input, `Request.num_encoder_tokens`, not of the sequence.

        Such blocks are written by the step that computes the first token, are needed to the end, and are found by the
        encoder's input (`CacheKey.media`), all of them or none. The questions about tokens do not arise.
        """
        return False

    def held_tokens(self, num_tokens: int, num_encoder_tokens: int) -> int:
        """Return how many tokens blocks hold for a request that has computed `num_tokens` tokens of its sequence."""
        return num_encoder_tokens if self.counts_encoder_tokens else num_tokens

    def first_needed_block(self, num_computed_tokens: int) -> int:
        """Return the first logical block that a token at position `num_computed_tokens` or later needs."""
        return self.first_needed_token(num_computed_tokens) // self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Count the logical blocks of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def first_written_block(self, num_held_blocks: int, num_tokens: int) -> int:
        """Return the first of the new logical blocks that a step up to `num_tokens` writes; those before stay null."""
        return num_held_blocks

    def reusable_blocks(self, num_indexed_tokens: int, num_computed_tokens: int) -> range:
        """Return the logical blocks whose content became final between two counts of computed tokens."""
        return range(num_indexed_tokens // self.block_size, num_computed_tokens // self.block_size)

    @property
    def keeps_checkpoints(self) -> bool:
        """Say whether a prefix can be resumed only where a step happened to end."""
        return False

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        """Return the largest b <= num_blocks such that a request can go on after b blocks with what is found."""
        end, block = num_blocks, num_blocks - 1
        while end > 0:
            if block < self.first_needed_block(end * self.block_size):
                return end
            if not found(block):
                end = block
            block -= 1
        return 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a platform stores one block of a group.

    `axes` names the logical axes from slowest to fastest varying, `shape` gives their extents inside one block; the
    product of `shape` times the element size is `block_bytes`. Of dtype "int8" the shape has room for the scales too.
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
