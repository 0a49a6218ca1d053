"""Gated activations against the executable specification in float64."""

import math

import pytest
import torch

from zif.contract import Activation
from zif.kernels.activations import gated_activation
from zif.kernels.interpreter import InterpretedLauncher
from zif.reference.ops import ReferenceOps

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 160), (65, 66), (2, 2 * 257), (0, 64)])
@pytest.mark.parametrize("activation", Activation)
def test_equals_the_reference(dtype, shape, activation):
    gate_up = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    got = gated_activation(InterpretedLauncher(), gate_up, activation)
    expected = ReferenceOps().gated_activation(gate_up.double(), activation)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
def test_special_values_are_those_of_the_reference(dtype, activation):
    # A gate of -inf is left out: the limit is 0, the product of its factors NaN, and both are in use.
    gates = [math.nan, math.inf, -1e4, 1e4, -200.0, -0.0, 0.0, 7.0, 8.0, 1e-30]
    ups = [math.nan, math.inf, -math.inf, 1e3, -1e3, -1.0, 0.0, -7.5, 7.5]
    pairs = torch.cartesian_prod(torch.tensor(gates), torch.tensor(ups)).to(dtype)
    got = gated_activation(InterpretedLauncher(), pairs, activation)
    # In float32, where f(-200) is 0, and 0 * inf is NaN.
    expected = ReferenceOps().gated_activation(pairs.float(), activation).to(dtype)
    tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("activation", Activation)
def test_a_nan_stays_in_its_row_and_rows_may_be_strided(activation):
    fused = torch.randn(5, 300)
    clean = gated_activation(InterpretedLauncher(), fused[:, 100:260], activation)
    torch.testing.assert_close(clean, ReferenceOps().gated_activation(fused[:, 100:260], activation))
    fused[2, 130] = math.nan
    dirty = gated_activation(InterpretedLauncher(), fused[:, 100:260], activation)
    assert torch.equal(dirty[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert dirty[2].isnan().tolist() == [place == 30 for place in range(80)]


def test_refuses_an_odd_number_of_columns():
    with pytest.raises(ValueError, match="7 columns"):
        gated_activation(InterpretedLauncher(), torch.zeros(2, 7), Activation.SILU)
