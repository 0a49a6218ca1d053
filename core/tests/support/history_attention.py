"""Dense attention that remembers the keys and values of requests across steps."""

from dataclasses import dataclass, field

import torch

from support.dense_attention import DenseAttention
from zif.contract import AttentionParams


@dataclass
class HistoryAttention:
    """Attention of requests that share steps: each sees its own earlier keys and values only."""

    chunks: list[int] = field(default_factory=list)
    keys: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    calls: list[tuple[int, AttentionParams]] = field(default_factory=list)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.calls.append((layer, params))
        assert query.shape[2] == key.shape[2] == value.shape[2]
        rows = zip(query.split(self.chunks), key.split(self.chunks), value.split(self.chunks), strict=True)
        return torch.cat([self._attend(layer, request, *qkv, params) for request, qkv in enumerate(rows)])

    def _attend(self, layer, request, query, key, value, params):
        place = (request, layer)
        self.keys[place] = torch.cat((self.keys.get(place, key[:0]), key))
        self.values[place] = torch.cat((self.values.get(place, value[:0]), value))
        earlier = query.new_zeros((self.keys[place].shape[0] - query.shape[0], *query.shape[1:]))
        everything = torch.cat((earlier, query))
        return DenseAttention()(layer, everything, self.keys[place], self.values[place], params)[-query.shape[0] :]
