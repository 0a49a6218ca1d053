"""What the torch runner asks of a model, whichever way the model is built."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zif.contract import AttentionParams

if TYPE_CHECKING:
    import torch


class LayerAttention(Protocol):
    """Attention of one layer over paged KV, bound to the current step by the runner."""

    def __call__(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        params: AttentionParams,
    ) -> "torch.Tensor":
        """Store key and value, then attend. query: [T, H, D]; key, value: [T, K, D]. Returns [T, H, D]."""
        ...


@dataclass(frozen=True, slots=True)
class StateRows:
    """B requests of one step, of L tokens each, that a recurrent layer may run as one batch.

    tokens: [B, L], int64, rows of the step's tokens. `fresh`: the requests begin here and have no earlier state.
    """

    tokens: "torch.Tensor"
    fresh: bool


class LayerStates(Protocol):
    """The states of recurrent layers, bound to the current step by the runner."""

    @property
    def rows(self) -> Sequence[StateRows]:
        """Return the requests of the step, each once, in batches that may run together."""
        ...

    def read(self, layer: int, index: int) -> "dict[str, torch.Tensor]":
        """Return copies of the states that the requests of `rows[index]` begin with, by name, each [B, *shape]."""
        ...

    def write(self, layer: int, index: int, tensors: "Mapping[str, torch.Tensor]") -> None:
        """Store the states that the requests of `rows[index]` end with, by name, each [B, *shape]."""
        ...


class Model(ABC):
    """A decoder whose weights are loaded. T tokens of the step, C hidden channels, V vocabulary."""

    @abstractmethod
    def forward(self, token_ids: "torch.Tensor", positions: "torch.Tensor", attend: LayerAttention) -> "torch.Tensor":
        """Run all layers. token_ids, positions: [T], int64. Returns the final normed hidden states [T, C]."""

    @property
    def gives_logits(self) -> bool:
        """Say whether the checkpoint has an output matrix; without one `logits` is never called."""
        return True

    @abstractmethod
    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Return the logits of chosen rows. hidden: [S, C]. Returns [S, V], float32."""


class RecurrentModel(Model):
    """A decoder some of whose layers may carry a state from token to token, beside attention's keys and values."""

    @abstractmethod
    def forward(
        self,
        token_ids: "torch.Tensor",
        positions: "torch.Tensor",
        attend: LayerAttention,
        states: LayerStates | None = None,
    ) -> "torch.Tensor":
        """Run all layers as `Model.forward` does. Recurrent layers need `states`, which they bring up to date."""
