"""What an engine has done since it started, as counters that cost a few additions a step."""

from dataclasses import dataclass

from zif.contract import PrefixMiss, Request

_NOT_LOOKED_UP = frozenset({PrefixMiss.CACHING_OFF, PrefixMiss.PROMPT_LOGPROBS, PrefixMiss.HIDDEN_STATES})


@dataclass(slots=True)
class EngineCounts:
    """Counters that only grow, and `last_step_s`, the seconds that the last call of `Engine.step` took.

    Prompt tokens count when their first sample has a token; `num_prefix_queries` are those of them that were looked up
    among computed prefixes, `num_cached_tokens` those found. Preemptions and guesses count when their sample ends.
    """

    num_steps: int = 0
    last_step_s: float = 0.0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_prefix_queries: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def add_prompt(self, request: Request) -> None:
        """Count the prompt of a sample that has its first token."""
        self.num_prompt_tokens += request.num_prompt_tokens
        self.num_cached_tokens += request.num_cached_tokens
        if request.prefix is not None and request.prefix.miss not in _NOT_LOOKED_UP:
            self.num_prefix_queries += request.num_prompt_tokens

    def add_ended(self, request: Request) -> None:
        """Count what befell a sample that has ended."""
        self.num_preemptions += request.num_preemptions
        self.num_drafted_tokens += request.num_drafted_tokens
        self.num_accepted_tokens += request.num_accepted_tokens
