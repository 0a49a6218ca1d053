"""What attention layers with one key and one value per token and head have in common."""

from dataclasses import dataclass

from zif.contract.kv import KVSpec


@dataclass(frozen=True, slots=True)
class AttentionSpec(KVSpec):
    """Keys and values: `num_kv_heads` heads of `head_dim` elements each, per token and layer."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
