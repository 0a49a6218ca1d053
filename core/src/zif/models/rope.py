"""Rotary frequencies and angles as tensors.

Follows the order of float32 operations in transformers' `modeling_rope_utils`, because positions multiply rounding
differences by their own size. Used by the decoder, once per distinct `RopeSpec` when loading and once per step.
"""

import math
from dataclasses import dataclass

import torch

from zif.models.spec import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of each token's angles, times the attention factor. cos, sin: [T, R], float32."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rotary:
    """The angles of one `RopeSpec` on one device, for a model that serves up to `max_model_len` tokens."""

    def __init__(self, spec: RopeSpec, max_model_len: int, device: str) -> None:
        self._frequencies = inverse_frequencies(spec, max_model_len).to(device)
        scaling = spec.scaling
        self._factor = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0

    def angles(self, positions: torch.Tensor) -> Angles:
        """Compute the angles of a step. positions: [T], int64."""
        radians = positions[:, None].float() * self._frequencies
        return Angles(radians.cos() * self._factor, radians.sin() * self._factor)


def inverse_frequencies(spec: RopeSpec, max_model_len: int) -> torch.Tensor:
    """Return the angle per position of each pair of elements, [rotary_dim / 2], float32."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    wavelengths = spec.base**exponents
    match spec.scaling:
        case LinearScaling(factor):
            return 1.0 / wavelengths / factor
        case Llama3Scaling():
            return _llama3(1.0 / wavelengths, spec.scaling)
        case YarnScaling():
            return _yarn(wavelengths, spec, spec.scaling)
        case LongRopeScaling(short_factors, long_factors, original_max_position):
            factors = long_factors if max_model_len > original_max_position else short_factors
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)
        case None:
            return 1.0 / wavelengths


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    original, low, high = scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > original / low
    is_medium = ~is_long & ~(wavelengths < original / high)
    smooth = (original / wavelengths - low) / (high - low)
    scaled = torch.where(is_long, frequencies / scaling.factor, frequencies)
    ramp = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    return torch.where(is_medium, ramp, scaled)


def _yarn(wavelengths: torch.Tensor, spec: RopeSpec, scaling: YarnScaling) -> torch.Tensor:
    low, high = _dimension(spec, scaling, scaling.beta_fast), _dimension(spec, scaling, scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _dimension(spec: RopeSpec, scaling: YarnScaling, num_turns: float) -> float:
    """Return the (fractional) dimension that turns `num_turns` times within the original length."""
    turns = math.log(scaling.original_max_position / (num_turns * 2 * math.pi))
    return spec.rotary_dim * turns / (2 * math.log(spec.base))
