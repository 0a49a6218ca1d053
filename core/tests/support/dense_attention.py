"""Attention over whole sequences in the plainest form: the yardstick for models, independent of `zif.reference`."""

import torch

from zif.contract import AttentionParams


class DenseAttention:
    """A `LayerAttention` of one sequence that starts at position 0, computed at once and in the inputs' dtype."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        num_tokens, num_heads, _ = query.shape
        repeats = num_heads // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
        hidden = (distance < 0) | (distance >= (params.window or num_tokens))
        scores = scores.masked_fill(hidden, -torch.inf)
        if params.sinks is not None:
            sink = params.sinks[:, None, None].expand(-1, num_tokens, 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., :num_tokens]
        return torch.einsum("hqk,khd->qhd", weights, value)
