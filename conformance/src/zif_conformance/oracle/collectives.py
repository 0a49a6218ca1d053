"""What collectives mean: expected results of a step by rank, and arguments whose sums are exact in every dtype."""

import random

import torch

from zif_conformance.oracle.inputs import Inputs, torch_dtype
from zif_conformance.ranks.work import Step

_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "shift", "barrier")
_LARGEST = 20


def integers(dtype: str, shape: tuple[int, ...], size: int) -> tuple[torch.Tensor, ...]:
    """Draw one array per rank, all different, of whole numbers so small that every dtype holds their sums."""
    drawn = (Inputs("float32", 100 * rank + len(shape)).integers(0, _LARGEST, *shape) for rank in range(size))
    return tuple(array.to(torch_dtype(dtype)) for array in drawn)


def normals(dtype: str, shape: tuple[int, ...], size: int) -> tuple[torch.Tensor, ...]:
    """Draw one array of normal values per rank."""
    return tuple(Inputs(dtype, rank).normal(*shape) for rank in range(size))


def expected(step: Step) -> list[torch.Tensor | None]:
    """Return what each rank gets; None where nothing comes back. Sums are added in rank order, in the arrays' dtype."""
    arrays, size = step.arrays, len(step.arrays)
    match step.operation:
        case "all_reduce":
            return [_sum(arrays)] * size
        case "all_gather":
            return [torch.cat(arrays)] * size
        case "reduce_scatter":
            return list(_parts(_sum(arrays), size))
        case "all_to_all":
            cut = [_parts(array, size) for array in arrays]
            return [torch.cat([parts[rank] for parts in cut]) for rank in range(size)]
        case "broadcast":
            return [arrays[step.peer]] * size
        case "shift":
            return [arrays[rank - 1] for rank in range(size)]
        case _:
            return [None] * size


def program(chance: random.Random, size: int, length: int) -> list[Step]:
    """Draw collectives of all kinds, dtypes and shapes, with ranks that are a little late."""
    steps = []
    for _ in range(length):
        shape = (size * chance.randrange(1, 4), *chance.choice(((), (3,), (2, 5))))
        arrays = integers(chance.choice(("float32", "int32")), shape, size)
        operation = chance.choice(_OPERATIONS)
        steps.append(Step(operation, arrays, chance.randrange(size), chance.choice((0.0, 0.0, 0.0, 0.01))))
    return steps


def _sum(arrays: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = arrays[0].clone()
    for array in arrays[1:]:
        total += array
    return total


def _parts(array: torch.Tensor, size: int) -> list[torch.Tensor]:
    rows = array.shape[0] // size
    return [array[rank * rows : (rank + 1) * rows] for rank in range(size)]
