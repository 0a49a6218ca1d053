"""Output matrices of the decoder: logits as a platform gives them, or those of its products, widened."""

import pytest
import torch

from support.quantized_weights import weight_of
from zif.contract import QuantizedWeight, WeightScheme
from zif.models.decoder import Projection, Weight
from zif.reference.ops import ReferenceOps

SCHEMES = {"w8a8": WeightScheme(8, dynamic_activations=True), "w4a16-groups-of-16": WeightScheme(4, 16)}
KINDS = ["plain", *SCHEMES]
ROWS, CHANNELS, VOCABULARY = 5, 32, 9


def projection(kind: str, has_bias: bool) -> Projection:
    bias = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).bfloat16() if has_bias else None
    if kind == "plain":
        weight = torch.randn(VOCABULARY, CHANNELS, generator=torch.Generator().manual_seed(1)).bfloat16()
        return Projection(weight, bias)
    return Projection(weight_of(SCHEMES[kind], VOCABULARY, CHANNELS)[0], bias)


def hidden() -> torch.Tensor:
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3)).bfloat16()


class Unrounded(ReferenceOps):
    """Give logits of one third, which no dtype of fewer bits holds, and remember with what each was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls.append(("plain", hidden, weight, bias))
        return torch.full((len(hidden), len(weight)), 1 / 3)

    def quantized_logits(
        self, hidden: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls.append(("codes", hidden, weight, bias))
        return torch.full((len(hidden), len(weight.codes)), 1 / 3)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise AssertionError("a product was asked for, too")

    def quantized_linear(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        raise AssertionError("a quantized product was asked for, too")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_logits_that_a_platform_gives_are_taken_as_they_are(kind: str, has_bias: bool) -> None:
    ops, x, matrix = Unrounded(), hidden(), projection(kind, has_bias)
    got = matrix.logits(ops, x)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.full((ROWS, VOCABULARY), 1 / 3))
    ((operator, *given),) = ops.calls
    assert operator == ("plain" if kind == "plain" else "codes")
    assert all(got is wanted for got, wanted in zip(given, (x, matrix.weight, matrix.bias), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_products_are_widened_where_a_platform_leaves_logits(kind: str, has_bias: bool) -> None:
    ops, x, matrix = ReferenceOps(), hidden(), projection(kind, has_bias)
    got = matrix.logits(ops, x)
    weight: Weight = matrix.weight
    product = ops.quantized_linear if isinstance(weight, QuantizedWeight) else ops.linear
    rounded = product(x, weight, matrix.bias)
    assert rounded.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert torch.equal(got, rounded.float())
