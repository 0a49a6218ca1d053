"""Weights held as integers and products with them, in float64: written apart from `zif.reference`.

A weight is drawn as numbers first and packed afterwards, so the truth never comes out of a packing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from zif.contract import Activation, QuantizedExperts, QuantizedWeight, RouterOutput, WeightScheme
from zif_conformance.oracle.inputs import Inputs
from zif_conformance.oracle.operators import exact_run

CODES = {8: (-128, 127), 4: (0, 15)}
"""The lowest and the highest code, by bits."""
ZEROS = {8: (-128, 128), 4: (0, 16)}
"""The lowest and the highest zero in use: formats that store a zero less one know one more than there are codes."""
PLAIN_ZERO = {8: 0, 4: 8}
"""What zero is without zero points."""

Product = Callable[[torch.Tensor, "DrawnWeight", torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DrawnWeight:
    """A weight, or a stack of E. codes: [..., O, I]; zeros: [..., O, G], both int64. scales: [..., O, G], float32."""

    scheme: WeightScheme
    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale."""
        return self.scheme.group_size or self.codes.shape[-1]

    def held(self) -> QuantizedWeight:
        """Return the weight as the contract holds it."""
        codes = self.codes.to(torch.int8) if self.scheme.bits == 8 else _in_halves(self.codes, self.group_size)
        return QuantizedWeight(
            self.scheme, codes, self.scales.clone(), self.zeros.to(torch.int16) if self.scheme.zero_points else None
        )

    def elements(self) -> torch.Tensor:
        """Return what the codes stand for, [..., O, I], float64."""
        group = torch.arange(self.codes.shape[-1]) // self.group_size
        return (self.codes - self.zeros[..., group]).double() * self.scales[..., group].double()

    def entry(self, index: int) -> "DrawnWeight":
        """Return one weight of a stack."""
        return DrawnWeight(self.scheme, self.codes[index], self.zeros[index], self.scales[index])


@dataclass(frozen=True, slots=True)
class DrawnExperts:
    """The weights of all experts of a layer. The biases, where given: [E, 2I] and [E, C]."""

    gate_up: DrawnWeight
    down: DrawnWeight
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def held(self) -> QuantizedExperts:
        """Return the weights as the contract holds them."""
        return QuantizedExperts(self.gate_up.held(), self.down.held(), self.gate_up_bias, self.down_bias)


def draw_weight(draw: Inputs, scheme: WeightScheme, *shape: int) -> DrawnWeight:
    """Draw a weight, [..., O, I]: every code there is, scales a few times apart and of both signs, products near 1."""
    *outer, inner = shape
    groups = (*outer, inner // (scheme.group_size or inner))
    low, high = CODES[scheme.bits]
    lowest, highest = ZEROS[scheme.bits] if scheme.zero_points else (PLAIN_ZERO[scheme.bits],) * 2
    codes, zeros = draw.integers(low, high + 1, *shape), draw.integers(lowest, highest + 1, *groups)
    scales = (1 + draw.integers(0, 4096, *groups) / 2048) * draw.signs(*groups).float()
    return DrawnWeight(scheme, codes, zeros, scales / ((high - low) * inner**0.5))


def constant_weight(scheme: WeightScheme, codes: torch.Tensor, scale: float = 1.0) -> DrawnWeight:
    """Return a weight of these codes, one scale, and the scheme's plain zero, also where it is held."""
    groups = (*codes.shape[:-1], codes.shape[-1] // (scheme.group_size or codes.shape[-1]))
    return DrawnWeight(scheme, codes, torch.full(groups, PLAIN_ZERO[scheme.bits]), torch.full(groups, scale))


def rounded_weight(weight: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> DrawnWeight:
    """Round a weight, [..., O, I], to the nearest codes, by the largest of each group, with scales of that dtype.

    Without zero points codes of 8 bits go as far up as down, and of 4 bits the largest of a group becomes the lowest
    code, whose scale has the other sign. A zero point is at least 1, which every format can hold.
    """
    inner = weight.shape[-1]
    size = scheme.group_size or inner
    groups = weight.float().reshape(*weight.shape[:-1], inner // size, size)
    low, high = CODES[scheme.bits]
    if scheme.zero_points:
        bottom, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((top - bottom) / (high - low)).to(scale_dtype).float()
        zeros = (low - bottom / scales).round().clamp(low + 1, high)
    else:
        bottom, top = groups.amin(-1), groups.amax(-1)
        if scheme.bits == 8:
            low = -high
            scales = torch.maximum(top, -bottom) / high
        else:
            scales = torch.where(top > -bottom, top, bottom) / -8
        scales = scales.to(scale_dtype).float()
        zeros = torch.full_like(scales, PLAIN_ZERO[scheme.bits])
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(low, high)
    return DrawnWeight(scheme, codes.flatten(-2).long(), zeros.long(), scales)


def activations(x: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Return the numbers that a product of this scheme takes for x, [T, I], float64."""
    return numbers_of_rows(x) if scheme.dynamic_activations else x.double()


def numbers_of_rows(x: torch.Tensor, doubt: float = 0.0) -> torch.Tensor:
    """Return what codes of 8 bits stand for, each row with a scale of its own. x: [T, I]. Returns [T, I], float64.

    What lies within `doubt` of half way between two codes goes to the other one: what an error of x may make of it.
    """
    wide = x.to(torch.float32).numpy()
    peaks = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    scales = np.where(peaks == 0, np.float32(1), peaks / np.float32(127))
    with np.errstate(invalid="ignore"):
        ratios = (wide / scales).astype(np.float64)
        codes = np.rint(ratios)
        codes += np.where(np.abs(ratios - codes) > 0.5 - doubt, np.sign(ratios - codes), 0)
        numbers = codes * scales
    numbers[~np.isfinite(peaks[:, 0])] = np.nan
    return torch.from_numpy(numbers)


def exact_product(x: torch.Tensor, weight: DrawnWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `quantized_linear` in float64. x: [T, I]. Returns [T, O]."""
    product = activations(x, weight.scheme) @ weight.elements().T
    return product if bias is None else product + bias.double()


def declared_product(x: torch.Tensor, weight: DrawnWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `quantized_linear` with sums in float32, term by term, rounded to the dtype of x."""
    total = torch.zeros(len(x), weight.codes.shape[0])
    for column, others in zip(
        activations(x, weight.scheme).float().unbind(1), weight.elements().float().unbind(1), strict=True
    ):
        total += column[:, None] * others
    return (total if bias is None else total + bias.float()).to(x.dtype)


def exact_gated(
    x: torch.Tensor, weight: DrawnWeight, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """Return `gated_linear` in float64. x: [T, C]. weight: [2I, C]. Returns [T, I]."""
    (gated,) = exact_run("gated_activation", exact_product(x, weight, bias), activation)
    return gated


def exact_experts(x: torch.Tensor, weights: DrawnExperts, routed: RouterOutput, activation: Activation) -> torch.Tensor:
    """Return `quantized_experts` in float64, token by token. x: [T, C]. Returns [T, C]."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, (ids, shares) in enumerate(zip(routed.expert_ids.tolist(), routed.weights.double(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            biases = [None if b is None else b[expert] for b in (weights.gate_up_bias, weights.down_bias)]
            inner = exact_gated(x[token : token + 1], weights.gate_up.entry(expert), biases[0], activation)
            total[token] += share * exact_product(inner, weights.down.entry(expert), biases[1])[0]
    return total


def _in_halves(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Put two codes of 4 bits into a byte: those that are half a group apart, the first of them below."""
    half = group_size // 2
    held = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 2, dtype=torch.uint8)
    for place in range(codes.shape[-1]):
        group, within = divmod(place, group_size)
        held[..., group * half + within % half] += (codes[..., place] << 4 * (within // half)).to(torch.uint8)
    return held
