"""The rounding step of a dtype at a magnitude: the unit in which G2 and G3 allow errors."""

import torch


def rounding_step(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between neighbours of `dtype` at `magnitude`, float64.

    At least that of the smallest normal number; where subnormals may be flushed to zero (all but float16, whose range
    needs them), at least the smallest normal number itself.
    """
    limits = torch.finfo(dtype)
    smallest = limits.tiny * (limits.eps if dtype == torch.float16 else 1.0)
    _, exponent = torch.frexp(magnitude.double().abs().nan_to_num(0.0, 0.0, 0.0))
    step = torch.ldexp(torch.full_like(magnitude, limits.eps, dtype=torch.float64), exponent - 1)
    return step.clamp(min=smallest)


def worst(error: torch.Tensor, limit: torch.Tensor) -> int:
    """Return the flat index at which `error` is nearest to its limit, or furthest beyond it; NaN before all."""
    used = (error / limit).nan_to_num(nan=torch.inf, posinf=torch.inf).flatten()
    return int(used.argmax())
