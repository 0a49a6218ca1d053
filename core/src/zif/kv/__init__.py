"""KV memory of the control plane: block pools, prefix index, layer groups. Integers only, no array library."""

from zif.kv.manager import PagedBlockManager

__all__ = ["PagedBlockManager"]
