"""What attention layers with one key and one value per token and head have in common."""

from dataclasses import dataclass, field

from zif.contract.kv import KVSpec


@dataclass(frozen=True, slots=True)
class AttentionSpec(KVSpec):
    """Keys and values: `num_kv_heads` heads of `head_dim` elements each, per token and layer.

    `readers` are pairs of a layer without keys and values of its own and the one of `layers` whose it reads (Gemma 3n,
    Google, 2025; Sun et al., You Only Cache Once, 2024). They take no memory and write nothing.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    readers: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
