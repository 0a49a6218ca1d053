"""How this platform stores a KV block. Apart from the attention that reads it, so that planning imports no torch.

A block has a page for each layer, and a page has the keys and values of its tokens side by side, head by head: what
torch_xla's ragged paged attention reads. All layer groups share one array of pages, so their pages must be alike.
"""

import math
from collections.abc import Iterator, Sequence

from zif.contract import AttentionSpec, KVLayout, KVSpec

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def kv_layout(spec: KVSpec) -> KVLayout:
    """Keep a page per layer: [block_size, 2 * K, D], keys at even and values at odd places of the second axis."""
    assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
    shape = (len(spec.layers), spec.block_size, spec.num_kv_heads, 2, spec.head_dim)
    num_bytes = math.prod(shape) * _ELEMENT_BYTES[spec.dtype]
    return KVLayout(num_bytes, ("layer", "token", "head", "kv", "element"), shape, spec.dtype)


def unlike_pages(specs: Sequence[KVSpec]) -> Iterator[str]:
    """Yield why the groups cannot share one array of pages, if they cannot."""
    pages = {
        (spec.block_size, spec.num_kv_heads, spec.head_dim, spec.dtype)
        for spec in specs
        if isinstance(spec, AttentionSpec)
    }
    if len(pages) > 1:
        shapes = "; ".join(
            f"{size} tokens, {heads} heads of {dim}, {dtype}" for size, heads, dim, dtype in sorted(pages)
        )
        yield f"layer groups with KV pages of several shapes ({shapes}) are not served: choose another platform"
