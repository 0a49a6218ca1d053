"""Sliding-window attention: a token sees the last `window` tokens, itself included."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.attention import AttentionSpec


@dataclass(frozen=True, slots=True)
class SlidingWindowSpec(AttentionSpec):
    """The token at position p sees positions p - window + 1 to p: blocks behind the window are returned."""

    window: int = 0

    @property
    def kind(self) -> str:
        return f"sliding[{self.window}]"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_SLIDING_WINDOW

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - self.window + 1)

    def next_release(self, num_computed_tokens: int) -> int:
        return (self.first_needed_block(num_computed_tokens) + 1) * self.block_size + self.window - 1

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        needed = min(num_tokens, self.window - 1 + max_step_tokens)
        return min(self.num_blocks(num_tokens), self.num_blocks(needed) + 1)
