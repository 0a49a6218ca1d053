"""One scenario, step by step: traffic through the real scheduler and block manager, faults injected, all checked.

The steps are those of the engine's loop: schedule, submit, update, with up to `Scenario.max_steps_in_flight` steps
submitted before the first of them is applied. Between any two of them a request may be aborted.
"""

import random
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

from zif.contract import Draft, FinishReason, ModelDescription, Request, RequestStatus, StepPlan, StepResult
from zif.errors import EngineError, ZifError
from zif.kv import PagedBlockManager, Retainer
from zif.scheduling import TokenBudgetScheduler
from zif.simulation.census import Census
from zif.simulation.clock import SimulatedClock
from zif.simulation.faults import FaultInjector, FaultPoint, FaultSchedule
from zif.simulation.invariants import Invariants
from zif.simulation.nonsense import carry_out_in_part, spoil
from zif.simulation.runner import SimulatedRunner
from zif.simulation.scenario import VOCAB_SIZE, Scenario
from zif.simulation.store import SimulatedStore
from zif.simulation.totals import CheckIntervals, Totals
from zif.simulation.traffic import TrafficGenerator
from zif.simulation.words import Words

_STEP_S = 0.01
_JUMP_S = 86_400.0
_FATAL_ALLOCATIONS = 2
_GUESS_SHARE = 0.5


class _FaultyBlocks(PagedBlockManager):
    """The real block manager, whose reservations fail when a fault strikes."""

    faults: FaultInjector

    def reserve(self, request: Request, num_tokens: int) -> bool:
        return not self.faults.strikes(FaultPoint.ALLOCATION) and super().reserve(request, num_tokens)


class _CrashError(EngineError):
    """The injected failure of a whole step."""


class _PoisonError(EngineError):
    """The injected failure of every step with a poisonous request."""


class Simulation:
    """Run one scenario. Any broken promise raises `AssertionError`, or whatever the broken part raises."""

    def __init__(
        self,
        scenario: Scenario,
        faults: FaultSchedule = FaultSchedule(),  # noqa: B008 - frozen value
        words: Words | None = None,
        intervals: CheckIntervals = CheckIntervals(),  # noqa: B008 - frozen value
    ) -> None:
        self.scenario = scenario
        self.faults = FaultInjector(faults, scenario.seed)
        self.clock = SimulatedClock()
        self.num_steps = 0
        config = scenario.config
        self._words = words or Words(VOCAB_SIZE)
        self._intervals = intervals
        self._random = random.Random(f"simulation:{scenario.seed}")
        self._traffic = TrafficGenerator(scenario)
        self._blocks = _FaultyBlocks(
            scenario.arena,
            enable_prefix_caching=config.enable_prefix_caching,
            max_step_tokens=config.max_num_batched_tokens,
            retainer=Retainer(self.clock.now, config.tenant_cache_percent),
            tiers=scenario.tiers,
        )
        self._store = SimulatedStore(scenario.tiers.host_bytes, scenario.tiers.disk_bytes, self.faults)
        self._blocks.faults = self.faults
        self._scheduler = TokenBudgetScheduler(config, self._blocks, scenario.constraints, self.clock.now)
        self._invariants = Invariants(scenario, self._words)
        self._census = Census(scenario.specs)
        self._live: dict[int, Request] = {}
        self._ended: list[Request] = []
        self._doomed: dict[int, FinishReason] = {}
        self._last: tuple[StepPlan, StepResult] | None = None
        self._in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self._drafts: dict[int, Draft] = {}
        self._poisonous: set[int] = set()
        self._totals: Counter[str] = Counter()
        self._runner = self._start_runner()

    def run(self, max_steps: int | None = None) -> Totals:
        """Play the scenario to its end, or `max_steps` steps of it, and return what it met."""
        while not self.done and (max_steps is None or self.num_steps < max_steps):
            self.step()
        if self.done:
            self._check_end()
        return self.totals()

    @property
    def done(self) -> bool:
        """Say whether nothing will arrive and nothing is left to do."""
        return self._traffic.exhausted and not self._live and not self._scheduler.has_requests()

    def step(self) -> None:
        """Let requests arrive, and compute one step."""
        self.num_steps += 1
        self.clock.advance(_JUMP_S if self.faults.strikes(FaultPoint.CLOCK) else _STEP_S)
        for request in self._traffic.arrivals(self.clock.now()):
            self._live[request.request_id] = request
            self._invariants.admit(request)
            self._scheduler.add(request)
        self._maybe_abort()
        if self.scenario.config.max_draft_tokens:
            self._guess()
        plan = self._plan()
        if plan is not None and not self._submit(plan):
            return
        if plan is None and not self._in_flight:
            self._check_idle()
            return
        late = plan is not None and self.faults.strikes(FaultPoint.LATE)
        if plan is None or (len(self._in_flight) >= self.scenario.max_steps_in_flight and not late):
            self._apply_oldest()

    def _guess(self) -> None:
        """Propose tokens for requests that decode: some right, some not."""
        chance, most = self._random, self.scenario.config.max_draft_tokens
        for request in self._live.values():
            if request.status is RequestStatus.RUNNING and chance.random() < _GUESS_SHARE:
                right = self._invariants.continuation(request, chance.randrange(most + 1))
                wrong = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(most + 1))]
                request.draft_token_ids = right + wrong

    def _plan(self) -> StepPlan | None:
        """Plan a step and check the plan."""
        running = self._running()
        plan = self._scheduler.schedule()
        if plan is None:
            return None
        if self.faults.num_strikes(FaultPoint.ALLOCATION):
            self._invariants.expect_evictions()
        if plan.started:
            self._invariants.note_usage(self._blocks.usage())
        self._invariants.check_plan(plan, self._live)
        self._invariants.check_victims(running)
        self._check_deadlines()
        if self.num_steps % self._intervals.everything == 0:
            self._census.count([*self._live.values(), *self._scheduler.holders()])
            self._census.check_writes(plan, self._live)
        self._invariants.check_progress(plan, self._live)
        return plan

    def _running(self) -> list[Request]:
        running = RequestStatus.RUNNING
        return [request for request in self._live.values() if request.status is running]

    def _submit(self, plan: StepPlan) -> bool:
        """Compute a step, whose result is yet to come. False when it crashed."""
        self._maybe_abort()
        try:
            result = self._compute(plan)
        except _CrashError:
            self._restart()
            return False
        except _PoisonError as error:
            self._recover(plan, str(error))
            return False
        self._invariants.note_submitted(plan, result)
        self._drafts.update(plan.drafts)
        self._in_flight.append((plan, result))
        return True

    def _apply_oldest(self) -> None:
        """Hand the scheduler the oldest result, perhaps after a later one, and check what comes of it."""
        self._maybe_abort()
        if len(self._in_flight) > 1 and self.faults.strikes(FaultPoint.REORDERED):
            self._apply_wrongly(*self._in_flight[1])
        self._apply(*self._in_flight.popleft())
        if self.num_steps % self._intervals.everything == 0:
            self._check_census()
        if self.num_steps % self._intervals.integrity == 0:
            self._blocks.check_integrity([*self._live.values(), *self._scheduler.holders()])

    def _check_census(self) -> None:
        """Check hands and counts against the tables of all requests that may hold blocks, and the drafts under way."""
        known, running = [*self._live.values(), *self._scheduler.holders()], RequestStatus.RUNNING
        if self._drafts:
            under_way = {number for plan, _ in self._in_flight for number in plan.drafts}
            under_way.update(r.request_id for r in known if r.block_ids and r.status is not running)
            self._drafts = {number: draft for number, draft in self._drafts.items() if number in under_way}
        self._census.count(known)
        self._census.check_needs(self._live.values(), len(self._in_flight))
        usage = self._blocks.usage()
        self._census.check_owned(usage, self._drafts.values())
        self._invariants.note_usage(usage)

    @property
    def requests(self) -> list[Request]:
        """Every request that has arrived: first those that have ended, in that order."""
        return [*self._ended, *self._live.values()]

    def totals(self) -> Totals:
        """Return what was met so far."""
        requests = self.requests
        return Totals(
            num_steps=self.num_steps,
            num_requests=len(requests),
            num_tokens=sum(request.num_output_tokens for request in requests),
            num_cached_tokens=sum(request.num_cached_tokens for request in requests),
            num_preemptions=sum(request.num_preemptions for request in requests),
            num_drafted_tokens=sum(request.num_drafted_tokens for request in requests),
            num_accepted_tokens=sum(request.num_accepted_tokens for request in requests),
            num_saved_blocks=self._store.num_saved,
            num_loaded_blocks=self._store.num_loaded,
            finished=Counter(request.finish_reason.value for request in self._ended if request.finish_reason),
            strikes=Counter({point.value: n for point in FaultPoint if (n := self.faults.num_strikes(point))}),
        )

    def _start_runner(self) -> SimulatedRunner:
        runner = SimulatedRunner(self._words)
        runner.load(_no_model(self.scenario), lambda done, total: None)
        runner.start(self.scenario.arena)
        runner.attach_store(self._store)
        return runner

    def _compute(self, plan: StepPlan) -> StepResult:
        if self.faults.strikes(FaultPoint.CRASH):
            raise _CrashError("injected: the step failed")
        if plan.request_ids and self.faults.strikes(FaultPoint.RAISE):
            self._poisonous.add(self._random.choice(plan.request_ids))
        if not self._poisonous.isdisjoint(plan.request_ids):
            carry_out_in_part(plan, self._runner, self._store, self._random)
            raise _PoisonError("injected: a request that cannot be computed")
        num_running = len(self._running())
        result = self._runner.submit(plan).result()
        assert self._runner.num_sequences >= num_running, "the runner was not told of a running request"
        assert self._runner.num_sequences <= self.scenario.config.max_num_seqs, "the runner still holds ended requests"
        if plan.request_ids and self.faults.strikes(FaultPoint.STEP):
            struck = self._random.choice(plan.request_ids)
            result.faults[struck] = "injected: this request failed"
        if plan.request_ids and self.faults.strikes(FaultPoint.NONSENSE):
            struck = self._random.choice(plan.request_ids)
            result.faults[struck] = "injected: this request computed nonsense"
            result.unsound.add(struck)
        return result

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        if self._last is not None and self.faults.strikes(FaultPoint.STALE):
            self._apply_wrongly(plan, self._last[1])
        faults = result.faults
        struck = self._struck(plan, faults) if faults else []
        for request in struck:
            if request.request_id in result.unsound:
                self._spoil(request)
        trusting = {request.request_id for request in struck if not request.distrusts_cache}
        updates = self._scheduler.update(plan, result)
        self._census.applied(plan.step)
        for request in struck:
            if request.status is RequestStatus.PREEMPTED:
                again = request.distrusts_cache and request.request_id in trusting & result.unsound
                assert result.lost or again, f"request {request.request_id} starts over instead of failing"
            else:
                self._doomed[request.request_id] = FinishReason.ERROR
        computed = [number for number in plan.request_ids if number not in faults] if faults else plan.request_ids
        self._invariants.note_computed(computed)
        self._invariants.check_tokens(updates)
        over = RequestStatus.FINISHED
        for request in [update.request for update in updates if update.request.status is over]:
            if request.request_id in self._live:
                self._end(request)
        if self.faults.strikes(FaultPoint.DUPLICATE):
            self._apply_wrongly(plan, result)
        self._last = (plan, result)

    def _spoil(self, request: Request) -> None:
        """Put nonsense into the blocks of a request, which it has computed or found, and which nobody may find then."""
        self._invariants.expect_evictions()
        spoil(request, [*self._live.values(), *self._scheduler.holders()], self._runner, self._random)

    def _recover(self, plan: StepPlan, error: str) -> None:
        """Do what the engine does after a step raised: give it up, and end who is found to be the cause."""
        while self._in_flight:
            self._apply(*self._in_flight.popleft())
        updates = self._scheduler.abandon([plan], error)
        if updates is None:
            self._restart()
            return
        self._census.restart()
        for request in [update.request for update in updates if update.request.request_id in self._live]:
            if request.error == error:
                assert request.request_id in self._poisonous, f"request {request.request_id} ended for another's fault"
                self._doomed[request.request_id] = FinishReason.ERROR
            self._end(request)

    def _struck(self, plan: StepPlan, faults: Mapping[int, str]) -> list[Request]:
        """Return the requests whose rows failed. Rows of one that has ended or started over since then are void."""
        known = [self._live[number] for number in faults if number in self._live]
        return [r for r in known if r.status is RequestStatus.RUNNING and r.first_step <= plan.step]

    def _apply_wrongly(self, plan: StepPlan, result: StepResult) -> None:
        """Hand the scheduler a result that is not due: it must refuse or ignore it, and change nothing."""
        before = self._known()
        try:
            updates = self._scheduler.update(plan, result)
        except ZifError:
            updates = []
        assert not updates, "a result that was not due gave tokens"
        assert self._known() == before, "a result that was not due was applied"

    def _known(self) -> list[tuple[object, ...]]:
        return [
            (r.num_tokens, r.num_computed_tokens, r.num_planned_tokens, r.num_pending_tokens, r.status)
            for r in self._live.values()
        ]

    def _maybe_abort(self) -> None:
        if not self.faults.strikes(FaultPoint.ABORT):
            return
        never_known, over = -1, self._ended[-1].request_id if self._ended else -1
        for request_id in (never_known, over):
            assert self._scheduler.finish(request_id, FinishReason.ABORT) is None, "a request ended that was over"
        if not self._live:
            return
        request = self._random.choice(list(self._live.values()))
        if request.finished:
            # Over since `schedule`, to be reported by `update`.
            assert self._scheduler.finish(request.request_id, FinishReason.ABORT) is None, "a request ended twice"
            return
        for expected in (request, None):
            ended = self._scheduler.finish(request.request_id, FinishReason.ABORT)
            assert ended is expected, f"abort of {request.request_id} returned {ended}"
        self._doomed[request.request_id] = FinishReason.ABORT
        self._end(request)

    def _restart(self) -> None:
        """Do what the engine does after a failed step: give up every request. Then begin again with a new runner."""
        for request in list(self._live.values()):
            over = request.status is RequestStatus.FINISHED
            if not over:
                self._doomed[request.request_id] = FinishReason.ERROR
            ended = self._scheduler.finish(request.request_id, FinishReason.ERROR)
            assert ended is (None if over else request), "a live request is unknown"
            self._end(request)
        self._in_flight.clear()
        self._census.restart()
        self._scheduler.forget_steps()
        self._store.close()
        self._census.check_nothing_held(self._blocks)
        self._invariants.forget_prefixes()
        self._last = None
        self._runner = self._start_runner()

    def _end(self, request: Request) -> None:
        del self._live[request.request_id]
        assert request.status is RequestStatus.FINISHED, "an ended request has not ended"
        held = request.block_ids and not any(holder is request for holder in self._scheduler.holders())
        assert not held, f"request {request.request_id} has ended and holds blocks"
        self._check_reason(request)
        self._invariants.forget(request)
        self._ended.append(request)
        self._traffic.heed(request)

    def _check_reason(self, request: Request) -> None:
        """Check that a request ended as it must: at its length, at a stop token, or by what was done to it."""
        reason, doom = request.finish_reason, self._doomed.get(request.request_id)
        if doom is not None:
            assert reason is doom, f"request {request.request_id} ended by {reason}, must end by {doom}"
        elif reason is FinishReason.ABORT:
            assert request.deadline_s is not None, f"request {request.request_id} was aborted by nobody"
            assert request.deadline_s <= self.clock.now(), "a request ended before its deadline"
        elif reason is FinishReason.ERROR:
            # One failed allocation makes a request run alone, a second one then ends it.
            num_failed = self.faults.num_strikes(FaultPoint.ALLOCATION)
            assert num_failed >= _FATAL_ALLOCATIONS, f"request {request.request_id} failed: {request.error}"
        elif reason is FinishReason.STOP:
            assert request.token_ids[-1] in request.stop_ids, "a request stopped at a token that does not stop it"
        else:
            assert reason is FinishReason.LENGTH, f"request {request.request_id} ended by {reason} without a cause"
            assert request.num_tokens == request.max_total_tokens, "a request ended before its length"

    def _check_deadlines(self) -> None:
        now_s = self.clock.now()
        for request in self._live.values():
            if request.deadline_s is not None and request.deadline_s <= now_s:
                assert request.finished, f"request {request.request_id} outlives its deadline"

    def _check_idle(self) -> None:
        """Check that nothing to do means that there is nothing."""
        assert not self._scheduler.has_requests(), "requests wait, and nothing is scheduled"
        assert not self._live, "requests are live, and the scheduler knows none"

    def _check_end(self) -> None:
        assert len(self._ended) >= self.scenario.traffic.num_arrivals, "a request was lost"
        self._census.check_nothing_held(self._blocks)


def _no_model(scenario: Scenario) -> ModelDescription:
    longest, specs = scenario.config.max_model_len, scenario.specs
    return ModelDescription(Path(), "none", "none", {}, "float32", VOCAB_SIZE, longest, specs, frozenset(), 0, 0, 0)
