"""The engine's settings as the pluggable parts see them: resolved, validated, never changed afterwards."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and switches of one engine.

    `max_num_batched_tokens` is the token budget of a step; `max_num_seqs` the number of requests in one step;
    `max_model_len` the longest prompt plus output in tokens; `scheduling_policy` is "fcfs", "priority" or "fair".

    At most `max_partial_prefills` prompts are computed in part by one step, and while others want tokens too, one
    prompt gets `max_prefill_chunk` of them (None: an equal share). A waiting request is passed by at most
    `max_bypasses` later ones. `expected_output_percent` is how much of its allowed output a request is first expected
    to use. `tenant_weights` are (tenant, weight) pairs under "fair"; a tenant that is not named has weight 1.
    `tenant_cache_percent` are (tenant, percent) pairs: the share of each layer group's memory that blocks of finished
    requests of this tenant may take; a tenant that is not named has no limit.

    `speculation` is "off" or "ngram"; a row holds at most `max_draft_tokens` guessed tokens.

    KV blocks that the device has no room for are kept in `host_kv_bytes` of host memory and `disk_kv_bytes` of files in
    the folder `disk_kv_path`, 0 meaning none. A preempted request is copied to host memory when 2 * its bytes /
    `host_kv_bytes_per_s` < tokens to compute again / `prefill_tokens_per_s`.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    seed: int = 0
    max_partial_prefills: int = 4
    max_prefill_chunk: int | None = None
    max_bypasses: int = 16
    expected_output_percent: int = 50
    tenant_weights: tuple[tuple[str, int], ...] = ()
    tenant_cache_percent: tuple[tuple[str, int], ...] = ()
    speculation: str = "off"
    max_draft_tokens: int = 0
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    disk_kv_path: str | None = None
    host_kv_bytes_per_s: int = 8_000_000_000
    prefill_tokens_per_s: int = 2000
