"""Norms, rotations and gated activations of the native library, against the reference in float64."""

import ctypes
from struct import Struct

import pytest
import torch

from zif.contract import Activation
from zif.reference.ops import ReferenceOps
from zif_cpu.operators import NativeOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 15, 16, 17, 33, 80, 127, 576)
# Half a unit in the last place of the dtype, and what float32 loses before.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}
FLOOR = 2e-6


class Fallback(ReferenceOps):
    """Operators that nobody may call."""

    def refuse(self, *arguments):
        raise AssertionError("the reference served")

    linear = rms_norm = add_rms_norm = rotate = gated_activation = experts = refuse


class Served(NativeOps, Fallback):
    """The operators; falling back to the reference is an error."""


@pytest.fixture
def ops(library):
    return Served(library, library.isas[-1])


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_near(actual, expected):
    """expected: float64."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=FLOOR, equal_nan=True, check_dtype=False
    )


def norm(x, weight, eps=1e-5, offset=0.0):
    return ReferenceOps().rms_norm(x.double(), weight.double(), eps, offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", SIZES)
def test_rms_norm(ops, dtype, channels):
    x, weight = random(5, channels, dtype=dtype, scale=3.0), random(channels, dtype=dtype, seed=1)
    assert_near(ops.rms_norm(x, weight, 1e-5, 0.0), norm(x, weight))
    assert_near(ops.rms_norm(x, weight, 0.5, 1.0), norm(x, weight, 0.5, 1.0))


def test_rms_norm_of_rows_with_gaps(ops):
    whole, weight = random(6, 700, dtype=torch.bfloat16), random(576, dtype=torch.bfloat16)
    x = whole[:, 50:626]
    assert_near(ops.rms_norm(x, weight, 1e-5, 0.0), norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_of_a_fused_projection(ops, dtype):
    qkv, weight = random(7, 640, dtype=dtype), random(80, dtype=dtype)
    heads = qkv[:, 160:480].view(7, 4, 80)
    assert_near(ops.rms_norm(heads, weight, 1e-5, 0.0), norm(heads, weight))
    assert_near(ops.rms_norm(heads[:1], weight, 1e-5, 0.0), norm(heads[:1], weight))


def test_rms_norm_of_many_rows_by_all_threads(ops):
    x, weight = random(300, 1024, dtype=torch.bfloat16), random(1024, dtype=torch.bfloat16)
    normed = ops.rms_norm(x, weight, 1e-5, 0.0)
    assert_near(normed, norm(x, weight))
    assert torch.equal(normed[17:18], ops.rms_norm(x[17:18], weight, 1e-5, 0.0)), "a row depends on itself alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", SIZES)
def test_add_rms_norm_rounds_the_sum_before_it_normalizes(ops, dtype, channels):
    x, residual = random(5, channels, dtype=dtype, scale=30.0), random(5, channels + 2, dtype=dtype, seed=1)[:, 1:-1]
    weight, before = random(channels, dtype=dtype, seed=2), residual.clone()
    output = ops.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    assert torch.equal(output.residual, residual + x)
    assert_near(output.normed, norm(output.residual, weight, 1e-5, 1.0))
    assert torch.equal(residual, before)


def test_the_sum_may_take_the_place_of_the_residual(library):
    x, residual = random(4, 100, dtype=torch.bfloat16), random(4, 100, dtype=torch.bfloat16, seed=1)
    weight, y, expected = random(100, dtype=torch.bfloat16, seed=2), torch.empty_like(x), residual + x
    arrays = (array.data_ptr() for array in (x, residual, weight, residual, y))
    library.raw.zif_cpu_add_rms_norm(Struct("5P5q2fi").pack(*arrays, 100, 100, 4, 1, 100, 1e-5, 0.0, 1))
    assert torch.equal(residual, expected)
    assert_near(y, norm(expected, weight))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(2, 1), (80, 40), (80, 20), (81, 40), (96, 33), (128, 64), (7, 0)])
def test_rotate(ops, dtype, head_dim, rotated, interleaved):
    qkv = random(5, 7 * head_dim, dtype=dtype, scale=4.0)
    query, key = (part.view(5, -1, head_dim) for part in qkv.split([4 * head_dim, 2 * head_dim, head_dim], 1)[:2])
    angles = random(5, rotated, seed=3, scale=10.0)
    expected = ReferenceOps().rotate(
        query.double(), key.double(), angles.cos().double(), angles.sin().double(), interleaved
    )
    actual = ops.rotate(query, key, angles.cos(), angles.sin(), interleaved)
    assert_near(actual.query, expected.query)
    assert_near(actual.key, expected.key)
    assert torch.equal(actual.query[..., 2 * rotated :], query[..., 2 * rotated :])


def test_rotate_by_all_threads(ops):
    query, key, angles = random(70, 32, 128), random(70, 8, 128, seed=1), random(70, 64, seed=2)
    for interleaved in (False, True):
        arguments = query.double(), key.double(), angles.cos().double(), angles.sin().double(), interleaved
        expected = ReferenceOps().rotate(*arguments)
        actual = ops.rotate(query, key, angles.cos(), angles.sin(), interleaved)
        assert_near(actual.query, expected.query)
        assert_near(actual.key, expected.key)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", SIZES)
def test_gated_activation(ops, activation, dtype, channels):
    gate_up = random(5, 2 * channels + 6, dtype=dtype, scale=6.0)
    for x in (gate_up[:, 6:].contiguous(), gate_up[:, 6:]):
        expected = ReferenceOps().gated_activation(x.double(), activation)
        assert_near(ops.gated_activation(x, activation), expected)


# In float64, without the differences that lose the digits of small results.
EXACT = {
    Activation.SILU: lambda x: x * torch.sigmoid(x),
    Activation.GELU: lambda x: x * torch.special.erfc(x * -(0.5**0.5)) / 2,
    Activation.GELU_TANH: lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    Activation.SWIGLU_CLAMPED: lambda x: 2 * x.clamp(max=7) * torch.sigmoid(1.702 * x.clamp(max=7)),
}


@pytest.mark.parametrize("activation", list(Activation))
def test_gated_activation_of_every_size_of_number(ops, activation):
    large = torch.tensor([0.0, 1e-30, 88.7, 104.0, 1e4, 1e30])
    gate = torch.cat([torch.linspace(-14, 14, 20001), large, -large])
    actual = ops.gated_activation(torch.stack([gate, torch.ones_like(gate)], 1), activation)[:, 0]
    torch.testing.assert_close(actual.double(), EXACT[activation](gate.double()), rtol=3e-5, atol=1e-37)
    row = ops.gated_activation(torch.cat([gate, torch.ones_like(gate)])[None], activation)[0]
    assert torch.equal(row, actual), "the last elements of a row are as the others"


def test_gated_activation_by_all_threads(ops):
    x = random(130, 3000, dtype=torch.bfloat16)
    expected = ReferenceOps().gated_activation(x.double(), Activation.SILU)
    assert_near(ops.gated_activation(x, Activation.SILU), expected)
    assert_near(ops.gated_activation(x.view(13, 10, 3000), Activation.SILU), expected.view(13, 10, 1500))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_in_its_row(ops, dtype, bad):
    x, weight, angles = random(3, 4, 40, dtype=dtype), torch.ones(40, dtype=dtype), random(3, 20)
    x[1, 2, 33] = bad
    rows = x.view(12, 40)
    sound = [row for row in range(12) if row != 6]
    assert_near(ops.rms_norm(rows, weight, 1e-5, 0.0)[sound], norm(rows, weight)[sound])
    assert ops.rms_norm(rows, weight, 1e-5, 0.0)[6].isnan().any()
    output = ops.add_rms_norm(rows, torch.zeros_like(rows), weight, 1e-5, 0.0)
    assert torch.equal(output.residual, rows) or bad != bad
    assert_near(output.normed[sound], norm(rows, weight)[sound])
    for activation in Activation:
        expected = ReferenceOps().gated_activation(rows.double(), activation)
        assert_near(ops.gated_activation(rows, activation), expected)
    for interleaved in (False, True):
        arguments = angles.cos().double(), angles.sin().double(), interleaved
        expected = ReferenceOps().rotate(x.double(), x.double(), *arguments).query
        assert_near(ops.rotate(x, x, angles.cos(), angles.sin(), interleaved).query, expected)


def test_a_gate_that_is_no_number_gives_none(ops):
    for activation in Activation:
        for row in ([torch.nan, 1.0], [1.0, torch.nan]):
            assert ops.gated_activation(torch.tensor([row]), activation).isnan().all()


@pytest.mark.parametrize("code", range(3))
@pytest.mark.parametrize("channels", [1, 15, 17, 63])
def test_nothing_is_written_behind_an_array(library, code, channels):
    size = (4, 2, 2)[code]
    x = (ctypes.c_byte * (2 * channels * size))()
    y = (ctypes.c_byte * (channels * size + 64))(*[7] * (channels * size + 64))
    pointers = ctypes.addressof(x), ctypes.addressof(y)
    library.raw.zif_cpu_gated_activation(Struct("2P3q2i").pack(*pointers, 2 * channels, 1, channels, 0, code))
    assert bytes(y[channels * size :]) == bytes([7] * 64)
    norm_call = Struct("5P5q2fi").pack(
        pointers[0], 0, pointers[0], 0, pointers[1], 0, 0, 1, 1, channels, 1.0, 0.0, code
    )
    library.raw.zif_cpu_rms_norm(norm_call)
    assert bytes(y[channels * size :]) == bytes([7] * 64)
    assert not any(y[: channels * size])
