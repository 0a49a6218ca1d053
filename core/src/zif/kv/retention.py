"""How long a cached block is kept: its priority, until when that holds, and whose quota it counts against.

Requests say what they wish (`zif.contract.Retention`, by token range); this module turns wishes into one `Keep` per
block, which `eviction.py` obeys. `manager.py` is the only caller.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from zif.contract import Request
from zif.contract.request import DEFAULT_RETENTION_PRIORITY

NEVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Keep:
    """What decides when an unowned block goes. After `expires_s`, on the block manager's clock, the default counts."""

    priority: int = DEFAULT_RETENTION_PRIORITY
    expires_s: float | None = None
    tenant: str = ""

    def outlasts(self, other: "Keep") -> bool:
        """Say whether this one is the longer wish: the higher priority, among equals the later end."""
        mine, others = (NEVER_S if keep.expires_s is None else keep.expires_s for keep in (self, other))
        return (self.priority, mine) > (other.priority, others)


DEFAULT_KEEP: Final = Keep()


def keep_of(request: Request, start_token: int, end_token: int, arrival_s: float) -> Keep:
    """Return how to keep the block that holds the tokens from `start_token` to `end_token`.

    A range that touches one of them counts; of several, the one with the highest priority, then the longest duration.
    """
    keeps = [
        Keep(wish.priority, None if wish.duration_s is None else arrival_s + wish.duration_s, request.tenant)
        for wish in request.retention
        if wish.start < end_token and (wish.end is None or wish.end > start_token)
    ]
    best = keeps[0] if keeps else Keep(tenant=request.tenant)
    for keep in keeps[1:]:
        if keep.outlasts(best):
            best = keep
    return best


class Retainer:
    """Answer how the blocks of live requests are to be kept, on one clock and under one set of quotas.

    `tenant_cache_percent` are (tenant, percent) pairs: the share of each layer group's cells that the tenant's unowned
    cached blocks may take. Tenants that are not named have no limit.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, tenant_cache_percent: tuple[tuple[str, int], ...] = ()
    ) -> None:
        self.clock = clock
        self.quotas = dict(tenant_cache_percent)
        self._of_tenant = {tenant: Keep(tenant=tenant) for tenant in self.quotas}
        self._arrivals_s: dict[int, float] = {}

    def begin(self, request: Request) -> None:
        """Note when a request was admitted: from then on the durations of its wishes count."""
        if request.retention:
            self._arrivals_s[request.request_id] = self.clock()

    def keep(self, request: Request, start_token: int, end_token: int) -> Keep:
        """Return how to keep a block of a request that has begun."""
        if not request.retention:
            return self._of_tenant.get(request.tenant, DEFAULT_KEEP)
        return keep_of(request, start_token, end_token, self._arrivals_s[request.request_id])

    def drop(self, request: Request) -> None:
        """Forget a request; its blocks are kept as it wished."""
        self._arrivals_s.pop(request.request_id, None)
