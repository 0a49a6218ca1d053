"""G1, exact: moves, slot writes, copies, masks and choices of an index give equal bytes and touch nothing else."""

from dataclasses import dataclass

import torch

from zif_conformance.gates.result import GateResult

_SENTINEL = 0xA5
_MARGIN_BYTES = 256


def exact(got: torch.Tensor, expected: torch.Tensor, what: str = "bytes") -> GateResult:
    """Count the elements whose bytes differ; all of them when shape or dtype differ."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        where = f"{what}: {tuple(got.shape)} {got.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        return GateResult("G1", float(max(1, expected.numel())), 0.0, where)
    differs = _element_bytes(got) != _element_bytes(expected)
    places = differs.any(-1).nonzero().flatten().tolist()
    where = f"{what}: first difference at element {places[0]} of {got.numel()}" if places else what
    return GateResult("G1", float(len(places)), 0.0, where)


@dataclass(frozen=True, slots=True)
class GuardedTensor:
    """A tensor between sentinels. `memory` is everything, uint8; `tensor` the part that may be used."""

    memory: torch.Tensor
    tensor: torch.Tensor

    def untouched(self, what: str = "sentinels") -> GateResult:
        """Count the sentinel bytes that changed."""
        outside = torch.cat((self.memory[:_MARGIN_BYTES], self.memory[-_MARGIN_BYTES:]))
        return GateResult("G1", float((outside != _SENTINEL).sum()), 0.0, f"{what}: bytes outside the tensor changed")


def guarded(content: torch.Tensor, device: str) -> GuardedTensor:
    """Copy `content` to `device`, between sentinels."""
    data = content.contiguous().reshape(-1).view(torch.uint8)
    margin = torch.full((_MARGIN_BYTES,), _SENTINEL, dtype=torch.uint8)
    # The end is padded to the dtype's alignment by the margin's own size.
    memory = torch.cat((margin, data, margin)).to(device)
    tensor = memory[_MARGIN_BYTES : _MARGIN_BYTES + data.numel()].view(content.dtype).view(content.shape)
    return GuardedTensor(memory, tensor)


def _element_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as bytes, [elements, bytes of one], on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).view(flat.numel(), -1) if flat.numel() else torch.empty((0, 1), dtype=torch.uint8)
