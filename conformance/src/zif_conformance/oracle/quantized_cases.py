"""The table of products with weights held as integers: schemes, shapes, and how their arguments are drawn. No test.

Read by the level of operators. Each feature has schemes with one scale per output and with groups, with zero points
and without, in even and in odd sizes: a device that claims the feature serves all of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from zif.contract import Activation, RouterOutput, WeightScheme
from zif_conformance.oracle.inputs import Inputs, strided
from zif_conformance.oracle.quantization import DrawnExperts, DrawnWeight, draw_weight

_W8A8, _W8A16, _W4A16 = (8, True), (8, False), (4, False)


def _scheme(kind: tuple[int, bool], group_size: int | None = None, zero_points: bool = False) -> WeightScheme:
    return WeightScheme(kind[0], group_size, zero_points, dynamic_activations=kind[1])


SCHEMES: Mapping[str, WeightScheme] = MappingProxyType(
    {
        "w8a8": _scheme(_W8A8),
        "w8a8-zeros": _scheme(_W8A8, None, True),
        "w8a8-groups-of-32": _scheme(_W8A8, 32),
        "w8a8-groups-of-6-zeros": _scheme(_W8A8, 6, True),
        "w8a16": _scheme(_W8A16),
        "w8a16-zeros": _scheme(_W8A16, None, True),
        "w8a16-groups-of-10": _scheme(_W8A16, 10),
        "w8a16-groups-of-64-zeros": _scheme(_W8A16, 64, True),
        "w4a16": _scheme(_W4A16),
        "w4a16-zeros": _scheme(_W4A16, None, True),
        "w4a16-groups-of-2-zeros": _scheme(_W4A16, 2, True),
        "w4a16-groups-of-6": _scheme(_W4A16, 6),
        "w4a16-groups-of-32": _scheme(_W4A16, 32),
        "w4a16-groups-of-128-zeros": _scheme(_W4A16, 128, True),
    }
)

_SHAPES = ((1, 1, 1), (1, 64, 64), (3, 65, 33), (17, 130, 70), (5, 4096, 16), (0, 16, 8))
"""Tokens, inputs, outputs, where all inputs share a scale."""
_GROUPED_SHAPES = ((1, 1, 1), (1, 4, 64), (3, 3, 33), (17, 5, 70), (64, 2, 7), (0, 2, 8))
"""Tokens, groups, outputs."""
_EXPERT_SHAPES = ((1, 4, 1, 2, 1), (7, 5, 2, 1, 3), (24, 8, 4, 3, 2), (0, 4, 2, 1, 1))
"""Tokens, experts, experts per token, groups of channels, groups of inner channels."""
_EXPERT_SCHEMES = (
    "w8a8",
    "w8a8-groups-of-6-zeros",
    "w8a16",
    "w8a16-groups-of-10",
    "w4a16-zeros",
    "w4a16-groups-of-32",
)
_CHANNELS_PER_UNIT = 16
"""What stands for a group where there are none."""


@dataclass(frozen=True, slots=True)
class ProductCall:
    """The arguments of one `quantized_linear`. x: [T, I]. bias: [O]."""

    x: torch.Tensor
    weight: DrawnWeight
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ProductCase:
    """A product of one scheme and shape."""

    scheme_name: str
    tokens: int
    inner: int
    outer: int
    has_bias: bool

    @property
    def scheme(self) -> WeightScheme:
        """Return how the weight is held."""
        return SCHEMES[self.scheme_name]

    @property
    def case_id(self) -> str:
        """Name the case in test ids."""
        shape = f"{self.tokens}x{self.inner}x{self.outer}"
        return f"{self.scheme_name}-{shape}" + ("-bias" if self.has_bias else "")

    def call(self, draw: Inputs) -> ProductCall:
        """Draw the arguments."""
        weight = draw_weight(draw, self.scheme, self.outer, self.inner)
        bias = draw.normal(self.outer) if self.has_bias else None
        return ProductCall(strided(draw.normal(self.tokens, self.inner)), weight, bias)


@dataclass(frozen=True, slots=True)
class GatedCase:
    """A product of gates and ups, of as many rows as `product` has twice, and what becomes of them."""

    product: ProductCase
    activation: Activation

    @property
    def scheme(self) -> WeightScheme:
        """Return how the weight is held."""
        return self.product.scheme

    @property
    def case_id(self) -> str:
        """Name the case in test ids."""
        return f"{self.product.case_id}-{self.activation.value}"

    def call(self, draw: Inputs) -> ProductCall:
        """Draw the arguments but the activation."""
        return replace(self.product, outer=2 * self.product.outer).call(draw)


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """The arguments of one `quantized_experts`. x: [T, C]."""

    x: torch.Tensor
    weights: DrawnExperts
    routed: RouterOutput
    activation: Activation


@dataclass(frozen=True, slots=True)
class ExpertsCase:
    """Experts of one scheme and shape; `activation` SWIGLU_CLAMPED comes with biases."""

    scheme_name: str
    shape: tuple[int, int, int, int, int]
    activation: Activation

    @property
    def scheme(self) -> WeightScheme:
        """Return how the weights are held."""
        return SCHEMES[self.scheme_name]

    @property
    def case_id(self) -> str:
        """Name the case in test ids."""
        return f"{self.scheme_name}-{self.activation.value}-{'x'.join(map(str, self.shape))}"

    def call(self, draw: Inputs) -> ExpertsCall:
        """Draw the arguments."""
        tokens, experts, chosen, *units = self.shape
        channels, inner = (count * (self.scheme.group_size or _CHANNELS_PER_UNIT) for count in units)
        gate_up = draw_weight(draw, self.scheme, experts, 2 * inner, channels)
        down = draw_weight(draw, self.scheme, experts, channels, inner)
        biases = (draw.normal(experts, 2 * inner), draw.normal(experts, channels))
        given = biases if self.activation is Activation.SWIGLU_CLAMPED else ()
        ids = (torch.arange(tokens)[:, None] + torch.arange(chosen)) % experts
        routed = RouterOutput(draw.normal(tokens, chosen).float().softmax(-1), ids)
        x = strided(draw.normal(tokens, channels))
        return ExpertsCall(x, DrawnExperts(gate_up, down, *given), routed, self.activation)


def product_cases() -> list[ProductCase]:
    """Return every product, the odd and empty shapes among them, with a bias and without in turn."""
    return [case for name in SCHEMES for case in _products(name)]


def gated_cases() -> list[GatedCase]:
    """Return a gated product for each product, the activations in turn."""
    kinds = list(Activation)
    return [GatedCase(case, kinds[index % len(kinds)]) for index, case in enumerate(product_cases())]


def experts_cases() -> list[ExpertsCase]:
    """Return every mixture of experts."""
    kinds = (Activation.SILU, Activation.SWIGLU_CLAMPED)
    return [
        ExpertsCase(name, shape, kinds[(at + index) % 2])
        for at, name in enumerate(_EXPERT_SCHEMES)
        for index, shape in enumerate(_EXPERT_SHAPES)
    ]


def _products(name: str) -> Iterator[ProductCase]:
    scheme = SCHEMES[name]
    for index, (tokens, inner, outer) in enumerate(_GROUPED_SHAPES if scheme.group_size else _SHAPES):
        size = inner * (scheme.group_size or 1)
        # Two codes of 4 bits share a byte, so there is an even number of them.
        size += size % 2 if scheme.bits == 4 else 0
        yield ProductCase(name, tokens, size, outer, has_bias=index % 2 == 0)
