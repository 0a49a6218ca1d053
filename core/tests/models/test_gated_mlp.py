"""Gated MLPs of the decoder: one operator gives what is gated, composed where a platform does not override it."""

import pytest
import torch

from support.quantized_weights import weight_of
from zif.contract import Activation, QuantizedWeight, WeightScheme
from zif.models.decoder import Mlp, Projection, Weight
from zif.models.spec import MlpSpec
from zif.reference.ops import ReferenceOps

SCHEMES = {
    "w8a8": WeightScheme(8, dynamic_activations=True),
    "w8a16-zeros": WeightScheme(8, zero_points=True),
    "w4a16-groups-of-16": WeightScheme(4, 16),
}
KINDS = ["plain", *SCHEMES]
CHANNELS, INNER = 32, 9


def gates_and_ups(kind: str, dtype: torch.dtype) -> Weight:
    """Return a weight, [2 * INNER, CHANNELS]."""
    if kind == "plain":
        return torch.randn(2 * INNER, CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)
    return weight_of(SCHEMES[kind], 2 * INNER, CHANNELS)[0]


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def in_two_parts(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """Return the product, and then its activation."""
    ops = ReferenceOps()
    product = ops.quantized_linear if isinstance(weight, QuantizedWeight) else ops.linear
    return ops.gated_activation(product(x, weight, bias), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", Activation)
def test_the_default_is_its_two_parts_to_the_bit(activation: Activation, kind: str, dtype: torch.dtype) -> None:
    weight = gates_and_ups(kind, dtype)
    for x in (
        rows(7, CHANNELS, dtype=dtype),
        rows(7, CHANNELS + 5, dtype=dtype)[:, 5:],
        rows(0, CHANNELS, dtype=dtype),
    ):
        for bias in (None, rows(2 * INNER, dtype=dtype)):
            gated = ReferenceOps().gated_linear(x, weight, bias, activation)
            assert gated.shape == (len(x), INNER)
            assert gated.dtype == dtype
            assert torch.equal(gated, in_two_parts(x, weight, bias, activation))


class Counting(ReferenceOps):
    """Give three times what is gated, and remember with what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def gated_linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor:
        self.calls.append((x, weight, bias, activation))
        return 3 * super().gated_linear(x, weight, bias, activation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_the_decoder_asks_for_the_operator_once(kind: str, has_bias: bool) -> None:
    ops, x, weight = Counting(), rows(5, CHANNELS, dtype=torch.float32), gates_and_ups(kind, torch.float32)
    bias = rows(2 * INNER, dtype=torch.float32) if has_bias else None
    down = Projection(rows(CHANNELS, INNER, dtype=torch.float32), rows(CHANNELS, dtype=torch.float32))
    mlp = Mlp(MlpSpec(INNER, Activation.GELU_TANH), Projection(weight, bias), down)
    got = mlp.run(ops, x)
    ((given, *others),) = ops.calls
    assert given is x
    assert others[0] is weight
    assert others[1] is bias
    assert others[2] is Activation.GELU_TANH
    assert torch.equal(got, down.apply(ops, 3 * in_two_parts(x, weight, bias, Activation.GELU_TANH)))
