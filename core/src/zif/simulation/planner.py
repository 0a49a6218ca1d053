"""What if this traffic met that engine? A trace through the real scheduler and block manager, in modelled time.

What it is: hit rate, queueing, preemption and KV use as the control plane decides them. What it is not: a measure of
any device. The time of a step is a stated linear model, to be fitted to the device in question.
"""

import random
from collections import deque
from dataclasses import dataclass

from zif.contract import CacheKey, EngineConfig, FinishReason, KVArena, Request, SamplingParams, StepPlan, StepResult
from zif.kv import PagedBlockManager, Retainer
from zif.scheduling import TokenBudgetScheduler
from zif.simulation.clock import SimulatedClock
from zif.simulation.trace import TraceRequest

_MAX_SAMPLES = 512
_TOKEN_BITS = 31
_SPREAD = 0x9E3779B1


@dataclass(frozen=True, slots=True)
class CostModel:
    """The time of a step: `step_s` + `token_s` per computed token + `context_token_s` per token that attention reads.

    The first stands for launching and reading the weights, the second for arithmetic, the third for reading KV.
    """

    step_s: float = 8e-3
    token_s: float = 40e-6
    context_token_s: float = 20e-9

    def step_time_s(self, plan: StepPlan) -> float:
        """Return the modelled seconds of one step."""
        context = sum(plan.num_computed) + plan.total_tokens
        return self.step_s + self.token_s * plan.total_tokens + self.context_token_s * context


@dataclass(frozen=True, slots=True)
class UsageSample:
    """The KV memory at one time, as shares of the arena, and the requests then running and waiting."""

    time_s: float
    owned_share: float
    cached_share: float
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What the traffic met. Times are modelled seconds; queue time ends when a request is first scheduled.

    `num_refused` requests could not fit the engine at all; `num_unfinished` were not over when the step limit came.
    """

    num_requests: int
    num_refused: int
    num_failed: int
    num_unfinished: int
    num_steps: int
    num_preemptions: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    hit_rate: float
    queue_p50_s: float
    queue_p99_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    output_tokens_per_s: float
    peak_owned_share: float
    usage: tuple[UsageSample, ...]


@dataclass(slots=True)
class _Entry:
    """One request under way, and when things happened to it."""

    request: Request
    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None


class TraceReplay:
    """Replay one trace through one engine."""

    def __init__(self, config: EngineConfig, arena: KVArena, cost: CostModel) -> None:
        self._config = config
        self._arena = arena
        self._cost = cost
        self._clock = SimulatedClock()
        self._blocks = PagedBlockManager(
            arena,
            enable_prefix_caching=config.enable_prefix_caching,
            max_step_tokens=config.max_num_batched_tokens,
            retainer=Retainer(self._clock.now, config.tenant_cache_percent),
        )
        self._scheduler = TokenBudgetScheduler(config, self._blocks, clock=self._clock.now)
        self._prefixes: dict[str, tuple[random.Random, list[int]]] = {}
        self._entries: list[_Entry] = []
        self._live: dict[int, _Entry] = {}
        self._num_refused = 0
        self._num_steps = 0
        self._usage = _Samples()

    def run(self, trace: list[TraceRequest], max_steps: int | None = None) -> TraceReport:
        """Replay `trace`, which is in order of arrival, to its end or for `max_steps` steps."""
        coming = deque(trace)
        while (coming or self._live) and (max_steps is None or self._num_steps < max_steps):
            if not self._live:
                self._clock.advance(max(0.0, coming[0].arrival_s - self._clock.now()))
            while coming and coming[0].arrival_s <= self._clock.now():
                self._arrive(coming.popleft())
            if self._live:
                self._step()
        return self._report(len(trace))

    def _arrive(self, given: TraceRequest) -> None:
        number = len(self._entries) + self._num_refused
        total = given.prompt_tokens + given.output_tokens
        if total > self._config.max_model_len or not self._blocks.fits(total):
            self._num_refused += 1
            return
        request = Request(
            number,
            self._prompt(given, number),
            given.prompt_tokens,
            SamplingParams(max_tokens=given.output_tokens),
            total,
            priority=given.priority,
            arrival=number,
            cache_key=CacheKey(salt=given.tenant),
        )
        entry = _Entry(request, given.arrival_s)
        self._entries.append(entry)
        self._live[number] = entry
        self._scheduler.add(request)

    def _prompt(self, given: TraceRequest, number: int) -> list[int]:
        """Return the shared prefix and tokens of the request's own."""
        generator, prefix = self._prefixes.setdefault(
            given.prefix_id, (random.Random(f"{self._config.seed}:prefix:{given.prefix_id}"), [])
        )
        while len(prefix) < given.prefix_tokens:
            prefix.append(generator.getrandbits(_TOKEN_BITS))
        own = random.Random(f"{self._config.seed}:request:{number}")
        rest = given.prompt_tokens - given.prefix_tokens
        return prefix[: given.prefix_tokens] + [own.getrandbits(_TOKEN_BITS) for _ in range(rest)]

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        assert plan is not None, "requests wait, and nothing is scheduled"
        self._num_steps += 1
        now = self._clock.now()
        for start in plan.started:
            entry = self._live[start.request_id]
            entry.scheduled_s = now if entry.scheduled_s is None else entry.scheduled_s
        self._clock.advance(self._cost.step_time_s(plan))
        now = self._clock.now()
        self._sample_usage(now)
        for update in self._scheduler.update(plan, _result(plan)):
            entry = self._live[update.request.request_id]
            if entry.first_token_s is None and update.new_token_ids:
                entry.first_token_s = now
            if update.request.finished:
                del self._live[update.request.request_id]

    def _sample_usage(self, now: float) -> None:
        if not self._usage.due():
            return
        total = self._arena.num_bytes - self._arena.slab_bytes
        sizes = [group.layout.block_bytes for group in self._arena.groups]
        usage = self._blocks.usage()
        owned = sum(size * group.num_owned for size, group in zip(sizes, usage, strict=True)) / total
        cached = sum(size * group.num_cached for size, group in zip(sizes, usage, strict=True)) / total
        sample = UsageSample(now, owned, cached, self._scheduler.num_running, self._scheduler.num_waiting)
        self._usage.append(sample)

    def _report(self, num_requests: int) -> TraceReport:
        admitted = [entry for entry in self._entries if entry.scheduled_s is not None]
        requests = [entry.request for entry in admitted]
        queued = [e.scheduled_s - e.arrival_s for e in admitted if e.scheduled_s is not None]
        first = [e.first_token_s - e.arrival_s for e in admitted if e.first_token_s is not None]
        prompt_tokens = sum(request.num_prompt_tokens for request in requests)
        cached_tokens = sum(request.num_cached_tokens for request in requests)
        output_tokens = sum(request.num_output_tokens for request in requests)
        finished = [entry.request.finish_reason for entry in self._entries]
        duration = self._clock.now()
        return TraceReport(
            num_requests=num_requests,
            num_refused=self._num_refused,
            num_failed=finished.count(FinishReason.ERROR),
            num_unfinished=num_requests - self._num_refused - len(finished) + finished.count(None),
            num_steps=self._num_steps,
            num_preemptions=sum(request.num_preemptions for request in requests),
            duration_s=duration,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            hit_rate=cached_tokens / prompt_tokens if prompt_tokens else 0.0,
            queue_p50_s=_percentile(queued, 0.5),
            queue_p99_s=_percentile(queued, 0.99),
            first_token_p50_s=_percentile(first, 0.5),
            first_token_p99_s=_percentile(first, 0.99),
            output_tokens_per_s=output_tokens / duration if duration else 0.0,
            peak_owned_share=max((sample.owned_share for sample in self._usage.kept), default=0.0),
            usage=tuple(self._usage.kept),
        )


class _Samples:
    """A bounded record over an unknown number of steps: full, it keeps every second one and samples half as often."""

    def __init__(self) -> None:
        self.kept: list[UsageSample] = []
        self._every = 1
        self._calls = 0

    def due(self) -> bool:
        """Count a step; say whether it should be sampled."""
        self._calls += 1
        return self._calls % self._every == 0

    def append(self, sample: UsageSample) -> None:
        self.kept.append(sample)
        if len(self.kept) == _MAX_SAMPLES:
            self.kept = self.kept[1::2]
            self._every *= 2


def _result(plan: StepPlan) -> StepResult:
    """Sample tokens that differ between requests and positions, so that only shared text is found shared."""
    mask = (1 << _TOKEN_BITS) - 1
    sampled: list[list[int]] = []
    for row, request_id in enumerate(plan.request_ids):
        token = (request_id * _SPREAD + plan.num_computed[row] + plan.num_tokens[row]) & mask
        sampled.append([token] if plan.samples[row] else [])
    return StepResult(plan.step, sampled)


def _percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of `values` do not exceed, 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0
