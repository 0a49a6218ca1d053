"""KV memory of the control plane: block pools, prefix index, layer groups. Integers only, no array library."""

from zif.kv.manager import PagedBlockManager
from zif.kv.retention import Retainer
from zif.kv.tiers import TierSetup

__all__ = ["PagedBlockManager", "Retainer", "TierSetup"]
