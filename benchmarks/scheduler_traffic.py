"""The synthetic traffic of the scheduler benchmark, the same for every engine that is timed with it.

What it is: how many requests, which prompts, which sampled tokens, and how the times of the steps are summed up. What
it is not: part of zif. It imports the standard library only, because `scheduler_vllm.py` uses it under an interpreter
in which zif is not installed. Called by `scheduler.py` and `scheduler_vllm.py`.
"""

import statistics
from dataclasses import dataclass

VOCAB_SIZE = 32_000
NUM_LAYERS = 32
NUM_KV_HEADS = 8
HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `num_requests` decode for `num_steps` steps after prompts of `prompt_tokens` tokens."""

    num_requests: int
    prompt_tokens: int
    block_size: int
    num_steps: int

    @property
    def max_tokens(self) -> int:
        """Return the length that no request reaches, so that none ends while the clock runs."""
        return self.prompt_tokens + self.num_steps + 2

    @property
    def num_blocks(self) -> int:
        """Return how many blocks hold all requests at `max_tokens`: nothing is preempted."""
        return self.num_requests * -(-self.max_tokens // self.block_size) + 1

    @property
    def max_step_tokens(self) -> int:
        """Return the token budget with which the first step computes every prompt."""
        return self.num_requests * self.prompt_tokens

    def prompt(self, index: int) -> list[int]:
        """Return the prompt of one request; no two share a block.

        Lengths differ by up to a block, so that block boundaries are spread over the steps as in real traffic.
        """
        num_tokens = self.prompt_tokens - index % self.block_size
        return [(index * 7919 + position) % VOCAB_SIZE for position in range(num_tokens)]

    def sampled(self) -> list[list[int]]:
        """Return one sampled token for every request."""
        return [[index % VOCAB_SIZE] for index in range(self.num_requests)]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one planning and one update together."""

    num_requests: int
    median_us: float
    p90_us: float
    median_us_per_request: float


def summarize(num_requests: int, times_us: list[float]) -> Timing:
    """Sum up the times of the steps of one run."""
    median = statistics.median(times_us)
    return Timing(num_requests, median, statistics.quantiles(times_us, n=10)[-1], median / num_requests)
