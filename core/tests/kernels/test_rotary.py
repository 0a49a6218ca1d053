"""Rotary positions against the executable specification, and what is written to KV pages against torch's indexing."""

import dataclasses
import math

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.rotary import Angles, KVTarget, ProjectedHeads, rotate, rotate_and_write, write
from zif.reference.ops import ReferenceOps

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


def angles_of(num_tokens, num_pairs, interleaved=False):
    angle = torch.rand(num_tokens, num_pairs, generator=torch.Generator().manual_seed(1)) * 6
    return Angles(angle.cos(), angle.sin(), interleaved)


def heads_of(num_tokens, head_dim, dtype=torch.float32, num_heads=6, num_kv_heads=2):
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=torch.Generator().manual_seed(0))
    return ProjectedHeads(*fused.to(dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1))


def target_of(slots, head_dim, dtype, num_kv_heads=2, **scales):
    pages = torch.zeros(3 * 2 * 2, num_kv_heads, 4, head_dim).to(dtype)
    return KVTarget(pages, torch.tensor(slots), layer=1, num_layers=2, **scales)


def written(target):
    """Return keys and values by slot: [slots, K, D] each."""
    _, num_kv_heads, block_size, head_dim = target.pages.shape
    layers = target.pages.view(3, 2, 2, num_kv_heads, block_size, head_dim).transpose(3, 4)
    assert not layers[:, 0].float().any(), "another layer's pages were written"
    return (layers[:, 1, kv].reshape(-1, num_kv_heads, head_dim) for kv in range(2))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "num_pairs"), [(2, 1), (64, 32), (80, 40), (96, 48), (100, 20), (64, 5)])
def test_equals_the_reference(interleaved, dtype, head_dim, num_pairs):
    heads, angles = heads_of(5, head_dim, dtype), angles_of(5, num_pairs, interleaved)
    got = rotate(InterpretedLauncher(), heads.query, heads.key, angles.cos, angles.sin, interleaved)
    wide = heads.query.double(), heads.key.double(), angles.cos.double(), angles.sin.double()
    expected = ReferenceOps().rotate(*wide, interleaved)
    for found, wanted in ((got.query, expected.query), (got.key, expected.key)):
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])
        assert torch.equal(found[..., 2 * num_pairs :].double(), wanted[..., 2 * num_pairs :])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (8, 1), (9, 3), (17, 17), (3, 8)])
def test_any_number_of_heads_and_no_tokens(num_heads, num_kv_heads):
    for num_tokens in (0, 1, 3):
        heads, angles = heads_of(num_tokens, 16, torch.float32, num_heads, num_kv_heads), angles_of(num_tokens, 8)
        got = rotate(InterpretedLauncher(), heads.query, heads.key, angles.cos, angles.sin, False)
        expected = ReferenceOps().rotate(heads.query, heads.key, angles.cos, angles.sin, False)
        torch.testing.assert_close(got.query, expected.query, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got.key, expected.key, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_nan_stays_in_its_pair(interleaved):
    heads, angles = heads_of(4, 32), angles_of(4, 8, interleaved)
    heads.query[1, 2, 3] = math.nan
    heads.key[2, 0, 20] = math.inf
    got = rotate(InterpretedLauncher(), heads.query, heads.key, angles.cos, angles.sin, interleaved)
    assert got.query.isnan().nonzero().tolist() == [[1, 2, 2], [1, 2, 3]] if interleaved else [[1, 2, 3], [1, 2, 11]]
    assert (~got.key.isfinite()).nonzero().tolist() == [[2, 0, 20]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "num_pairs", "num_kv_heads"), [(32, 16, 2), (80, 40, 1), (24, 4, 9)])
def test_writes_rotated_keys_and_plain_values_to_their_slots(dtype, head_dim, num_pairs, num_kv_heads):
    heads, angles = heads_of(4, head_dim, dtype, num_kv_heads=num_kv_heads), angles_of(4, num_pairs)
    target = target_of([9, -1, 0, 11], head_dim, dtype, num_kv_heads)
    launch = InterpretedLauncher()
    query = rotate_and_write(launch, heads, angles, target)
    rotated = rotate(launch, heads.query, heads.key, angles.cos, angles.sin, False)
    assert torch.equal(query, rotated.query)
    for found, wanted in zip(written(target), (rotated.key, heads.value), strict=True):
        assert torch.equal(found[[9, 0, 11]], wanted[[0, 2, 3]])
        assert not found[[1, 2, 3, 4, 5, 6, 7, 8, 10]].any()


def quantized(values, scale, dtype):
    scaled = values.float() / scale
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).nan_to_num(0.0).to(dtype)
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


@pytest.mark.parametrize("pages_dtype", LARGEST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_may_be_quantized(dtype, pages_dtype):
    heads, angles = heads_of(3, 32, dtype), angles_of(3, 16)
    target = target_of([3, 7, -1], 32, pages_dtype, key_scale=0.021, value_scale=0.013)
    launch = InterpretedLauncher()
    rotate_and_write(launch, heads, angles, target)
    exact = ReferenceOps().rotate(heads.query.float(), heads.key.float(), angles.cos, angles.sin, False)
    expected = quantized(exact.key, 0.021, pages_dtype), quantized(heads.value, 0.013, pages_dtype)
    for found, wanted in zip(written(target), expected, strict=True):
        assert torch.equal(found[[3, 7]].float(), wanted[:2].float())
        assert not found[[0, 1, 2, 4, 5, 6, 8]].float().any()


@pytest.mark.parametrize("pages_dtype", LARGEST)
def test_every_float16_is_quantized_as_torch_does(pages_dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    values = every.view(1, 1, -1)
    target = KVTarget(torch.zeros(2, 1, 1, 2**16).to(pages_dtype), torch.tensor([0]), 0, 1, 1.0, 3.0)
    write(InterpretedLauncher(), values, values, target)
    for found, scale in zip(target.pages, (1.0, 3.0), strict=True):
        wanted = quantized(every, scale, pages_dtype)
        if pages_dtype == torch.int8:
            assert torch.equal(found.flatten(), wanted)
        else:
            is_nan = every.isnan()
            assert torch.equal(found.flatten().view(torch.uint8)[~is_nan], wanted.view(torch.uint8)[~is_nan])
            assert found.flatten().float()[is_nan].isnan().all()


def test_writes_without_rotating():
    heads = heads_of(3, 20, torch.bfloat16)
    target = target_of([2, 5, -1], 20, torch.bfloat16)
    write(InterpretedLauncher(), heads.key, heads.value, target)
    for found, wanted in zip(written(target), (heads.key, heads.value), strict=True):
        assert torch.equal(found[[2, 5]], wanted[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, "layer=2 must be from 0 to 1"),
        ({"key_scale": 0.0}, "must be positive"),
        ({"value_scale": math.nan}, "must be positive"),
        ({"slots": torch.tensor([1])}, "1 slots must be one per token, 3"),
        ({"pages": torch.zeros(12, 2, 4, 16)}, r"must be \[T, K, D\] twice"),
        ({"pages": torch.zeros(12, 2, 4, 32, dtype=torch.float16)}, "cannot hold torch.float32"),
        ({"pages": torch.zeros(12, 2, 32, 4).transpose(2, 3)}, "must be dense"),
    ],
)
def test_refuses_a_target_that_does_not_fit(changes, message):
    heads, angles = heads_of(3, 32), angles_of(3, 16)
    target = dataclasses.replace(target_of([0, 1, 2], 32, torch.float32), **changes)
    with pytest.raises(ValueError, match=message):
        rotate_and_write(InterpretedLauncher(), heads, angles, target)


def test_refuses_angles_that_do_not_fit():
    heads = heads_of(3, 32)
    for cos, sin in (
        (torch.ones(2, 16), torch.ones(2, 16)),
        (torch.ones(3, 17),) * 2,
        (torch.ones(3, 8), torch.ones(3, 4)),
    ):
        with pytest.raises(ValueError, match=r"\[3, R\] with R from 1 to 16"):
            rotate(InterpretedLauncher(), heads.query, heads.key, cos, sin, False)
