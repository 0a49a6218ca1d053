"""Words of 32 bits to codes: against bytes that the formats' own writers made, and against shuffles done one by one."""

import numpy as np
import pytest
import torch

from support.quantized_checkpoints import AWQ_ORDER, FORMS, Codes, pack_words
from zif.contract import WeightScheme
from zif.models.quantization.rounding import Rounder
from zif.models.quantization.unpacking import held_awq_codes, held_codes, unpack_awq_words, unpack_words
from zif.reference.quantization import pack, quantize

FOUR_BITS = np.arange(20).reshape(2, 10) % 16
FOUR_BIT_WORDS = np.array([[1985229328, 152], [285138106, 50]], np.int32)
"""What `pack_to_int32` of compressed-tensors 0.20.0 makes of them; packed along the other axis it is transposed."""
EIGHT_BITS = np.arange(12).reshape(2, 6) * 21
EIGHT_BIT_WORDS = np.array([[1059722496, 26964], [-1113025666, 59346]], np.int32)
AWQ_WORD, AWQ_CODES = 0x76543210, [0, 4, 1, 5, 2, 6, 3, 7]
"""A word whose codes count up from the lowest, and the eight outputs that AutoAWQ reads from it."""


@pytest.mark.parametrize(("codes", "words", "bits"), [(FOUR_BITS, FOUR_BIT_WORDS, 4), (EIGHT_BITS, EIGHT_BIT_WORDS, 8)])
def test_words_of_the_formats_own_writer(codes: np.ndarray, words: np.ndarray, bits: int) -> None:
    assert np.array_equal(pack_words(codes, bits), words), "the tests' packer"
    assert np.array_equal(unpack_words(torch.from_numpy(words), bits, codes.shape[1]).numpy(), codes)
    held = held_codes(torch.from_numpy(words), WeightScheme(bits), codes.shape[1])
    counted_from_zero = torch.from_numpy(codes - (128 if bits == 8 else 0))
    assert torch.equal(held, pack(counted_from_zero, WeightScheme(bits)))


def test_word_of_awq() -> None:
    word = torch.tensor([[AWQ_WORD]], dtype=torch.int32)
    assert unpack_awq_words(word, 8).tolist() == [AWQ_CODES]
    assert unpack_awq_words(word, 5).tolist() == [AWQ_CODES[:5]]
    assert [AWQ_CODES[output] for output in AWQ_ORDER] == list(range(8))
    words = word.expand(16, 1)
    assert torch.equal(held_awq_codes(words, WeightScheme(4, 8))[:, 0], torch.tensor(AWQ_CODES, dtype=torch.uint8) * 17)


@pytest.mark.parametrize("group_size", [2, 4, 6, 8, 24, 32, None])
def test_neighbours_become_halves_of_groups(group_size: int | None) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 96))
    held = held_codes(torch.from_numpy(pack_words(codes, 4)), WeightScheme(4, group_size), 96)
    half = (group_size or 96) // 2
    for row in range(5):
        for byte in range(48):
            first = byte // half * 2 * half + byte % half
            assert held[row, byte] == codes[row, first] + 16 * codes[row, first + half]


def test_gptq_wraps_a_zero_of_zero() -> None:
    """The writer stores zeros less one; of 0 all bits are set, and all zeros of 4 bits from 1 to 15 stay themselves."""
    zeros = np.arange(16).reshape(16, 1)
    stored = FORMS["gptq"].writer(FORMS["gptq"], Codes(np.zeros((16, 8), int), zeros, np.ones((16, 1), np.float16)))
    assert unpack_words(torch.from_numpy(stored["qzeros"]), 4, 16).tolist() == [[15, *range(15)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", [WeightScheme(8, dynamic_activations=True), WeightScheme(4, 32), WeightScheme(4, 8)])
def test_rounding_is_the_references(scheme: WeightScheme, dtype: torch.dtype) -> None:
    numbers = (torch.randn(37, 96, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    numbers[3] = 0
    numbers[4, :50] = -0.0
    numbers[5] = 1e-44
    numbers[6, 0] = 3e4
    expected = quantize(numbers.float(), scheme)
    codes, scales = torch.zeros_like(expected.codes), torch.zeros_like(expected.scales)
    Rounder(scheme, 96).round(numbers, codes, scales)
    assert torch.equal(scales, expected.scales)
    assert torch.equal(codes, expected.codes)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1000, 64), (3, 40_000), (33, 992)])
def test_parts_are_rounded_as_the_whole(num_outputs: int, num_inputs: int) -> None:
    numbers, scheme = torch.randn(num_outputs, num_inputs), WeightScheme(4, 32)
    expected = quantize(numbers, scheme)
    codes, scales = torch.zeros_like(expected.codes), torch.zeros_like(expected.scales)
    Rounder(scheme, num_inputs).round(numbers, codes, scales)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales, expected.scales)
