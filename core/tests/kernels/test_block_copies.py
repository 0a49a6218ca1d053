"""Copies of KV blocks against torch's indexing."""

import pytest
import torch

from zif.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from zif.kernels.interpreter import InterpretedLauncher

SIZES = [1, 6, 16, 20, 48, 1024, 4096 + 16, 9001]


def arena(num_blocks, block_bytes):
    generator = torch.Generator().manual_seed(block_bytes)
    return torch.randint(0, 256, (num_blocks * block_bytes,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("block_bytes", SIZES)
def test_copies_blocks_onto_others(block_bytes):
    memory = arena(9, block_bytes)
    expected = memory.view(9, block_bytes).clone()
    pairs = torch.tensor([[0, 3], [8, 1], [0, 7], [5, -1], [-1, 5]])
    expected[[3, 1, 7]] = expected[[0, 8, 0]]
    copy_blocks(InterpretedLauncher(), memory, pairs, block_bytes)
    assert torch.equal(memory.view(9, block_bytes), expected)


@pytest.mark.parametrize("block_bytes", SIZES)
def test_gathers_and_scatters(block_bytes):
    memory, staging = arena(9, block_bytes), torch.zeros(4 * block_bytes, dtype=torch.uint8)
    blocks = torch.tensor([7, 0, 3])
    gather_blocks(InterpretedLauncher(), memory, blocks, staging, block_bytes)
    found = staging.view(4, block_bytes)
    assert torch.equal(found[:3], memory.view(9, block_bytes)[blocks])
    assert not found[3].any()
    target = torch.zeros(8 * block_bytes, dtype=torch.uint8)
    scatter_blocks(InterpretedLauncher(), staging, torch.tensor([2, -1, 6]), target, block_bytes)
    placed = target.view(8, block_bytes)
    assert torch.equal(placed[[2, 6]], found[[0, 2]])
    assert not placed[[0, 1, 3, 4, 5, 7]].any()


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_memory_may_begin_anywhere(offset):
    whole = arena(5, 64)
    memory = whole[offset : offset + 4 * 64]
    expected = memory.clone()
    expected[64:128] = expected[192:256]
    copy_blocks(InterpretedLauncher(), memory, torch.tensor([[3, 1]]), 64)
    assert torch.equal(memory, expected)


def test_nothing_to_copy():
    memory = arena(2, 32)
    before = memory.clone()
    copy_blocks(InterpretedLauncher(), memory, torch.empty(0, 2, dtype=torch.int64), 32)
    assert torch.equal(memory, before)


def test_refuses_what_does_not_fit():
    memory, pairs, blocks = arena(4, 32), torch.tensor([[0, 1]]), torch.tensor([0, 1])
    launch = InterpretedLauncher()
    with pytest.raises(ValueError, match="not dense uint8"):
        copy_blocks(launch, memory.view(torch.int32), pairs, 32)
    with pytest.raises(ValueError, match=r"shape \(2,\).*\[N, 2\]"):
        copy_blocks(launch, memory, pairs[0], 32)
    with pytest.raises(ValueError, match="block_bytes=0 must be positive"):
        copy_blocks(launch, memory, pairs, 0)
    with pytest.raises(ValueError, match="staging of 63 bytes is smaller than 2 blocks of 32"):
        gather_blocks(launch, memory, blocks, memory[:63], 32)
    with pytest.raises(ValueError, match=r"shape \(1, 2\).*give \[N\]"):
        scatter_blocks(launch, memory, pairs, memory, 32)
