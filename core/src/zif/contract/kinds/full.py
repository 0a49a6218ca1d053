"""Full attention: every token sees every earlier token."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.attention import AttentionSpec
from zif.contract.kv import NEVER, BlockTest


def longest_whole_prefix(num_blocks: int, found: BlockTest) -> int:
    """Return the number of leading blocks that are found: where all of them are needed, the first gap ends it."""
    for block in range(num_blocks):
        if not found(block):
            return block
    return num_blocks


@dataclass(frozen=True, slots=True)
class FullAttentionSpec(AttentionSpec):
    """Blocks live as long as the request."""

    @property
    def kind(self) -> str:
        return "full"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_FULL

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return 0

    def next_release(self, num_computed_tokens: int) -> int:
        return NEVER

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        return self.num_blocks(num_tokens)

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        return longest_whole_prefix(num_blocks, found)
