"""Codes as checkpoints pack them, to codes as a `QuantizedWeight` holds them. Plain functions of tensors, host memory.

O outputs, I inputs, G groups. Words have 32 bits and hold the first code in the lowest ones; a word's bytes are taken
in the order of this machine, which is checked to be little-endian, as the files are.
"""

import sys

import torch

from zif.contract import WeightScheme
from zif.reference.quantization import pack

assert sys.byteorder == "little", "files of weights are little-endian, and their words are read as they lie"

_AWQ_LOW, _AWQ_HIGH = [0, 4, 1, 5], [2, 6, 3, 7]
"""Which of eight neighbouring outputs the four bytes of an AWQ word hold in their lower and upper halves."""
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in an AWQ word the eight outputs lie, counted in codes from the lowest."""


def held_codes(words: torch.Tensor, scheme: WeightScheme, num_inputs: int) -> torch.Tensor:
    """Return codes as they are held, from words along the inputs that count codes from 0. words: [O, W], int32."""
    stored = words.contiguous().view(torch.uint8)
    if scheme.bits == 8:
        return (stored[:, :num_inputs] ^ 128).view(torch.int8)
    return _pairs_in_halves(stored[:, : num_inputs // 2], scheme.group_size or num_inputs)


def held_awq_codes(words: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Return codes as they are held, [O, I / 2], from AWQ words along the outputs. words: [I, O / 8], int32."""
    stored = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8)
    codes[..., _AWQ_LOW], codes[..., _AWQ_HIGH] = stored & 15, stored >> 4
    return pack(codes.flatten(1).T.contiguous(), scheme)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of each row of words, [..., W], int32, counted from 0."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]


def unpack_awq_words(words: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` codes of each row of AWQ words, [..., W], int32."""
    codes = unpack_words(words, 4, words.shape[-1] * 8).view(*words.shape, 8)
    return codes[..., _AWQ_ORDER].flatten(-2)[..., :count]


def held_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return zeros that count codes from 0 as they are held: codes of 8 bits are counted from -128."""
    return (zeros - (128 if bits == 8 else 0)).to(torch.int16)


def _pairs_in_halves(pairs: torch.Tensor, group_size: int) -> torch.Tensor:
    """Let a byte hold codes j and j + g / 2 of a group of g, where it holds neighbours. pairs: [O, I / 2], uint8.

    Two bytes of each half of a group make two bytes of the other order, without a byte for each code on the way.
    """
    half = group_size // 2
    if half % 2:
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        return pack(codes, WeightScheme(4, group_size))
    groups = pairs.view(pairs.shape[0], -1, 2, half // 2)
    first, second = groups[:, :, 0], groups[:, :, 1]
    halves = torch.stack(((first & 15) | (second << 4), (first >> 4) | (second & 240)), dim=-1)
    return halves.view(pairs.shape)
