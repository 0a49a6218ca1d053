"""Random traffic through block manager, scheduler and null runner, with everything checked after every step.

Each check is independent of what it checks: texts come from an oracle without blocks, found prefixes are compared with
what others of the same cache key have shown, and no step may write where two requests hold the block.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from support.control_plane import VOCAB_SIZE, Engine, cut, expected_output, full, new_request, sliding
from zif.contract import CacheKey, FinishReason, KVArena, KVSpec, Request, StepPlan

_SPECS = [
    (full(4),),
    (full(4), sliding(5, 4)),
    (full(4), sliding(9, 2)),
    (full(4), sliding(3, 4), sliding(12, 8)),
    (sliding(7, 4),),
]
_MAX_STEPS = 4000


@dataclass(frozen=True)
class Totals:
    """What one simulation met, to show that it met anything."""

    num_steps: int
    num_cached_tokens: int
    num_preemptions: int
    num_aborts: int


@dataclass
class Simulation:
    """One seed: the seed draws the arena, the limits and the traffic."""

    seed: int
    num_arrivals: int = 24
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        specs = _SPECS[self.seed % len(_SPECS)]
        self.engine = Engine(
            self._arena(specs),
            budget=(1, 7, 16, 64)[self.seed % 4],
            max_num_seqs=6,
            caching=self.seed % 6 != 5,
            policy=("fcfs", "priority")[self.seed // 2 % 2],
        )
        self.stems = [[self.random.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(3)]
        self.num_aborts = 0

    def _arena(self, specs: tuple[KVSpec, ...]) -> KVArena:
        """Cut an arena that holds little more than one request of the longest kind, or several."""
        if self.random.random() < 0.5:
            return cut(specs, self.random.choice([16, 18, 36]) * len(specs))
        return cut(specs, self.random.choice([5, 6, 12]) * len(specs), slab_words=16)

    def run(self) -> Totals:
        """Play the traffic to its end and check everything."""
        num_steps, pending = 0, self.num_arrivals
        while pending or self.engine.scheduler.has_requests():
            assert num_steps < _MAX_STEPS, "no progress"
            num_steps += 1
            while pending and self.random.random() < 0.5:
                pending -= 1
                self._arrive()
            self._step()
            if self.random.random() < 0.06:
                self._abort()
        self._check_end()
        return Totals(
            num_steps,
            sum(r.num_cached_tokens for r in self.requests),
            sum(r.num_preemptions for r in self.requests),
            self.num_aborts,
        )

    def _arrive(self) -> None:
        chance = self.random
        prompt = chance.choice(self.stems)[: chance.randrange(1, 20)]
        prompt = prompt + [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(6))]
        key, priority = CacheKey(salt=chance.choice(["", "", "x"])), chance.randrange(3)
        siblings = tuple(
            new_request(
                len(self.requests) + index,
                prompt,
                max_total_tokens=len(prompt) + chance.randrange(1, 34),
                cache_key=key,
                priority=priority,
            )
            for index in range(chance.choice([1, 1, 1, 3]))
        )
        for request in siblings:
            assert self.engine.blocks.fits(request.max_total_tokens)
            request.siblings = siblings if len(siblings) > 1 else ()
            self.engine.add(request)
            self.requests.append(request)

    def _step(self) -> None:
        scheduler, engine = self.engine.scheduler, self.engine
        plan = scheduler.schedule()
        if plan is None:
            assert not scheduler.has_requests(), "requests wait, and nothing is scheduled"
            return
        self._check_plan(plan)
        scheduler.update(plan, engine.runner.submit(plan).result())
        engine.blocks.check_integrity(scheduler.live_requests())

    def _check_plan(self, plan: StepPlan) -> None:
        live = {r.request_id: r for r in self.engine.scheduler.live_requests()}
        assert plan.total_tokens == sum(plan.num_tokens) <= self.engine.budget
        assert len(set(plan.request_ids)) == len(plan.request_ids) <= self.engine.max_num_seqs
        for start in plan.started:
            self._check_found(live[start.request_id])
        hands = [Counter(b for r in live.values() if r.block_ids for b in r.block_ids[g]) for g, _ in self._groups()]
        for request_id, computed, num_tokens in zip(plan.request_ids, plan.num_computed, plan.num_tokens, strict=True):
            request = live[request_id]
            assert num_tokens > 0
            assert computed + num_tokens <= request.num_tokens
            for group, size in self._groups():
                written = request.block_ids[group][computed // size : (computed + num_tokens - 1) // size + 1]
                assert all(hands[group][block] == 1 for block in written), "a step writes into a shared block"

    def _check_found(self, request: Request) -> None:
        """Assert that no more was found than others of the same key have known."""
        others = [r for r in self.requests if r is not request and r.cache_key == request.cache_key]
        known = max((_num_common(request.token_ids, other.token_ids) for other in others), default=0)
        if request.num_preemptions:
            known = request.num_tokens
        assert request.num_computed_tokens <= min(known, request.num_tokens - 1), "more found than anybody computed"

    def _groups(self) -> list[tuple[int, int]]:
        return [(index, spec.block_size) for index, spec in enumerate(self.engine.specs)]

    def _abort(self) -> None:
        live = self.engine.scheduler.live_requests()
        if live:
            self.num_aborts += 1
            self.engine.scheduler.finish(self.random.choice(live).request_id, FinishReason.ABORT)
            self.engine.blocks.check_integrity(self.engine.scheduler.live_requests())

    def _check_end(self) -> None:
        for request in self.requests:
            assert request.output_token_ids == expected_output(request, self.engine.specs), (self.seed, request)
            if request.finish_reason is not FinishReason.ABORT:
                assert request.finish_reason is FinishReason.LENGTH
                assert request.num_tokens == request.max_total_tokens
        self.engine.blocks.reset_prefix_cache()
        self.engine.blocks.check_integrity([])
        assert all(usage.num_free + usage.num_cached + usage.num_owned == 0 for usage in self.engine.blocks.usage())


def _num_common(first: list[int], second: list[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
