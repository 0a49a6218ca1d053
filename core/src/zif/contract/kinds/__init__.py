"""The kinds of layer groups that core ships, one file each. A plugin or model adds a kind by subclassing `KVSpec`."""

from zif.contract.kinds.attention import AttentionSpec
from zif.contract.kinds.chunked_local import ChunkedLocalSpec
from zif.contract.kinds.cross import CrossAttentionSpec
from zif.contract.kinds.full import FullAttentionSpec
from zif.contract.kinds.latent import LatentAttentionSpec
from zif.contract.kinds.recurrent import RecurrentStateSpec, StateTensor
from zif.contract.kinds.sliding_window import SlidingWindowSpec
from zif.contract.kinds.whole_history import WholeHistorySpec

__all__ = [
    "AttentionSpec",
    "ChunkedLocalSpec",
    "CrossAttentionSpec",
    "FullAttentionSpec",
    "LatentAttentionSpec",
    "RecurrentStateSpec",
    "SlidingWindowSpec",
    "StateTensor",
    "WholeHistorySpec",
]
