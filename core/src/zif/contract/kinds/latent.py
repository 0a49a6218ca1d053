"""Latent attention: one compressed vector per token and layer instead of keys and values per head."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.whole_history import WholeHistorySpec


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec(WholeHistorySpec):
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
