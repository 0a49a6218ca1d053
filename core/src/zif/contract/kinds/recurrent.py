"""Recurrent state: convolution, state-space and delta-rule layers, which carry a state of fixed size.

A block holds the state of a whole request, not of its tokens. Block i is written while tokens of block i are computed:

    a step from c to d tokens reads block (c - 1) // block_size and writes block (d - 1) // block_size

So within a block the state is updated in place, and a step that crosses into another block leaves the old one as it
was. If a step ended exactly at a block's end, what is left is a checkpoint of that prefix, final and shareable; the
blocks that a long step skips stay null and cost nothing. A request owns two blocks at most.
"""

import math
from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kv import KVSpec


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a layer's state, by name, such as "conv" or "recurrent"; its own dtype, often float32."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class RecurrentStateSpec(KVSpec):
    """The state of all layers of the group after a number of tokens. `block_size` spaces the possible checkpoints."""

    layers: tuple[int, ...]
    tensors: tuple[StateTensor, ...]
    block_size: int
    dtype: str

    @property
    def kind(self) -> str:
        return "recurrent"

    @property
    def feature(self) -> Feature:
        return Feature.STATE_RECURRENT

    @property
    def keeps_checkpoints(self) -> bool:
        return True

    @property
    def num_elements(self) -> int:
        """Count the elements of one layer's state."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - 1)

    def next_release(self, num_computed_tokens: int) -> int:
        return (self.first_needed_block(num_computed_tokens) + 1) * self.block_size + 1

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        return min(self.num_blocks(num_tokens), 2)

    def first_written_block(self, num_held_blocks: int, num_tokens: int) -> int:
        return max(num_held_blocks, self.num_blocks(num_tokens) - 1)

    def reusable_blocks(self, num_indexed_tokens: int, num_computed_tokens: int) -> range:
        end = num_computed_tokens // self.block_size
        is_checkpoint = num_computed_tokens % self.block_size == 0 and num_computed_tokens > num_indexed_tokens
        return range(end - 1 if is_checkpoint else end, end)
