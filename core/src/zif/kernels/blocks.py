"""Copies of whole KV blocks: inside an arena, and between an arena and a contiguous staging buffer.

Bytes are moved, whatever they mean. A block number below zero, on either side, copies nothing: lists may be padded.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher

_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_WIDEST_ACCESS = 16


@triton.jit
def _copy_blocks(
    source, target, source_blocks, target_blocks, source_step, target_step, units,
    WORDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    # A side without numbers is the staging buffer: entry i is its block i.
    source_block = entry
    target_block = entry
    if source_blocks is not None:
        source_block = tl.load(source_blocks + entry * source_step)
    if target_blocks is not None:
        target_block = tl.load(target_blocks + entry * target_step)
    # A block is a multiple of UNIT words, which the compiler can see: it moves that many at once.
    words = units * UNIT
    place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = place < tl.where((source_block >= 0) & (target_block >= 0), words, 0)
    moved = tl.load(source + source_block * words + place, mask=inside, other=0)
    tl.store(target + target_block * words + place, moved, mask=inside)


@dataclass(frozen=True, slots=True)
class _Side:
    """One end of a copy: bytes, and the numbers of the blocks in them; None: entry i is block i."""

    memory: torch.Tensor
    blocks: torch.Tensor | None


def copy_blocks(launch: Launcher, memory: torch.Tensor, pairs: torch.Tensor, block_bytes: int) -> None:
    """Copy blocks onto others of the same memory.

    memory: uint8, [any number of bytes]. pairs: [N, 2], int64, source and target on the device. All copies are under
    way at once: a block that is a target may be no other pair's source or target. Raises `ValueError`.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs have the shape {tuple(pairs.shape)!r}; give [N, 2], source and target of each copy")
    _copy(launch, _Side(memory, pairs[:, 0]), _Side(memory, pairs[:, 1]), block_bytes)


def gather_blocks(
    launch: Launcher, memory: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor, block_bytes: int
) -> None:
    """Copy blocks of `memory` into the first blocks of `staging`, in the order of `blocks`.

    memory, staging: uint8. blocks: [N], int64; staging holds at least N blocks. Raises `ValueError`.
    """
    _check_staging(blocks, staging, block_bytes)
    _copy(launch, _Side(memory, blocks), _Side(staging, None), block_bytes)


def scatter_blocks(
    launch: Launcher, staging: torch.Tensor, blocks: torch.Tensor, memory: torch.Tensor, block_bytes: int
) -> None:
    """Copy the first blocks of `staging` to distinct blocks of `memory`: the reverse of `gather_blocks`."""
    _check_staging(blocks, staging, block_bytes)
    _copy(launch, _Side(staging, None), _Side(memory, blocks), block_bytes)


def _copy(launch: Launcher, source: _Side, target: _Side, block_bytes: int) -> None:
    for side in (source, target):
        if side.memory.dtype != torch.uint8 or not side.memory.is_contiguous():
            raise ValueError(f"memory of {side.memory.dtype!r} is not dense uint8; give a view of its bytes")
    if block_bytes <= 0:
        raise ValueError(f"block_bytes={block_bytes!r} must be positive")
    word = _word_bytes(block_bytes, source.memory, target.memory)
    unit = math.gcd(_WIDEST_ACCESS, block_bytes) // word
    words = block_bytes // word
    flat = [side.memory.view(-1).view(_WORDS[word]) for side in (source, target)]
    steps = [0 if side.blocks is None else side.blocks.stride(0) for side in (source, target)]
    listed = source.blocks if source.blocks is not None else target.blocks
    assert listed is not None, "one side of a copy names its blocks"
    config = launch.tuning.config("copy_blocks", word_bytes=word, block_bytes=block_bytes)
    grid = (listed.shape[0], triton.cdiv(words, config["WORDS"]))
    launch(_copy_blocks, grid, (*flat, source.blocks, target.blocks, *steps, words // unit), config, UNIT=unit)


def _word_bytes(block_bytes: int, *memories: torch.Tensor) -> int:
    """Return the widest word in which blocks of all these memories are whole and aligned."""
    starts = [0 if memory.device.type == "meta" else memory.data_ptr() for memory in memories]
    return math.gcd(max(_WORDS), block_bytes, *starts, *(memory.numel() for memory in memories))


def _check_staging(blocks: torch.Tensor, staging: torch.Tensor, block_bytes: int) -> None:
    if blocks.dim() != 1:
        raise ValueError(f"blocks have the shape {tuple(blocks.shape)!r}; give [N]")
    if staging.numel() < blocks.shape[0] * block_bytes:
        raise ValueError(
            f"staging of {staging.numel()!r} bytes is smaller than {blocks.shape[0]} blocks of {block_bytes} bytes"
        )


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: blocks of 16 tokens of one layer's 8 heads, and of 32 layers."""
    for block_bytes in (2 * 16 * 8 * 128 * 2, 32 * 2 * 16 * 8 * 128 * 2, (512 + 64) * 16 + 16):
        memory = torch.empty(16 * block_bytes, dtype=torch.uint8, device="meta")
        staging = torch.empty(4 * block_bytes, dtype=torch.uint8, device="meta")
        pairs = torch.empty(4, 2, dtype=torch.int64, device="meta")
        copy_blocks(launch, memory, pairs, block_bytes)
        gather_blocks(launch, memory, pairs[:, 0].contiguous(), staging, block_bytes)
        scatter_blocks(launch, staging, pairs[:, 0].contiguous(), memory, block_bytes)
