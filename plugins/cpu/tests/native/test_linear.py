"""Products of the native library against float64, for every instruction set."""

import math
from struct import Struct

import pytest
import torch

from zif_cpu.library import DTYPE_CODES

# Tokens, inputs, outputs: one of everything, borders of vectors and tiles, none of their multiples.
SHAPES = (
    *((1, 1, 1), (1, 64, 16), (1, 1000, 7), (2, 31, 32), (3, 7, 5), (4, 96, 33), (5, 33, 17), (8, 80, 64)),
    *((15, 128, 31), (16, 32, 16), (17, 96, 100), (33, 260, 48), (40, 80, 33), (64, 200, 65), (100, 64, 130)),
)
# Many tokens: blocks of tokens, inputs and outputs, one of each and some, whole ones and parts.
MANY = (
    *((65, 1024, 300), (96, 31, 33), (97, 512, 15), (200, 1056, 129), (513, 1000, 70), (300, 2080, 290)),
    *((545, 33, 257), (1000, 96, 31), (600, 1536, 520)),
)
HALF_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def multiply(library, x, weight, bias=None, wide=False):
    """Return x @ weight.T + bias as the library computes it, between guards that must stay as they are.

    wide: in float32, as it was summed.
    """
    tokens, outputs = x.shape[0], weight.shape[0]
    guarded = torch.full((tokens * outputs + 64,), 7.0, dtype=torch.float32 if wide else x.dtype)
    y = guarded[32:-32].view(tokens, outputs)
    arrays = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    sizes = x.stride(0), tokens, x.shape[1], outputs, DTYPE_CODES[str(x.dtype).removeprefix("torch.")]
    library.raw.zif_cpu_linear(Struct("4P4q2iP").pack(*arrays, *sizes, wide, 0))
    outside = torch.cat((guarded[:32], guarded[-32:]))
    assert bool((outside == 7).all()), "written outside of the result"
    return y


def products(dtype):
    """Yield arrays of every shape, x @ weight.T + bias in float64, and what float32 sums of it may be wrong by."""
    for tokens, inputs, outputs in SHAPES + MANY:
        x = torch.randn(tokens, inputs + 3).to(dtype)[:, :inputs]
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        exact = x.double() @ weight.double().T
        scale = x.double().abs() @ weight.double().abs().T
        error = 2.0**-23 * math.sqrt(inputs + 8) * scale + 1e-30
        yield (x, weight, None), exact, error
        yield (x, weight, bias), exact + bias.double(), error


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_products_are_those_of_float64(library, name):
    torch.manual_seed(1)
    for arrays, want, allowed in products(getattr(torch, name)):
        error = (multiply(library, *arrays).double() - want).abs()
        allowed = allowed + 1.01 * HALF_UNIT[name] * want.abs()
        assert bool((error <= allowed).all()), (*map(len, arrays[:2]), float((error / allowed).max()))


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_wide_products_are_the_same_sums_unrounded(library, name):
    torch.manual_seed(2)
    for arrays, want, allowed in products(getattr(torch, name)):
        sums = multiply(library, *arrays, wide=True)
        assert torch.equal(sums.to(arrays[0].dtype), multiply(library, *arrays)), (*map(len, arrays[:2]),)
        error, allowed = (sums.double() - want).abs(), allowed + 1.01 * HALF_UNIT["float32"] * want.abs()
        assert bool((error <= allowed).all()), (*map(len, arrays[:2]), float((error / allowed).max()))


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_errors_do_not_grow_with_the_inputs(library, tokens):
    """Equal terms, whose roundings all lean one way: one long chain of additions would be wrong by far more."""
    x, weight = torch.full((tokens, 30_000), 1 / 3), torch.full((17, 30_000), 1 / 7)
    want = x[0].double() @ weight[0].double()
    error = (multiply(library, x, weight).double() - want).abs().max() / want
    assert float(error) < 100 * 2.0**-24


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_nan_of_a_token_stays_with_it(library, name):
    x = torch.randn(20, 48).to(getattr(torch, name))
    x[3, 40] = torch.nan
    y = multiply(library, x, torch.randn(33, 48).to(x.dtype))
    assert bool(y[3].isnan().all())
    assert not bool(y[torch.arange(20) != 3].isnan().any())


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_a_row_has_the_same_bits_in_any_batch(library, name):
    """Numbers of tokens on both sides of every border between ways to multiply, and of every tile."""
    torch.manual_seed(3)
    for inputs, outputs in ((1000, 45), (1120, 70), (2100, 33)):
        x, weight, bias = (
            torch.randn(*size).to(getattr(torch, name)) for size in ((620, inputs), (outputs, inputs), (outputs,))
        )
        together = multiply(library, x, weight, bias)
        for count in (1, 2, 3, 5, 12, 13, 17, 48, 49, 64, 65, 97, 132, 133, 260, 512, 513, 530):
            for first in (0, 620 - count):
                rows = slice(first, first + count)
                assert torch.equal(multiply(library, x[rows], weight, bias), together[rows]), (inputs, count, first)


@pytest.mark.parametrize("tokens", [9, 530])
@pytest.mark.parametrize("name", DTYPE_CODES)
def test_threads_do_not_change_a_bit(library, name, tokens):
    torch.manual_seed(4)
    x, weight = torch.randn(tokens, 1100).to(getattr(torch, name)), torch.randn(500, 1100).to(getattr(torch, name))
    two = multiply(library, x, weight)
    for threads in (1, 3):
        library.raw.zif_cpu_use_threads(threads)
        assert torch.equal(multiply(library, x, weight), two)


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_nan_of_one_of_many_tokens_stays_with_it(library, name):
    x = torch.randn(530, 1100).to(getattr(torch, name))
    x[517, 1099] = torch.nan
    y = multiply(library, x, torch.randn(33, 1100).to(x.dtype))
    assert bool(y[517].isnan().all())
    assert int(y.isnan().any(1).sum()) == 1
