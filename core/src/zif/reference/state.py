"""How a block of recurrent state is stored, for every platform that torch drives.

A block holds the state of all layers of its group, one after the other, each tensor in its own dtype:

    | layer 0: conv .. | recurrent ... | layer 1: conv .. | recurrent ... |      each begins at a multiple of 64 bytes

Attention is not concerned: states are gathered and scattered by block id. `state_layout` is for platforms that claim
recurrent state, `state_views` for the runner. Planning calls the first, so this module imports no array library.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from zif.contract import KVArena, KVLayout, RecurrentStateSpec, StateTensor

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Bytes of a cache line on most machines, and more than any vector load asks for."""

_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def state_layout(spec: RecurrentStateSpec) -> KVLayout:
    """Lay out a block of `spec`."""
    num_bytes = len(spec.layers) * sum(map(_padded_bytes, spec.tensors))
    return KVLayout(num_bytes, ("byte",), (num_bytes,), "uint8")


def state_views(arena: KVArena, group: int, memory: "torch.Tensor") -> list[dict[str, "torch.Tensor"]]:
    """View the arena as the states of one group: for each layer its tensors by name, each [num_cells, *shape].

    memory: [arena.num_bytes], uint8. The group's layout is the one of `state_layout`.
    """
    spec, layout = arena.groups[group].spec, arena.groups[group].layout
    assert isinstance(spec, RecurrentStateSpec), f"KV of kind {spec.kind!r} is no state"
    assert layout == state_layout(spec), f"states are stored as {state_layout(spec)!r}, the platform says {layout!r}"
    num_cells = arena.num_cells(group)
    cells = memory[: num_cells * layout.block_bytes].view(num_cells, layout.block_bytes)
    layer_bytes = layout.block_bytes // len(spec.layers)
    return [dict(_layer_views(spec, cells[:, first:])) for first in range(0, layout.block_bytes, layer_bytes)]


def _layer_views(spec: RecurrentStateSpec, cells: "torch.Tensor") -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    first = 0
    for tensor in spec.tensors:
        part = cells[:, first : first + _num_bytes(tensor)].view(getattr(torch, tensor.dtype))
        yield tensor.name, part.view(len(cells), *tensor.shape)
        first += _padded_bytes(tensor)


def _num_bytes(tensor: StateTensor) -> int:
    return math.prod(tensor.shape) * _ELEMENT_BYTES[tensor.dtype]


def _padded_bytes(tensor: StateTensor) -> int:
    return -(-_num_bytes(tensor) // ALIGNMENT) * ALIGNMENT
