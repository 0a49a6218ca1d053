"""The engine's settings as the pluggable parts see them: resolved, validated, never changed afterwards."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and switches of one engine.

    `max_num_batched_tokens` is the token budget of a step; `max_num_seqs` the number of requests in one step;
    `max_model_len` the longest prompt plus output in tokens; `scheduling_policy` is "fcfs" or "priority".
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    seed: int = 0
