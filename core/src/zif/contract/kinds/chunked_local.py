"""Chunked-local attention: tokens see each other only within aligned chunks of the sequence."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.attention import AttentionSpec


@dataclass(frozen=True, slots=True)
class ChunkedLocalSpec(AttentionSpec):
    """The token at position p sees positions p // chunk * chunk to p: a chunk's blocks are returned when it ends."""

    chunk: int = 0

    @property
    def kind(self) -> str:
        return f"chunked[{self.chunk}]"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_CHUNKED_LOCAL

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return num_computed_tokens // self.chunk * self.chunk

    def next_release(self, num_computed_tokens: int) -> int:
        first = self.first_needed_block(num_computed_tokens)
        start = (num_computed_tokens // self.chunk + 1) * self.chunk
        while start // self.block_size == first:
            start += self.chunk
        return start

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        needed = min(num_tokens, self.chunk - 1 + max_step_tokens)
        return min(self.num_blocks(num_tokens), self.num_blocks(needed) + 1)
