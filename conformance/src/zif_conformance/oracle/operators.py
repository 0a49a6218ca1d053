"""Runs of `zif.reference` for each operator: in float64 for the truth, in the declared dtype for its error."""

from collections.abc import Callable

import torch

from zif.reference.ops import ReferenceOps
from zif_conformance.oracle.inputs import moved


def exact_run(operator: str, *arguments: object) -> list[torch.Tensor]:
    """Return the operator's results with all floats in float64."""
    return _run(operator, moved(arguments, _wide))


def declared_run(operator: str, *arguments: object) -> list[torch.Tensor]:
    """Return the reference's results in the arguments' own dtypes."""
    return _run(operator, moved(arguments, torch.Tensor.clone))


def sequential_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `linear` with each sum taken term by term in float32: the least exact order that is in use."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for column, others in zip(x.float().unbind(1), weight.float().unbind(1), strict=True):
        total += column[:, None] * others
    return (total if bias is None else total + bias.float()).to(x.dtype)


def device_run(table: object, device: str, operator: str, *arguments: object) -> list[torch.Tensor]:
    """Return a platform's results for the same arguments, copied to its device."""
    return results_of(getattr(table, operator)(*moved(arguments, lambda tensor: tensor.to(device, copy=True))))


def results_of(answer: object) -> list[torch.Tensor]:
    """Return the tensors of an operator's answer, in the order of its fields."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [getattr(answer, name) for name in answer.__slots__]  # type: ignore[attr-defined]


def _run(operator: str, arguments: tuple[object, ...]) -> list[torch.Tensor]:
    method: Callable[..., object] = getattr(ReferenceOps(), operator)
    return results_of(method(*arguments))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()
