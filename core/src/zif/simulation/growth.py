"""Does anything grow without bound? Ever-new requests through the real scheduler and block manager, containers counted.

Every request brings something that was never there before: tokens, salts, tenants, deadlines, wishes for retention.
Most end after a few steps, some are aborted or overdue, some go on where an earlier one ended. `benchmarks/growth.py`
drives a million of them, a test fewer.
"""

import random
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from zif.contract import (
    CacheKey,
    EngineConfig,
    FinishReason,
    FullAttentionSpec,
    KVSpec,
    RecurrentStateSpec,
    Request,
    RequestStatus,
    Retention,
    SamplingParams,
    SlidingWindowSpec,
    StateTensor,
    StepPlan,
    StepResult,
)
from zif.kv import PagedBlockManager, Retainer
from zif.kv.tiers import TierSetup
from zif.scheduling import TokenBudgetScheduler
from zif.simulation.clock import SimulatedClock
from zif.simulation.scenario import simulated_arena

_MAX_LEN = 48
_NUM_PLACES = 32
_NUM_WAITING = 4
_NUM_SLABS = 20
_NUM_REMEMBERED = 16
_VOCAB_SIZE = 50_000
_STEP_S = 0.01
_ATOMS = (int, float, str, bytes, range, type, type(None))
_CONTAINERS = (list, tuple, set, frozenset, deque, array, bytearray)


class Churn:
    """Let requests come and go. One step is planned and applied at a time."""

    def __init__(self, seed: int = 0) -> None:
        config = EngineConfig(
            _MAX_LEN,
            _NUM_PLACES,
            8 * _NUM_PLACES,
            scheduling_policy="fair",
            tenant_weights=(("steady", 3),),
            tenant_cache_percent=(("steady", 20),),
            expected_output_percent=0,
        )
        arena = simulated_arena(_specs(), _NUM_SLABS, 12)
        self._clock = SimulatedClock()
        self.blocks = PagedBlockManager(
            arena,
            enable_prefix_caching=True,
            max_step_tokens=config.max_num_batched_tokens,
            retainer=Retainer(self._clock.now, config.tenant_cache_percent),
            tiers=TierSetup(host_bytes=arena.num_bytes // 2, disk_bytes=arena.num_bytes),
        )
        self.scheduler = TokenBudgetScheduler(config, self.blocks, clock=self._clock.now)
        self.num_requests = 0
        self.ends: Counter[str] = Counter()
        self.num_preemptions = 0
        self._chance = random.Random(seed)
        self._live: dict[int, Request] = {}
        self._ended: deque[Request] = deque(maxlen=_NUM_REMEMBERED)

    def run(self, num_requests: int) -> None:
        """Let requests come until there have been `num_requests`; some of the last ones stay."""
        while self.num_requests < num_requests:
            while self.scheduler.num_waiting < _NUM_WAITING and self.num_requests < num_requests:
                self._add()
            self._step()

    def drain(self) -> None:
        """Let those that are left end."""
        while self.scheduler.has_requests():
            self._step()

    def _step(self) -> None:
        self._clock.advance(_STEP_S)
        if self._live and self._chance.random() < 0.5:
            self._abort(self._chance.choice(list(self._live.values())))
        plan = self.scheduler.schedule()
        if plan is None:
            return
        for update in self.scheduler.update(plan, StepResult(plan.step, self._sampled(plan))):
            if update.request.status is RequestStatus.FINISHED:
                self._end(update.request)

    def _sampled(self, plan: StepPlan) -> list[list[int]]:
        return [[self._chance.randrange(_VOCAB_SIZE)] if samples else [] for samples in plan.samples]

    def _add(self) -> None:
        chance, number = self._chance, self.num_requests
        self.num_requests += 1
        tokens = [chance.randrange(_VOCAB_SIZE) for _ in range(chance.randrange(1, 13))]
        key = CacheKey(salt=f"{number}")
        if self._ended and chance.random() < 0.5:
            earlier = chance.choice(self._ended)
            tokens, key = earlier.token_ids[: _MAX_LEN // 2] + tokens, earlier.cache_key
        duration_s = chance.choice((None, chance.random()))
        wish = Retention(chance.choice((0, 10, 60, 100)), 0, chance.choice((None, 4)), duration_s)
        request = Request(
            number,
            tokens,
            len(tokens),
            SamplingParams(),
            min(len(tokens) + chance.choice((1, 1, 1, 2, 2, 3, 4, 12)), _MAX_LEN),
            arrival=number,
            cache_key=key,
            tenant=chance.choice(("steady", f"{number}")),
            deadline_s=chance.choice((None, self._clock.now() + chance.choice((0.05, 1e6 + chance.random())))),
            retention=chance.choice(((), (), (wish,))),
        )
        self._live[number] = request
        self.scheduler.add(request)

    def _abort(self, request: Request) -> None:
        if self.scheduler.finish(request.request_id, FinishReason.ABORT) is not None:
            self._end(request)

    def _end(self, request: Request) -> None:
        if self._live.pop(request.request_id, None) is not None:
            assert request.finish_reason is not None, "an ended request has no reason"
            self.ends[request.finish_reason.value] += 1
            self.num_preemptions += request.num_preemptions
            self._ended.append(request)


def container_sizes(roots: Mapping[str, object]) -> dict[str, int]:
    """Count the entries of every container that can be reached from `roots`, by the way that leads there.

    A way is the names of attributes, with [] for an entry of a container; containers with the same way are added up.
    """
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    coming = deque(roots.items())
    while coming:
        way, value = coming.popleft()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            sizes[way] += len(value)
            coming.extend((f"{way}[]", each) for pair in value.items() for each in pair)
        elif isinstance(value, _CONTAINERS):
            sizes[way] += len(value)
            if not isinstance(value, (array, bytearray)):
                coming.extend((f"{way}[]", each) for each in value)
        coming.extend((f"{way}.{name}", each) for name, each in _attributes(value))
    return dict(sizes)


def grown(first: Mapping[str, int], second: Mapping[str, int], slack: float = 0.25, allowance: int = 64) -> list[str]:
    """Name the ways whose largest size in the second half of a run is above that in the first by more than allowed."""
    return [
        f"{way}: {first.get(way, 0)}, then {size}"
        for way, size in sorted(second.items())
        if size > first.get(way, 0) * (1 + slack) + allowance
    ]


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


def _specs() -> tuple[KVSpec, ...]:
    return (
        FullAttentionSpec((0,), 1, 8, 4, "float32"),
        SlidingWindowSpec((1,), 1, 8, 4, "float32", window=6),
        RecurrentStateSpec((2,), (StateTensor("state", (8,), "float32"),), 4, "float32"),
    )
