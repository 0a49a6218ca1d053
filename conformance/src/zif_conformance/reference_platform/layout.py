"""How this platform stores a KV block. Apart from the attention that reads it, so that planning imports no torch."""

import math

from zif.contract import AttentionSpec, KVLayout, KVSpec, RecurrentStateSpec

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def kv_layout(spec: KVSpec) -> KVLayout:
    """Keep all that belongs to a token together. Recurrent states lie as core's runner reads them."""
    if isinstance(spec, RecurrentStateSpec):
        from zif.reference.state import state_layout  # on use: discovery loads the contract alone

        return state_layout(spec)
    assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
    shape = (len(spec.layers), spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
    if spec.dtype == "int8":
        # The codes, to a multiple of 4, and a float32 scale.
        shape = (*shape[:-1], (spec.head_dim + 3) // 4 * 4 + 4)
    num_bytes = math.prod(shape) * _ELEMENT_BYTES[spec.dtype]
    return KVLayout(num_bytes, ("layer", "token", "kv", "head", "element"), shape, spec.dtype)
