"""Steps planned by hand for a model runner, with drafts: no scheduler, no block manager.

Every request has all its blocks from the start. A group of states has a spare block for each request, which drafts
write to; it changes places with the block of the row's last token when all of a draft was accepted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from zif.contract import (
    Draft,
    KVArena,
    ModelRunner,
    RecurrentStateSpec,
    RequestStart,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


@dataclass
class DraftedRequest:
    """A request as the steps by hand know it. `num_steps` counts the steps that computed it."""

    token_ids: list[int]
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    num_computed: int = 0
    num_steps: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    fault: str | None = None
    tables: tuple[list[int], ...] = ()
    spare_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def reset(self) -> "DraftedRequest":
        """Return the request as it was before its first step."""
        prompt = self.token_ids[: self.num_prompt_tokens]
        return DraftedRequest(prompt, self.sampling, self.seed, self.stop_ids, self.bad_words_ids)


class HandMadeSteps:
    """Runs requests, by number, until they are forgotten."""

    def __init__(self, runner: ModelRunner, arena: KVArena, max_tokens: int) -> None:
        self.runner = runner
        self.requests: dict[int, DraftedRequest] = {}
        self._arena = arena
        self._specs = tuple(group.spec for group in arena.groups)
        self._max_tokens = max_tokens
        self._slabs = iter(range(1, arena.num_slabs))
        self._num_steps = 0
        self._started: list[RequestStart] = []
        self._released: list[int] = []

    def add(self, request_id: int, request: DraftedRequest) -> DraftedRequest:
        blocks = [self._blocks(group) for group in range(len(self._specs))]
        request.tables = tuple([next(own) for _ in range(spec.num_blocks(self._max_tokens))]
                               for own, spec in zip(blocks, self._specs, strict=True))  # fmt: skip
        request.spare_blocks = tuple(
            next(own) if isinstance(spec, RecurrentStateSpec) else 0
            for own, spec in zip(blocks, self._specs, strict=True)
        )
        self.requests[request_id] = request
        start = RequestStart(
            request_id,
            list(request.token_ids),
            request.num_prompt_tokens,
            tuple(list(table) for table in request.tables),
            request.sampling,
            request.seed,
            request.stop_ids,
            request.bad_words_ids,
        )
        self._started.append(start)
        return request

    def forget_all(self) -> None:
        """Release all requests with the next step, and use the arena anew."""
        self._released += self.requests
        self.requests = {}
        self._slabs = iter(range(1, self._arena.num_slabs))

    def step(
        self, drafts: Mapping[int, list[int]] | None = None, chunks: Mapping[int, int] | None = None
    ) -> StepResult:
        """Compute every request once: all it lacks, or as many tokens as `chunks` says; then its guesses."""
        plan = StepPlan(self._num_steps, started=self._started, released=self._released)
        self._num_steps, self._started, self._released = self._num_steps + 1, [], []
        for request_id, request in self.requests.items():
            self._plan_row(plan, request_id, request, (drafts or {}).get(request_id), (chunks or {}).get(request_id))
        result = self.runner.submit(plan).result()
        for row, request_id in enumerate(plan.request_ids):
            self._apply(self.requests[request_id], plan, row, result)
        return result

    def _blocks(self, group: int) -> Iterator[int]:
        return (block for slab in self._slabs for block in self._arena.slab_blocks(group, slab))

    def _plan_row(
        self, plan: StepPlan, request_id: int, request: DraftedRequest, guesses: list[int] | None, chunk: int | None
    ) -> None:
        num_known = len(request.token_ids) - request.num_computed
        num_tokens = min(num_known, chunk or num_known)
        if guesses is not None and num_tokens == num_known:
            plan.drafts[request_id] = Draft(guesses, request.spare_blocks)
            num_tokens += len(guesses)
        plan.request_ids.append(request_id)
        plan.num_computed.append(request.num_computed)
        plan.num_tokens.append(num_tokens)
        plan.samples.append(num_tokens >= num_known)
        plan.total_tokens += num_tokens

    def _apply(self, request: DraftedRequest, plan: StepPlan, row: int, result: StepResult) -> None:
        request_id, sampled, num_tokens = plan.request_ids[row], result.sampled[row], plan.num_tokens[row]
        request.num_steps += 1
        request.fault = result.faults.get(request_id)
        request.logprobs += result.logprobs.get(request_id, [])
        request.token_ids += sampled
        draft = plan.drafts.get(request_id)
        num_refused = len(draft.token_ids) + 1 - len(sampled) if draft else 0
        if not num_refused or not any(request.spare_blocks):
            request.num_computed += num_tokens - num_refused
        if draft and not num_refused:
            self._swap_states(request)

    def _swap_states(self, request: DraftedRequest) -> None:
        spares = list(request.spare_blocks)
        for group, spec in enumerate(self._specs):
            if isinstance(spec, RecurrentStateSpec):
                table, block = request.tables[group], (request.num_computed - 1) // spec.block_size
                table[block], spares[group] = spares[group], table[block]
        request.spare_blocks = tuple(spares)
