"""Norms against the executable specification in float64."""

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.norms import add_rms_norm, rms_norm
from zif.reference.ops import ReferenceOps

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 96), (3, 2, 80), (2, 1025), (0, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_the_reference(dtype, shape, offset):
    torch.manual_seed(0)
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    launch = InterpretedLauncher()
    close = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    expected = ReferenceOps().rms_norm(x.double(), weight.double(), 1e-5, offset)
    torch.testing.assert_close(rms_norm(launch, x, weight, 1e-5, offset).double(), expected, **close)
    got = add_rms_norm(launch, x, residual, weight, 1e-5, offset)
    assert torch.equal(got.residual, x + residual)
    expected = ReferenceOps().rms_norm((x + residual).double(), weight.double(), 1e-5, offset)
    torch.testing.assert_close(got.normed.double(), expected, **close)


def test_rows_may_be_strided():
    fused = torch.randn(4, 192)
    x = fused[:, 64:128]
    weight = torch.ones(64)
    expected = ReferenceOps().rms_norm(x, weight, 1e-5, 0.0)
    torch.testing.assert_close(rms_norm(InterpretedLauncher(), x, weight, 1e-5, 0.0), expected)


def test_shapes_that_do_not_fit():
    x, launch = torch.randn(4, 64), InterpretedLauncher()
    with pytest.raises(ValueError, match=r"weight is \(32,\), and the rows of x have 64 elements"):
        rms_norm(launch, x, torch.ones(32), 1e-5, 0.0)
    with pytest.raises(ValueError, match=r"residual is \(3, 64\), and x \(4, 64\)"):
        add_rms_norm(launch, x, x[:3], torch.ones(64), 1e-5, 0.0)
