"""Recurrent states of requests in plain dictionaries: what the runner's state memory does, without blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from zif.models.model import StateRows


@dataclass
class RequestStates:
    """Implements `LayerStates`. `chunks` are the tokens that each request adds in the step; each runs by itself."""

    chunks: list[int] = field(default_factory=list)
    tensors: dict[tuple[int, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    num_computed: list[int] = field(default_factory=list)

    def begin_step(self, chunks: list[int]) -> None:
        """Go on to a step in which request r adds `chunks[r]` tokens."""
        before = self.num_computed or [0] * len(chunks)
        self.num_computed = [done + last for done, last in zip(before, self.chunks or [0] * len(chunks), strict=True)]
        self.chunks = chunks

    @property
    def rows(self) -> list[StateRows]:
        ends = torch.tensor([0, *self.chunks]).cumsum(0).tolist()
        return [
            StateRows(torch.arange(first, last)[None], fresh=not done)
            for first, last, done in zip(ends, ends[1:], self.num_computed, strict=False)
        ]

    def read(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors[layer, index].items()}

    def write(self, layer: int, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors[layer, index] = {name: tensor.clone() for name, tensor in tensors.items()}
