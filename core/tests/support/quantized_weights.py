"""Weights held as integers made by numpy, with the elements that they stand for: an oracle independent of torch's."""

import numpy as np
import torch

from zif.contract import QuantizedWeight, WeightScheme


def weight_of(
    scheme: WeightScheme, outputs: int, inputs: int, seed: int = 0, lead: tuple[int, ...] = ()
) -> tuple[QuantizedWeight, np.ndarray]:
    """Make a weight, [*lead, outputs, inputs], of random codes and zeros that reach the extremes.

    Zeros of 4 bits go to 16, which no code is. Returns it and its elements in float64.
    """
    draw = np.random.default_rng(seed)
    groups = inputs // (scheme.group_size or inputs)
    low, high = (-128, 128) if scheme.bits == 8 else (0, 16)
    codes = draw.integers(low, high, (*lead, outputs, inputs))
    codes.flat[0], codes.flat[-1] = low, high - 1
    scales = draw.uniform(0.001, 0.01, (*lead, outputs, groups)).astype(np.float32)
    zeros = draw.integers(*((-128, 128) if scheme.bits == 8 else (0, 17)), scales.shape) if scheme.zero_points else None
    if zeros is not None:
        zeros.flat[-1] = 127 if scheme.bits == 8 else 16
    shift = np.where(scheme.bits == 8, 0, 8) if zeros is None else zeros[..., None]
    grouped = codes.reshape(*scales.shape, -1)
    elements = ((grouped - shift) * scales.astype(np.float64)[..., None]).reshape(codes.shape)
    held = codes.astype(np.int8)
    if scheme.bits == 4:
        first, second = np.split(grouped, 2, axis=-1)
        held = (first + 16 * second).astype(np.uint8).reshape(*lead, outputs, inputs // 2)
    given = None if zeros is None else torch.from_numpy(zeros.astype(np.int16))
    return QuantizedWeight(scheme, torch.from_numpy(held), torch.from_numpy(scales), given), elements
