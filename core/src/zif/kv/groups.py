"""What each kind of layer group needs to keep: one small class per kind.

A kind answers two questions: which logical blocks the next token can see, and how long a computed prefix it can serve.
The block manager is the only caller.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from zif.contract import FullAttentionSpec, KVSpec, SlidingWindowSpec
from zif.errors import ContractError

NEVER: Final = 2**62
"""A number of computed tokens that no request reaches."""

BlockTest = Callable[[int], bool]
"""Says whether a logical block is found computed."""


class LayerGroup(ABC):
    """The retention rule of one layer group."""

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.block_size = spec.block_size

    @abstractmethod
    def first_visible_block(self, num_computed_tokens: int) -> int:
        """Return the first logical block that a token at position `num_computed_tokens` or later can see."""

    @abstractmethod
    def next_release(self, num_computed_tokens: int) -> int:
        """Return the number of computed tokens at which the next block goes out of sight, or `NEVER`."""

    @abstractmethod
    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        """Return the largest b <= num_blocks such that a request can go on after b blocks with what is found."""

    def num_blocks(self, num_tokens: int) -> int:
        """Count the logical blocks of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        """Bound the blocks held at once by a request of `num_tokens` that computes `max_step_tokens` a step."""
        return self.num_blocks(num_tokens)


class FullAttentionGroup(LayerGroup):
    """Everything stays visible."""

    def first_visible_block(self, num_computed_tokens: int) -> int:
        return 0

    def next_release(self, num_computed_tokens: int) -> int:
        return NEVER

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        for block in range(num_blocks):
            if not found(block):
                return block
        return num_blocks


class SlidingWindowGroup(LayerGroup):
    """The last `window` tokens stay visible, the newest one included."""

    def __init__(self, spec: SlidingWindowSpec) -> None:
        super().__init__(spec)
        self.window = spec.window

    def first_visible_block(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - self.window + 1) // self.block_size

    def next_release(self, num_computed_tokens: int) -> int:
        return (self.first_visible_block(num_computed_tokens) + 1) * self.block_size + self.window - 1

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        end = num_blocks
        block = num_blocks - 1
        while end > 0:
            if block < self.first_visible_block(end * self.block_size):
                return end
            if not found(block):
                end = block
            block -= 1
        return 0

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        visible = min(num_tokens, self.window - 1 + max_step_tokens)
        return min(self.num_blocks(num_tokens), self.num_blocks(visible) + 1)


def layer_group(spec: KVSpec) -> LayerGroup:
    """Return the retention rule for `spec`."""
    if isinstance(spec, SlidingWindowSpec):
        return SlidingWindowGroup(spec)
    if isinstance(spec, FullAttentionSpec):
        return FullAttentionGroup(spec)
    raise ContractError(f"no layer group serves KV of kind {spec.kind!r}; this core knows full and sliding windows")
