"""Recurrent states of a step: which requests run together, and their states in and out of the arena.

A layer gets copies of the states that its requests begin with and hands back those they end with, which go to other
blocks where a step crosses a block's end. The torch runner is the only caller.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zif.contract import KVArena
from zif.models.model import StateRows
from zif.reference.state import state_views
from zif.runtime.batch import StateBatch
from zif.runtime.tokens import Int64


@dataclass(frozen=True, slots=True)
class _LayerHome:
    """Where a layer's states live: its group's index, and views [num_cells, *shape] by name."""

    group: int
    tensors: dict[str, torch.Tensor]


class StateMemory:
    """The states of all recurrent layers, over the arena's memory."""

    def __init__(self) -> None:
        self._layers: dict[int, _LayerHome] = {}

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> None:
        """Add the layers of one group. memory: [arena.num_bytes], uint8."""
        views = state_views(arena, group, memory)
        for layer, tensors in zip(arena.groups[group].spec.layers, views, strict=True):
            self._layers[layer] = _LayerHome(group, tensors)

    def step(self, batches: Mapping[int, StateBatch], device: str) -> "StepStates":
        """Bind the states to one step. `batches` are those of the state groups, by index."""
        return StepStates(self._layers, batches, device)


class StepStates:
    """Implements `LayerStates`. Requests with equally many tokens run together if all have an earlier state or none."""

    def __init__(self, layers: dict[int, _LayerHome], batches: Mapping[int, StateBatch], device: str) -> None:
        self._layers = layers
        together = list(_requests_together(next(iter(batches.values()))))
        any_batch = next(iter(batches.values()))
        self._rows = [_state_rows(any_batch, requests, device) for requests in together]
        self._reads = {g: [_on_device(b.read_blocks[r], device) for r in together] for g, b in batches.items()}
        self._writes = {g: [_on_device(b.write_blocks[r], device) for r in together] for g, b in batches.items()}

    @property
    def rows(self) -> Sequence[StateRows]:
        return self._rows

    def read(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        home = self._layers[layer]
        blocks = self._reads[home.group][index]
        return {name: view.index_select(0, blocks) for name, view in home.tensors.items()}

    def write(self, layer: int, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        home = self._layers[layer]
        blocks = self._writes[home.group][index]
        for name, view in home.tensors.items():
            view.index_copy_(0, blocks, tensors[name].to(view.dtype))


def _requests_together(batch: StateBatch) -> Iterator[Int64]:
    """Yield the requests of one kind after the other."""
    kinds: dict[tuple[int, bool], list[int]] = defaultdict(list)
    lengths = np.diff(batch.query_start).tolist()
    for request, kind in enumerate(zip(lengths, batch.starts_fresh.tolist(), strict=True)):
        kinds[kind].append(request)
    yield from (np.asarray(requests, dtype=np.int64) for requests in kinds.values())


def _state_rows(batch: StateBatch, requests: Int64, device: str) -> StateRows:
    first = batch.query_start[requests].astype(np.int64)
    length = int(batch.query_start[requests[0] + 1] - batch.query_start[requests[0]])
    tokens = first[:, None] + np.arange(length)
    return StateRows(_on_device(tokens, device), fresh=bool(batch.starts_fresh[requests[0]]))


def _on_device(array: Int64, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
