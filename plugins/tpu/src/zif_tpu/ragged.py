"""Ragged paged attention: torch_xla's Pallas kernel, which a TPU runs on the pages where they lie.

The kernel wants the tokens of all requests one after the other, without padding between them, and page tables in pages
of its array. It masks relative to the end of each request's keys, so a table may begin behind a window's start.
Letters as in `zif_tpu.attention`. (torch_xla/experimental/custom_kernel.py)
"""

import torch
from torch_xla.experimental import custom_kernel

from zif.contract import AttentionParams
from zif_tpu.attention import LayerCache, PreparedStep

_LANES = 128
"""A TPU's vector registers are this wide: heads of other sizes would be padded in the cache, which they are not."""


def serves(cache: LayerCache, params: AttentionParams) -> bool:
    """Say whether the kernel knows the layer: no sinks, whole lanes, and keys as the kernel reads them."""
    return (
        params.sinks is None and cache.pages.rows.shape[2] % _LANES == 0 and cache.pages.rows.dtype == cache.pages.dtype
    )


def attend(
    query: torch.Tensor, cache: LayerCache, step: PreparedStep, params: AttentionParams, *, use_kernel: bool = True
) -> torch.Tensor:
    """Attend from padded queries, [B * W, H, D]. Returns the same shape; what padding gets is undefined.

    Without the kernel torch_xla's plain version runs, on any device, eagerly: that is how it is tested.
    """
    num_requests, width = step.positions.shape
    lengths = (step.last - step.positions[:, :1] + 1).flatten()
    ends = lengths.cumsum(0)
    starts = ends - lengths
    offsets = torch.arange(width, device=query.device)
    # Padding goes to the last place, which is free if there is any padding.
    target = (starts[:, None] + offsets).masked_fill(offsets >= lengths[:, None], query.shape[0] - 1).flatten()
    packed = torch.zeros_like(query).index_put((target,), query)
    rows = cache.pages.rows
    attended: torch.Tensor = custom_kernel.ragged_paged_attention(
        packed,
        rows.view(-1, step.block_size, *rows.shape[1:]),
        (step.last - step.first_block * step.block_size + 1).flatten().int(),
        (step.blocks * cache.num_layers + cache.layer).int(),
        torch.cat((starts[:1], ends)).int(),
        torch.full((1,), num_requests, dtype=torch.int32, device=query.device),
        sm_scale=params.scale,
        sliding_window=params.window,
        soft_cap=params.softcap,
        use_kernel=use_kernel,
    )
    # The plain version leaves padding out, the kernel does not.
    missing = query.shape[0] - attended.shape[0]
    return torch.nn.functional.pad(attended, (0, 0, 0, 0, 0, missing)).index_select(0, target)
