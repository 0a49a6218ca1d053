"""What must hold after every step, whatever the traffic and the faults. Each check is independent of what it checks.

Texts come from an oracle without blocks; found prefixes are compared with what requests of the same cache key have
computed. `census.py` checks who holds which blocks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from zif.contract import (
    CacheKey,
    FullAttentionSpec,
    KVUsage,
    Request,
    RequestStatus,
    StepPlan,
    StepResult,
    TokenUpdate,
)
from zif.simulation.oracle import ExpectedText
from zif.simulation.scenario import Scenario
from zif.simulation.words import Words

_ROOT = 0
_PATIENCE = 400
"""Steps after which the first request in line must have been scheduled: more than any request of a scenario takes."""
_MAX_STEPS_WITHOUT_TOKEN = 1_000
"""Steps after which some request must have said a token or ended, however often others had to begin anew."""


@dataclass(slots=True)
class _Batch:
    """A step in which each of the same requests computes one token and samples: most steps repeat the last one.

    The next row of each must begin at `ends`, which records know only when the batch has changed. `num_left` is how
    often it can be repeated until one of them has all its tokens.
    """

    request_ids: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    num_left: int = 0


@dataclass(slots=True)
class _Record:
    """What the checks remember of one request.

    The next row must begin at `end`; the runner knows `num_known` tokens, some of which no result has brought yet.
    It has computed `num_computed` tokens at most so far; `name` stands for the first `num_named` of them, whole
    stretches. `named` has the names of all that requests of its cache key have computed.
    """

    request: Request
    text: ExpectedText
    named: set[int]
    name: int = _ROOT
    num_named: int = 0
    num_computed: int = 0
    end: int = 0
    num_known: int = 0


class Invariants:
    """Check one simulation; every method asserts, and mutates only what it remembers."""

    def __init__(self, scenario: Scenario, words: Words) -> None:
        self._specs = specs = scenario.specs
        self._config = config = scenario.config
        self._constraints = scenario.constraints
        self._has_states = any(spec.keeps_checkpoints for spec in specs)
        self._stretch = math.lcm(*(spec.block_size for spec in specs))
        self._words = words
        self._records: dict[int, _Record] = {}
        self._batch = _Batch()
        self._computed: dict[CacheKey, set[int]] = {}
        self._order = {"fcfs": _by_due_time, "priority": _by_priority}.get(config.scheduling_policy)
        self._first: Request | None = None
        self._neglected = 0
        self._num_silent_steps = 0
        self._roomy = (
            config.enable_prefix_caching
            and not config.tenant_cache_percent
            and all(isinstance(spec, FullAttentionSpec) for spec in specs)
        )

    def admit(self, request: Request) -> None:
        """Begin to follow a request."""
        text = ExpectedText(
            self._specs, self._words, request.token_ids, request.cache_key.media, request.num_encoder_tokens
        )
        named = self._computed.setdefault(request.cache_key, set())
        self._records[request.request_id] = _Record(request, text, named)
        self._first = None

    def forget(self, request: Request) -> None:
        """Stop following a request that has ended."""
        self._records.pop(request.request_id, None)
        self._num_silent_steps = 0
        if request is self._first:
            self._first = None

    def forget_prefixes(self) -> None:
        """Hear that the content of every block is lost."""
        for named in self._computed.values():
            named.clear()
        self._roomy = False

    def note_usage(self, usage: Iterable[KVUsage]) -> None:
        """Hear what memory is left: when none can be lent, prefixes may be forgotten."""
        self._roomy = self._roomy and all(group.num_lendable for group in usage)

    def expect_evictions(self) -> None:
        """Hear that prefixes may be forgotten although there is room: after a failed allocation."""
        self._roomy = False

    def check_plan(self, plan: StepPlan, live: dict[int, Request]) -> None:
        """Check limits, rows, found prefixes, and that nobody writes where two have their hands."""
        num_running = [request.status for request in live.values()].count(RequestStatus.RUNNING)
        assert num_running <= self._config.max_num_seqs, "too many requests run"
        if self._is_repeated(plan):
            return
        rows = len(plan.request_ids)
        assert plan.total_tokens == sum(plan.num_tokens), "total_tokens is not the sum of the rows"
        assert plan.total_tokens <= self._config.max_num_batched_tokens, "the plan exceeds the token budget"
        assert rows <= self._config.max_num_seqs, "the plan holds too many requests"
        assert len(set(plan.request_ids)) == rows, "a request is planned twice"
        self._end_batch()
        for start in plan.started:
            request = live[start.request_id]
            self._check_found(request)
            record = self._records[start.request_id]
            record.end, record.num_known = request.num_computed_tokens, len(start.token_ids)
        self._check_rows(plan)
        if plan.total_tokens == rows and all(plan.samples) and not plan.drafts:
            self._begin_batch(plan)

    def _is_repeated(self, plan: StepPlan) -> bool:
        """Check a plan that repeats the one before, column by column; say whether it does."""
        batch = self._batch
        if (
            plan.started
            or plan.drafts
            or not batch.num_left
            or plan.request_ids != batch.request_ids
            or plan.num_computed != batch.ends
            or plan.num_tokens != batch.num_tokens
            or plan.samples != batch.samples
        ):
            return False
        assert plan.total_tokens == len(batch.ends), "total_tokens is not the sum of the rows"
        running = RequestStatus.RUNNING
        for request in batch.requests:
            assert request.status is running, "a request is planned that does not run"
        batch.ends = [end + 1 for end in batch.ends]
        batch.num_left -= 1
        return True

    def _begin_batch(self, plan: StepPlan) -> None:
        records = [self._records[request_id] for request_id in plan.request_ids]
        requests = [record.request for record in records]
        # A row may sample a request's last token, but not compute it.
        num_left = min([r.request.max_total_tokens - 1 - r.num_known for r in records], default=0)
        ends = [record.end for record in records]
        self._batch = _Batch(plan.request_ids.copy(), requests, ends, [1] * len(ends), [True] * len(ends), num_left)

    def _end_batch(self) -> None:
        """Write down where the requests of a batch stand."""
        batch, self._batch = self._batch, _Batch()
        for request_id, end in zip(batch.request_ids, batch.ends, strict=True):
            record = self._records.get(request_id)
            if record is not None:
                record.end, record.num_known = end, end + 1

    def _check_rows(self, plan: StepPlan) -> None:
        records, drafts, num_partial, num_chunks = self._records, plan.drafts, 0, 0
        for request_id, computed, num_tokens, samples in zip(
            plan.request_ids, plan.num_computed, plan.num_tokens, plan.samples, strict=True
        ):
            record, draft = records[request_id], drafts.get(request_id)
            request = record.request
            known = record.num_known + (len(draft.token_ids) if draft else 0)
            assert request.status is RequestStatus.RUNNING, "a request is planned that does not run"
            assert computed == record.end, "a row starts elsewhere than the request stands"
            assert 0 < num_tokens <= known - computed, "a row computes tokens that nobody knows"
            assert known < request.max_total_tokens, "a row computes tokens that the request will not have"
            assert samples == (computed + num_tokens == known), "a row samples too early or not at all"
            if draft:
                assert 0 < len(draft.token_ids) <= self._config.max_draft_tokens, "a row holds too many guesses"
                assert samples, "guesses follow tokens that are not computed"
                continue
            # What becomes of a row without guesses is known before its result.
            record.end = computed + num_tokens
            record.num_known = known + samples
            if not samples:
                num_partial += 1
                aligned = (computed + num_tokens) % self._constraints.token_alignment == 0
                assert aligned, "a prompt is cut at no multiple of the alignment"
            num_chunks += num_tokens > 1
        assert num_partial <= self._config.max_partial_prefills, "too many prompts are computed in part"
        if self._constraints.separate_prefill and num_chunks:
            running = {start.request_id for start in plan.started}
            singles = sum(
                n == 1 and r not in running and s
                for r, n, s in zip(plan.request_ids, plan.num_tokens, plan.samples, strict=True)
            )
            assert not singles, "prompts and single tokens share a step"

    def note_submitted(self, plan: StepPlan, result: StepResult) -> None:
        """Follow where the runner stands after a step, whose result the scheduler does not have yet."""
        for request_id in plan.drafts:
            record, row = self._records.get(request_id), plan.request_ids.index(request_id)
            if record is None:
                continue
            num_sampled = len(result.sampled[row])
            if num_sampled == plan.num_tokens[row] or not self._has_states:
                record.end += num_sampled
            record.num_known += num_sampled

    def check_victims(self, ran: list[Request]) -> None:
        """Check that of the requests that ran before a plan was made, those preempted for it are the last in order."""
        lost = RequestStatus.PREEMPTED
        preempted = [request.order for request in ran if request.status is lost]
        if preempted:
            kept = max((request.order for request in ran if request.status is RequestStatus.RUNNING), default=())
            assert min(preempted) > kept, "a request was preempted that is not the last in order"

    def check_progress(self, plan: StepPlan, live: dict[int, Request]) -> None:
        """Check that tokens come, and that the request that is first in line is served, within bounded steps."""
        self._num_silent_steps += 1
        assert self._num_silent_steps < _MAX_STEPS_WITHOUT_TOKEN, "requests are computed and none gets on"
        if self._order is None:
            return
        if self._first is None:
            # It changes only when a request comes or goes.
            self._first = min(live.values(), key=self._order, default=None)
        first = self._first
        self._neglected = 0 if first is None or first.request_id in plan.request_ids else self._neglected + 1
        assert self._neglected < _PATIENCE, f"request {first and first.request_id} is first in line and never served"

    def check_tokens(self, updates: list[TokenUpdate]) -> None:
        """Check the newest tokens of every request against the oracle."""
        records = self._records
        for update in updates:
            request, num_new_tokens = update.request, len(update.new_token_ids)
            if not num_new_tokens:
                continue
            self._num_silent_steps = 0
            token_ids, next_token = request.token_ids, records[request.request_id].text.next_token
            known, stop_ids = len(token_ids), request.stop_ids
            assert known - num_new_tokens >= request.num_prompt_tokens, "more tokens are new than generated"
            assert known <= request.max_total_tokens, "a request says more than it was allowed"
            for end in range(known - num_new_tokens, known):
                expected, token = next_token(end), token_ids[end]
                assert token == expected, f"request {request.request_id} said {token} at {end}, must say {expected}"
                if token in stop_ids:
                    assert end + 1 == known, "a request goes on after a stop token"
                    assert request.finished, "a request goes on after a stop token"

    def continuation(self, request: Request, num_tokens: int) -> list[int]:
        """Return what the request must say next."""
        tokens = request.token_ids.copy()
        text = self._records[request.request_id].text.fork(tokens)
        for _ in range(num_tokens):
            tokens.append(text.next_token(len(tokens)))
        return tokens[request.num_tokens :]

    def note_computed(self, request_ids: Iterable[int]) -> None:
        """Remember every prefix that live requests have computed, for later requests of the same key.

        Prefixes are found by stretches that end blocks in all groups, and named by them.
        """
        records, size = self._records, self._stretch
        for request_id in request_ids:
            record = records.get(request_id)
            if record is None:
                continue
            computed = record.request.num_computed_tokens
            if computed > record.num_computed:
                record.num_computed = computed
            while computed - record.num_named >= size:
                end = record.num_named + size
                record.name = hash((record.name, *record.request.token_ids[record.num_named : end]))
                record.named.add(record.name)
                record.num_named = end

    def _check_found(self, request: Request) -> None:
        """Check that no more was found computed than requests of the same key have computed, and in a roomy run all."""
        found, record = request.num_computed_tokens, self._records[request.request_id]
        assert found < len(request.token_ids), "no token is left to compute"
        token_ids, size, name, longest = request.token_ids, self._stretch, _ROOT, 0
        for end in range(size, len(token_ids), size):
            name = hash((name, *token_ids[end - size : end]))
            if name not in record.named:
                break
            longest = end
        # What a request itself had computed before it was preempted may be found up to its last token.
        most = max(longest, record.num_computed)
        assert found <= most, f"request {request.request_id}: {found} tokens found, {most} ever computed"
        if self._roomy and request.sampling.prompt_logprobs is None:
            assert found == longest, f"{found} tokens found of {longest} computed and never evicted"


def _by_due_time(request: Request) -> tuple[float, ...]:
    return (request.due_s, request.arrival)


def _by_priority(request: Request) -> tuple[float, ...]:
    return (request.priority, request.due_s, request.arrival)
