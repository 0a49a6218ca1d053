"""How this platform stores a KV block. Apart from the attention that reads it, so that planning imports no torch."""

import math

from zif.contract import AttentionSpec, KVLayout, KVSpec, RecurrentStateSpec

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = 4


def kv_layout(spec: KVSpec) -> KVLayout:
    """Keep the tokens of one head together: a gathered tile of a head is then ready to multiply.

    Of dtype "int8" a token's row of a head is its codes, zeros up to a multiple of 4 bytes, and their scale in float32.
    Recurrent states lie as core reads them.
    """
    if isinstance(spec, RecurrentStateSpec):
        from zif.reference.state import state_layout  # on use: discovery loads the contract alone

        return state_layout(spec)
    assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
    shape = (len(spec.layers), 2, spec.num_kv_heads, spec.block_size, row_elements(spec))
    num_bytes = math.prod(shape) * _ELEMENT_BYTES[spec.dtype]
    return KVLayout(num_bytes, ("layer", "kv", "head", "token", "element"), shape, spec.dtype)


def row_elements(spec: AttentionSpec) -> int:
    """Return how many elements of the stored dtype a token takes in one head's keys, or values."""
    if spec.dtype != "int8":
        return spec.head_dim
    return -(-spec.head_dim // _SCALE_BYTES) * _SCALE_BYTES + _SCALE_BYTES
