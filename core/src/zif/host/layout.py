"""How this platform stores a KV block. Apart from the attention that reads it, so that planning imports no torch."""

import math

from zif.contract import AttentionSpec, KVLayout, KVSpec, RecurrentStateSpec

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def kv_layout(spec: KVSpec) -> KVLayout:
    """Keep the tokens of one head together: a gathered tile of a head is then ready to multiply.

    Recurrent states lie as core reads them.
    """
    if isinstance(spec, RecurrentStateSpec):
        from zif.reference.state import state_layout  # on use: discovery loads the contract alone

        return state_layout(spec)
    assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
    shape = (len(spec.layers), 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
    num_bytes = math.prod(shape) * _ELEMENT_BYTES[spec.dtype]
    return KVLayout(num_bytes, ("layer", "kv", "head", "token", "element"), shape, spec.dtype)
