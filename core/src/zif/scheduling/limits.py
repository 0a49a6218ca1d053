"""What one step may hold: the engine's limits and the platform's constraints, resolved once."""

from dataclasses import dataclass

from zif.contract import EngineConfig, Request, SchedulerConstraints
from zif.errors import ContractError


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Tokens and requests of a step, and how prompts are cut.

    `max_chunk_tokens` is what one prompt gets while others want tokens, `max_partial_prefills` how many prompts one
    step computes in part. Chunks end at multiples of `token_alignment`. A row holds up to `max_draft_tokens` guesses.
    """

    max_tokens: int
    max_requests: int
    max_partial_prefills: int
    max_chunk_tokens: int
    token_alignment: int
    separate_prefill: bool
    max_draft_tokens: int

    def cut(self, request: Request, num_tokens: int) -> int:
        """Return where a chunk of at most `num_tokens` tokens ends: at the last known token, or aligned.

        That is no further than the planned tokens when `num_tokens` do not reach the next place to cut.
        """
        end = request.num_planned_tokens + num_tokens
        if end >= request.num_tokens:
            return request.num_tokens
        return max(end - end % self.token_alignment, request.num_planned_tokens)


def step_limits(config: EngineConfig, constraints: SchedulerConstraints) -> StepLimits:
    """Bring limits and constraints together. Raises `ContractError` for constraints that no step can meet."""
    max_tokens = min(
        config.max_num_batched_tokens, max(constraints.token_buckets, default=config.max_num_batched_tokens)
    )
    max_requests = min(config.max_num_seqs, max(constraints.batch_buckets, default=config.max_num_seqs))
    if min((*constraints.token_buckets, *constraints.batch_buckets, constraints.token_alignment)) < 1:
        raise ContractError(f"{constraints!r}: buckets and token_alignment are 1 or more; correct the platform's plan")
    if constraints.token_alignment > max_tokens:
        raise ContractError(
            f"token_alignment={constraints.token_alignment!r} is more than the {max_tokens} tokens of a step, so no "
            "prompt could be cut; raise max_num_batched_tokens or correct the platform's plan"
        )
    share = config.max_prefill_chunk or max_tokens // config.max_partial_prefills
    return StepLimits(
        max_tokens=max_tokens,
        max_requests=max_requests,
        max_partial_prefills=config.max_partial_prefills,
        max_chunk_tokens=max(min(share, max_tokens), constraints.token_alignment),
        token_alignment=constraints.token_alignment,
        separate_prefill=constraints.separate_prefill,
        max_draft_tokens=config.max_draft_tokens,
    )
