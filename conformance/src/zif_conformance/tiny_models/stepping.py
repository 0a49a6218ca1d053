"""Steps planned by hand and given straight to a model runner: no scheduler, no block manager, no text.

The runner is the one that the engine would take: the platform's own, else core's. Called by the tests of L4.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zif.contract import (
    Device,
    Draft,
    HiddenRows,
    KVArena,
    ModelRunner,
    RecurrentStateSpec,
    RequestStart,
    SamplingParams,
    StepFuture,
    StepPlan,
    StepResult,
)
from zif.engine.planning import PlannedModel, plan_model
from zif.settings import EngineSettings

GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True, eq=False)
class Row:
    """A request as the plans know it. `num_computed` counts what plans have computed, `num_known` what is sampled too.

    `tables` are its blocks per layer group, all from the start; `spares` a block per group for the state after a draft.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    tables: tuple[list[int], ...]
    spares: tuple[int, ...]
    num_computed: int = 0
    num_known: int = 0
    fault: str | None = None
    hidden: HiddenRows | None = None

    @property
    def output(self) -> list[int]:
        """Return the sampled tokens."""
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(slots=True)
class Blocks:
    """Free blocks of each layer group, given back last in, first out, so that a freed one is used again at once."""

    arena: KVArena
    shuffle_seed: int | None = None
    free: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_groups = len(self.arena.groups)
        for group in range(num_groups):
            slabs = range(1 + group, self.arena.num_slabs, num_groups)
            blocks = [block for slab in slabs for block in self.arena.slab_blocks(group, slab)][::-1]
            if self.shuffle_seed is not None:
                random.Random(self.shuffle_seed).shuffle(blocks)
            self.free.append(blocks)

    def take(self, max_tokens: int) -> tuple[list[int], ...]:
        """Take the blocks of `max_tokens` tokens from every group."""
        return tuple(
            [free.pop() for _ in range(group.spec.num_blocks(max_tokens))]
            for free, group in zip(self.free, self.arena.groups, strict=True)
        )

    def take_spares(self) -> tuple[int, ...]:
        """Take one block from every group of states; 0 for the others."""
        return tuple(
            free.pop() if isinstance(group.spec, RecurrentStateSpec) else 0
            for free, group in zip(self.free, self.arena.groups, strict=True)
        )

    def give_back(self, row: Row) -> None:
        """Return the blocks of a row."""
        for free, table, spare in zip(self.free, row.tables, row.spares, strict=True):
            free += [*table, *([spare] if spare else [])]


class Stepper:
    """A loaded runner and the requests that it holds."""

    def __init__(self, planned: PlannedModel, device: Device, runner: ModelRunner) -> None:
        self.runner = runner
        self.device = device
        self.blocks = Blocks(planned.arena)
        self._specs = tuple(group.spec for group in planned.arena.groups)
        self._max_tokens = planned.config.max_model_len
        self._plan = StepPlan(0)
        self._num_requests = 0
        self._rows: dict[int, Row] = {}

    def start(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        num_prompt_tokens: int | None = None,
        request_id: int | None = None,
    ) -> Row:
        """Start a request with the next step; given fewer prompt tokens than tokens, the rest are its output so far."""
        number = self._num_requests if request_id is None else request_id
        self._num_requests = max(self._num_requests, number) + 1
        num_prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        row = Row(number, list(tokens), num_prompt, self.blocks.take(self._max_tokens), self.blocks.take_spares())
        row.num_known = len(tokens)
        self._rows[number] = row
        tables = tuple(list(table) for table in row.tables)
        self._plan.started.append(RequestStart(number, list(tokens), num_prompt, tables, sampling, seed))
        return row

    def start_hidden(self, tokens: Sequence[int], hidden: HiddenRows) -> Row:
        """Start a request that wants hidden states in place of tokens."""
        row = self.start(tokens)
        row.hidden = hidden
        self._plan.started[-1] = replace(self._plan.started[-1], hidden=hidden)
        return row

    def release(self, row: Row) -> None:
        """Release a request with the next step; its blocks are free at once."""
        self._plan.released.append(row.request_id)
        self._rows.pop(row.request_id)
        self.blocks.give_back(row)

    def submit(
        self, work: Sequence[tuple[Row, int]] = (), drafts: Mapping[int, list[int]] | None = None
    ) -> tuple[StepPlan, StepFuture]:
        """Submit a step in which each row computes that many tokens, and its draft where it has one."""
        plan, self._plan = self._plan, StepPlan(self._plan.step + 1)
        for row, num_tokens in work:
            self._add(plan, row, num_tokens, (drafts or {}).get(row.request_id))
        return plan, self.runner.submit(plan)

    def apply(self, plan: StepPlan, future: StepFuture) -> StepResult:
        """Wait for a step and let the rows hear of it."""
        result = future.result()
        assert result.step == plan.step
        assert len(result.sampled) == len(plan.request_ids)
        for index, request_id in enumerate(plan.request_ids):
            row = self._rows.get(request_id)
            if row is not None:
                self._hear(row, plan, index, result)
        return result

    def step(self, work: Sequence[tuple[Row, int]] = (), drafts: Mapping[int, list[int]] | None = None) -> StepResult:
        """Submit a step and wait for it."""
        return self.apply(*self.submit(work, drafts))

    def advance(self, *rows: Row, num_tokens: int, chunk: int | None = None) -> None:
        """Let rows compute together, at most `chunk` tokens of each in a step, until each has that many more tokens."""
        wanted = {row.request_id: len(row.output) + num_tokens for row in rows}
        while behind := [row for row in rows if len(row.output) < wanted[row.request_id] and row.fault is None]:
            self.step([(row, min(chunk or self._max_tokens, row.num_known - row.num_computed)) for row in behind])

    def _add(self, plan: StepPlan, row: Row, num_tokens: int, draft: list[int] | None) -> None:
        samples = row.num_computed + num_tokens == row.num_known and row.hidden is None
        if draft is not None:
            assert samples, "a draft follows known tokens"
            plan.drafts[row.request_id] = Draft(list(draft), row.spares)
            num_tokens += len(draft)
        plan.request_ids.append(row.request_id)
        plan.num_computed.append(row.num_computed)
        plan.num_tokens.append(num_tokens)
        plan.samples.append(samples)
        plan.total_tokens += num_tokens
        if draft is None:
            row.num_computed += num_tokens
            row.num_known += samples

    def _hear(self, row: Row, plan: StepPlan, index: int, result: StepResult) -> None:
        row.fault = result.faults.get(row.request_id)
        if row.fault is not None:
            return
        sampled = result.sampled[index]
        draft = plan.drafts.get(row.request_id)
        num_allowed = plan.samples[index] + (len(draft.token_ids) if draft else 0)
        assert plan.samples[index] <= len(sampled) <= num_allowed, (sampled, num_allowed)
        row.token_ids += sampled
        if draft is not None:
            self._settle(row, plan.num_tokens[index], len(draft.token_ids), len(sampled))

    def _settle(self, row: Row, num_tokens: int, num_drafted: int, num_sampled: int) -> None:
        """Count what a draft has computed for good."""
        row.num_known = len(row.token_ids)
        num_refused = num_drafted + 1 - num_sampled
        if not any(row.spares):
            row.num_computed += num_tokens - num_refused
        elif not num_refused:
            row.num_computed += num_tokens
            row.spares = tuple(self._swapped(row, group, spare) for group, spare in enumerate(row.spares))

    def _swapped(self, row: Row, group: int, spare: int) -> int:
        """Put the block with the state after the draft into the table, and return the one that was there."""
        if not spare:
            return 0
        table, block = row.tables[group], (row.num_computed - 1) // self._specs[group].block_size
        table[block], old = spare, table[block]
        return old


@contextlib.contextmanager
def stepping(settings: Mapping[str, Any], folder: Path | None = None) -> Iterator[Stepper]:
    """Open the model of the settings (or in `folder`) and yield a stepper; closed at the end."""
    resolved = EngineSettings.from_values(settings)
    planned = plan_model(resolved if folder is None else replace(resolved, model=str(folder)))
    device = planned.platform.open(planned.plan, rank=0)
    try:
        runner = make_runner(planned, device)
        try:
            runner.load(planned.model, lambda done, total: None)
            runner.start(planned.arena)
            yield Stepper(planned, device, runner)
        finally:
            runner.close()
    finally:
        device.close()


def make_runner(planned: PlannedModel, device: Device) -> ModelRunner:
    """Return the runner that the engine would take."""
    config, plan = planned.config, planned.plan
    runner: ModelRunner | None = planned.registry.ask(
        plan.platform, hook="zif_model_runner", config=config, plan=plan, device=device
    )
    if runner is not None:
        return runner
    from zif.runtime.runner import TorchRunner

    return TorchRunner(config, device)
