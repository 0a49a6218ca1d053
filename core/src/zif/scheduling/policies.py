"""Policies: in which order requests get places, tokens and blocks. One small object per policy, behind one interface.

A policy only orders. What fits is decided by `admission.py`, what a step holds by `scheduler.py`. Requests stand in
*lines*, one for all or one per tenant. Inside a line the urgency decides; among lines their *tags* do:

    order of a request = (tag of its line when it was admitted, *urgency)         smaller goes first

A request keeps its order from its first admission to its end, so one that was preempted returns to its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final

from zif.contract import EngineConfig, Request
from zif.errors import ConfigError

Order = tuple[float, ...]

PATIENCE_S: Final = 30.0
"""A request without a deadline counts as due so many seconds after it came: urgent ones go first, but not for ever."""
MAX_TENANTS_KEPT: Final = 4096
"""Tenants whose account is kept; past twice as many, those that are owed least are forgotten."""


class Policy(ABC):
    """Order requests."""

    @abstractmethod
    def urgency(self, request: Request) -> Order:
        """Return the place inside the line. Must not change while the request lives."""

    def line(self, request: Request) -> str:
        """Name the line in which the request waits."""
        return ""

    def tag(self, line: str) -> float:
        """Return where the next request of a line stands among the lines."""
        return 0.0

    def wake(self, line: str) -> None:  # noqa: B027 - nothing to note without accounts
        """Hear that a line has a request again after it had none."""

    def admit(self, request: Request, num_tokens: float) -> None:  # noqa: B027 - nothing to note without accounts
        """Hear that a request was admitted for the first time and is expected to cost `num_tokens`."""

    def end(self, request: Request) -> None:  # noqa: B027 - nothing to note without accounts
        """Hear that a request ended, so that what it cost is known."""


class FirstComeFirstServed(Policy):
    """By due time: of requests without a deadline the one that came first."""

    def urgency(self, request: Request) -> Order:
        return (request.due_s, request.arrival)


class ByPriority(Policy):
    """The smaller priority number first; equals by due time (earliest deadline first; Liu and Layland, 1973)."""

    def urgency(self, request: Request) -> Order:
        return (request.priority, request.due_s, request.arrival)


class FairShares(ByPriority):
    """Tokens are shared among tenants by weight; inside a tenant, by priority.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with a request as packet and its tokens as length: a
    line's tag advances by tokens / weight, and a tenant that was idle starts at the tag admitted last, so idle time is
    neither saved up nor punished. As the output's length is not known beforehand, its estimate is charged at
    admission and corrected at the end, after the token counters of Sheng et al. (OSDI 2024).
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._now = 0.0
        self._tags: dict[str, float] = {}
        self._charged: dict[int, float] = {}

    def line(self, request: Request) -> str:
        return request.tenant

    def tag(self, line: str) -> float:
        return self._tags.get(line, self._now)

    def wake(self, line: str) -> None:
        self._tags[line] = max(self.tag(line), self._now)
        if len(self._tags) > 2 * MAX_TENANTS_KEPT:
            kept = sorted(self._tags.items(), key=lambda entry: -entry[1])
            self._tags = dict(kept[:MAX_TENANTS_KEPT])

    def admit(self, request: Request, num_tokens: float) -> None:
        self._now = max(self._now, self.tag(request.tenant))
        self._charged[request.request_id] = num_tokens
        self._charge(request.tenant, num_tokens)

    def end(self, request: Request) -> None:
        charged = self._charged.pop(request.request_id, None)
        if charged is not None:
            self._charge(request.tenant, request.num_tokens - request.num_cached_tokens - charged)

    def _charge(self, tenant: str, num_tokens: float) -> None:
        self._tags[tenant] = self.tag(tenant) + num_tokens / self._weights.get(tenant, 1)


def policy_of(config: EngineConfig) -> Policy:
    """Return the policy that is asked for; raise `ConfigError` when there is none of this name."""
    name = config.scheduling_policy
    if config.tenant_weights and name != "fair":
        raise ConfigError(
            f"tenant_weights={config.tenant_weights!r} have no meaning under scheduling_policy={name!r}; "
            "choose scheduling_policy='fair' or leave them out"
        )
    known: dict[str, Callable[[], Policy]] = {
        "fcfs": FirstComeFirstServed,
        "priority": ByPriority,
        "fair": lambda: FairShares(dict(config.tenant_weights)),
    }
    if name not in known:
        raise ConfigError(f"scheduling_policy={name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]()
