"""What the torch runner asks of a model, whichever way the model is built."""

from abc import ABC, abstractmethod
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


class Model(ABC):
    """A decoder whose weights are loaded. T tokens of the step, C hidden channels, V vocabulary."""

    @abstractmethod
    def forward(self, token_ids: "torch.Tensor", positions: "torch.Tensor", attend: LayerAttention) -> "torch.Tensor":
        """Run all layers. token_ids, positions: [T], int64. Returns the final normed hidden states [T, C]."""

    @abstractmethod
    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Return the logits of chosen rows. hidden: [S, C]. Returns [S, V], float32."""
