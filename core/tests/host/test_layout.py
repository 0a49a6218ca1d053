"""How blocks are laid out in host memory: what a token takes, and how many fit."""

import math

import pytest

from zif.contract import FullAttentionSpec, KVGroup, slab_arena
from zif.host.layout import kv_layout


def _spec(dtype, head_dim=128, block_size=16):
    return FullAttentionSpec((0, 1, 2), 8, head_dim, block_size, dtype)


@pytest.mark.parametrize(("head_dim", "row_bytes"), [(1, 8), (4, 8), (33, 40), (64, 68), (80, 84), (128, 132)])
def test_a_vector_of_codes_is_padded_and_followed_by_its_scale(head_dim, row_bytes):
    layout = kv_layout(_spec("int8", head_dim))
    assert (layout.dtype, layout.shape) == ("int8", (3, 2, 8, 16, row_bytes))
    assert layout.block_bytes == math.prod(layout.shape)
    assert layout.block_bytes % 4 == 0, "a block's scales would not be aligned"


def test_about_twice_the_tokens_fit_in_the_same_memory():
    num_tokens = {}
    for dtype in ("float32", "bfloat16", "int8"):
        group = KVGroup(_spec(dtype), kv_layout(_spec(dtype)))
        arena = slab_arena(1 << 28, [group])
        num_tokens[dtype] = 16 * sum(len(arena.slab_blocks(0, slab)) for slab in range(1, arena.num_slabs))
    assert num_tokens["int8"] / num_tokens["bfloat16"] == pytest.approx(256 / 132, rel=1e-2)
    assert num_tokens["int8"] / num_tokens["float32"] == pytest.approx(512 / 132, rel=1e-2)
