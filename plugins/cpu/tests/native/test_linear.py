"""Products of the native library against float64, for every instruction set."""

import math

import pytest
import torch

from zif_cpu.library import DTYPE_CODES

# Tokens, inputs, outputs: one of everything, borders of vectors and tiles, none of their multiples.
SHAPES = (
    *((1, 1, 1), (1, 64, 16), (1, 1000, 7), (2, 31, 32), (3, 7, 5), (4, 96, 33), (5, 33, 17), (8, 80, 64)),
    *((15, 128, 31), (16, 32, 16), (17, 96, 100), (33, 260, 48), (40, 80, 33), (64, 200, 65), (100, 64, 130)),
)
HALF_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def multiply(library, x, weight, bias=None):
    """Return x @ weight.T + bias as the library computes it, between guards that must stay as they are."""
    tokens, outputs = x.shape[0], weight.shape[0]
    guarded = torch.full((tokens * outputs + 64,), 7.0, dtype=x.dtype)
    y = guarded[32:-32].view(tokens, outputs)
    library.raw.zif_cpu_linear(
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(tokens, x.shape[1], outputs, DTYPE_CODES[str(x.dtype).removeprefix("torch.")]),
    )
    outside = torch.cat((guarded[:32], guarded[-32:]))
    assert bool((outside == 7).all()), "written outside of the result"
    return y


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_products_are_those_of_float64(library, name):
    torch.manual_seed(1)
    dtype = getattr(torch, name)
    for tokens, inputs, outputs in SHAPES:
        x = torch.randn(tokens, inputs + 3).to(dtype)[:, :inputs]
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        exact = x.double() @ weight.double().T
        scale = x.double().abs() @ weight.double().abs().T
        for given, want in ((None, exact), (bias, exact + bias.double())):
            error = (multiply(library, x, weight, given).double() - want).abs()
            # Half a unit of the result, and float32 sums whose terms are as large as `scale`.
            allowed = 1.01 * HALF_UNIT[name] * want.abs() + 2.0**-23 * math.sqrt(inputs + 8) * scale + 1e-30
            assert bool((error <= allowed).all()), (tokens, inputs, outputs, float((error / allowed).max()))


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_nan_of_a_token_stays_with_it(library, name):
    x = torch.randn(20, 48).to(getattr(torch, name))
    x[3, 40] = torch.nan
    y = multiply(library, x, torch.randn(33, 48).to(x.dtype))
    assert bool(y[3].isnan().all())
    assert not bool(y[torch.arange(20) != 3].isnan().any())


def test_threads_do_not_change_a_bit(library):
    x, weight = torch.randn(9, 300).bfloat16(), torch.randn(500, 300).bfloat16()
    two = multiply(library, x, weight)
    library.raw.zif_cpu_use_threads(1)
    assert torch.equal(multiply(library, x, weight), two)
