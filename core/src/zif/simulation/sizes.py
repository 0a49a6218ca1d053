"""Bytes of KV blocks for planning without a platform: what each kind keeps, stored densely, nothing padded."""

import math
from collections.abc import Sequence

from zif.contract import (
    AttentionSpec,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    KVLayout,
    KVSpec,
    LatentAttentionSpec,
    RecurrentStateSpec,
    slab_arena,
)
from zif.errors import ConfigError

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dense_layout(spec: KVSpec) -> KVLayout:
    """Return the layout of a block without padding. Raises `ConfigError` on a kind whose bytes are not known here."""
    if isinstance(spec, AttentionSpec):
        shape = (len(spec.layers), 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return KVLayout(_bytes(shape, spec.dtype), ("layer", "kv", "head", "token", "element"), shape, spec.dtype)
    if isinstance(spec, LatentAttentionSpec):
        latent = (len(spec.layers), spec.block_size, spec.latent_dim + spec.rope_dim)
        return KVLayout(_bytes(latent, spec.dtype), ("layer", "token", "element"), latent, spec.dtype)
    if isinstance(spec, RecurrentStateSpec):
        num_bytes = len(spec.layers) * sum(_bytes(tensor.shape, tensor.dtype) for tensor in spec.tensors)
        return KVLayout(num_bytes, ("byte",), (num_bytes,), "uint8")
    raise ConfigError(f"the bytes of KV of kind {spec.kind!r} are not known to the planner; give kv_blocks, no model")


def model_arena(specs: Sequence[KVSpec], kv_bytes: int) -> KVArena:
    """Cut `kv_bytes` for the layer groups of a model. Raises `ConfigError` when they do not hold one slab each."""
    return slab_arena(kv_bytes, [KVGroup(spec, dense_layout(spec)) for spec in specs])


def plain_arena(num_blocks: int, block_size: int) -> KVArena:
    """Return an arena of `num_blocks` blocks of one full-attention group, each token one element."""
    spec = FullAttentionSpec((0,), 1, 1, block_size, "float32")
    group = KVGroup(spec, KVLayout(block_size, ("token",), (block_size,), "uint8"))
    return KVArena(block_size, num_blocks + 1, (group,))


def _bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * _ELEMENT_BYTES[dtype]
