"""Which guessed tokens a step accepts: those that equal the tokens sampled where they stand.

At each position of a draft the sampler chooses a token exactly as it would without the draft: from the logits given the
tokens before it, with the request's own options, and with the random number of (seed, number of known tokens). A guess
is accepted while it equals that choice, so the text with drafts is the text without them, at any temperature: equal
token by token, which is more than the equal distribution that rejection sampling gives (Leviathan, Kalman and Matias,
"Fast inference from transformers via speculative decoding", 2023). It holds as far as logits do not depend on how many
tokens a step computes at once. Called by the torch runner.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from zif.contract import StepPlan
from zif.runtime.tokens import Int64, SamplePositions


def kept_positions(requests: Int64, positions: SamplePositions, chosen: Int64) -> NDArray[np.bool_]:
    """Return where the tokens sampled follow accepted guesses only; a request's first position is always kept.

    requests: [S], rising. chosen: [S], the tokens sampled at the positions; the guesses still stand in the table.
    Returns [S].
    """
    goes_on = requests[1:] == requests[:-1]
    guesses = positions.table.tokens[positions.rows[:-1], positions.num_tokens[:-1]]
    num_refused = np.zeros(len(requests), dtype=np.int64)
    np.cumsum(goes_on & (guesses != chosen[:-1]), out=num_refused[1:])
    kept: NDArray[np.bool_] = num_refused == num_refused[np.searchsorted(requests, requests)]
    return kept


def doubtful_requests(plan: StepPlan, faulty: Int64) -> list[int]:
    """Return those of the faulty requests that may owe the fault to a guess: indices into the plan, rising.

    NaN at a refused guess reaches the positions before it, because a hidden value has weight zero and 0 * NaN is NaN.
    """
    found = set(faulty.tolist())
    return [r for r in sorted(found) if (d := plan.drafts.get(plan.request_ids[r])) is not None and d.token_ids]


def without_guesses(plan: StepPlan, requests: list[int]) -> StepPlan:
    """Plan some rows of a step again, without their guesses: indices into the plan, all of requests with drafts.

    States still go where the drafts say, so that those from before the rows stay.
    """
    request_ids = [plan.request_ids[request] for request in requests]
    drafts = {request_id: plan.drafts[request_id] for request_id in request_ids}
    num_guesses = [len(draft.token_ids) for draft in drafts.values()]
    return StepPlan(
        step=plan.step,
        request_ids=request_ids,
        num_computed=[plan.num_computed[request] for request in requests],
        num_tokens=[plan.num_tokens[request] - n for request, n in zip(requests, num_guesses, strict=True)],
        samples=[True] * len(requests),
        drafts={request_id: replace(draft, token_ids=[]) for request_id, draft in drafts.items()},
    )
