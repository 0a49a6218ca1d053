"""Inputs of tests: random and special tensors by dtype, the same ones in every run."""

import math
from collections.abc import Callable

import torch

SPECIAL_VALUES = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a contract name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Inputs:
    """Draws tensors on the host from one seed. Integers where said, else values of the standard normal distribution."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.dtype = torch_dtype(dtype)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Draw normal values, rounded to the dtype."""
        return (torch.randn(shape, generator=self._generator) * scale).to(self.dtype)

    def signs(self, *shape: int) -> torch.Tensor:
        """Draw +1 and -1."""
        return (torch.randint(0, 2, shape, generator=self._generator) * 2 - 1).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Draw integers from `low` to `high` - 1, int64."""
        return torch.randint(low, high, shape, generator=self._generator)

    def special(self, *shape: int) -> torch.Tensor:
        """Draw normal values, one in four of them special: zeros of both signs, infinities, NaN, subnormal, largest."""
        limits = torch.finfo(self.dtype)
        values = torch.tensor(
            [*SPECIAL_VALUES, limits.tiny * limits.eps * 4, limits.tiny, limits.max], dtype=torch.float64
        )
        chosen = values[self.integers(0, len(values), *shape)].to(self.dtype)
        return torch.where(self.integers(0, 4, *shape) == 0, chosen, self.normal(*shape))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values with a strided first axis: a part of a wider tensor, whose other part is NaN."""
    flat = tensor.reshape(tensor.shape[0], tensor[:1].numel() if len(tensor) else 0)
    if not flat.numel():
        return tensor
    wide = torch.full((flat.shape[0], 2 * flat.shape[1] + 3), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, 3 : 3 + flat.shape[1]] = flat
    return wide[:, 3 : 3 + flat.shape[1]].view(tensor.shape)


def moved(arguments: tuple[object, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[object, ...]:
    """Return arguments of an operator with `change` made to every tensor, also to those inside other values."""
    return tuple(_moved(argument, change) for argument in arguments)


def _moved(argument: object, change: Callable[[torch.Tensor], torch.Tensor]) -> object:
    if isinstance(argument, torch.Tensor):
        return change(argument)
    fields = [getattr(argument, name) for name in getattr(argument, "__slots__", ())]
    changed = [_moved(field, change) for field in fields]
    kept = all(new is old for new, old in zip(changed, fields, strict=True))
    return argument if kept else type(argument)(*changed)
