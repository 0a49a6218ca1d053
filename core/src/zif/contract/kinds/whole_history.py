"""What kinds have in common that need every earlier token for as long as the request lives."""

from zif.contract.kv import NEVER, BlockTest, KVSpec


class WholeHistorySpec(KVSpec):
    """Nothing is released before the end, and a prefix ends at its first gap."""

    __slots__ = ()

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return 0

    def next_release(self, num_computed_tokens: int) -> int:
        return NEVER

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        return self.num_blocks(num_tokens)

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        for block in range(num_blocks):
            if not found(block):
                return block
        return num_blocks
