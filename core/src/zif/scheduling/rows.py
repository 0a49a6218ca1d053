"""Building a step plan: rows are appended, extended and taken out again. No decisions are made here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zif.contract import BlockUpdate, Request, RequestStart, StepPlan


@dataclass(slots=True)
class StepDraft:
    """A plan in the making.

    `max_chunk_tokens` is one prompt's share; `num_partial` of the planned `prompts` stay unfinished; `admits` says
    whether waiting requests may still start. `rows` are the requests whose rows are not counted as planned yet.
    """

    plan: StepPlan
    num_tokens_left: int
    max_chunk_tokens: int
    prompts: list[Request] = field(default_factory=list)
    rows: dict[int, Request] = field(default_factory=dict)
    num_partial: int = 0
    admits: bool = True


def append_row(draft: StepDraft, request: Request, end: int) -> None:
    """Plan a request's tokens up to `end`; guesses lie beyond the known ones."""
    start, plan = request.num_planned_tokens, draft.plan
    plan.request_ids.append(request.request_id)
    plan.num_computed.append(start)
    plan.num_tokens.append(end - start)
    plan.samples.append(_samples(request, end))
    draft.rows[request.request_id] = request


def append_single_rows(plan: StepPlan, requests: list[Request]) -> None:
    """Append a row of one token, the last known one, for each request, and count it.

    Column by column, as most steps are only this.
    """
    plan.request_ids += [request.request_id for request in requests]
    plan.num_computed += [request.num_planned_tokens for request in requests]
    plan.num_tokens += [1] * len(requests)
    samples = [request.hidden is None for request in requests]
    plan.samples += samples
    for request, does_sample in zip(requests, samples, strict=True):
        request.num_planned_tokens += 1
        request.num_pending_tokens += does_sample


def _samples(request: Request, end: int) -> bool:
    """Say whether a row up to `end` chooses the token after it."""
    return end >= len(request.token_ids) and request.hidden is None


def extend_row(plan: StepPlan, request: Request, end: int) -> None:
    """Let a row that is planned go on up to `end`."""
    row = plan.request_ids.index(request.request_id)
    plan.num_tokens[row] = end - plan.num_computed[row]
    plan.samples[row] = _samples(request, end)


def count_planned(plan: StepPlan, rows: Mapping[int, Request]) -> None:
    """Count the tokens of a finished plan's `rows` as planned, and those that it will sample as pending."""
    if not rows:
        return
    for request_id, num_tokens, samples in zip(plan.request_ids, plan.num_tokens, plan.samples, strict=True):
        request = rows.get(request_id)
        if request is not None:
            request.num_planned_tokens += num_tokens
            request.num_pending_tokens += samples and request_id not in plan.drafts


def remove_row(draft: StepDraft, request: Request) -> None:
    """Take a request that was planned in this very step, and loses its blocks, out of the plan again."""
    plan = draft.plan
    plan.block_updates = [u for u in plan.block_updates if u.request_id != request.request_id]
    if request.request_id in plan.request_ids:
        row = plan.request_ids.index(request.request_id)
        for column in (plan.request_ids, plan.num_computed, plan.num_tokens, plan.samples):
            del column[row]
        plan.drafts.pop(request.request_id, None)
        draft.rows.pop(request.request_id, None)


def append_block_updates(plan: StepPlan, request: Request, num_held: list[int]) -> None:
    """Tell the runner of the blocks that a request got beyond the `num_held` that it had in each group."""
    for group, (start, blocks) in enumerate(zip(num_held, request.block_ids, strict=True)):
        if len(blocks) > start:
            plan.block_updates.append(BlockUpdate(request.request_id, group, start, blocks[start:]))


def request_start(request: Request) -> RequestStart:
    """Return all that a runner needs to know of a request."""
    return RequestStart(
        request_id=request.request_id,
        token_ids=request.token_ids.copy(),
        num_prompt_tokens=request.num_prompt_tokens,
        block_ids=tuple(blocks.copy() for blocks in request.block_ids),
        sampling=request.sampling,
        seed=request.seed,
        stop_ids=request.stop_ids,
        bad_words_ids=request.bad_words_ids,
        media=request.cache_key.media,
        num_encoder_tokens=request.num_encoder_tokens,
        hidden=request.hidden,
    )
