"""Latent attention: one compressed vector per token and layer instead of keys and values per head."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.full import longest_whole_prefix
from zif.contract.kv import NEVER, BlockTest, KVSpec


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec(KVSpec):
    """`latent_dim` elements of compressed keys and values and `rope_dim` of shared rotary key, per token and layer.

    Retained like full attention. DeepSeek-AI, DeepSeek-V2, 2024.
    """

    layers: tuple[int, ...]
    latent_dim: int
    rope_dim: int
    block_size: int
    dtype: str

    @property
    def kind(self) -> str:
        return "latent"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_LATENT

    def first_needed_token(self, num_computed_tokens: int) -> int:
        return 0

    def next_release(self, num_computed_tokens: int) -> int:
        return NEVER

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        return self.num_blocks(num_tokens)

    def longest_prefix(self, num_blocks: int, found: BlockTest) -> int:
        return longest_whole_prefix(num_blocks, found)
