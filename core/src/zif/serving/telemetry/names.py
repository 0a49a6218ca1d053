"""The names of all metrics: one table, so that none changes by accident.

Each is exposed under `zif:`, and those that other servers' boards and routers read also under `vllm:`. Gauges that the
Gateway API Inference Extension and llm-d route by: `num_requests_waiting`, `num_requests_running`,
`kv_cache_usage_perc`, and the labels of `cache_config_info`.

Sources: the model server protocol of gateway-api-inference-extension (docs/proposals/003), llm-d's page on model
servers, and vLLM's metrics page.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PREFIX: Final = "zif:"
ALIAS_PREFIX: Final = "vllm:"
LABELS: Final = ("model_name", "engine")
"""Labels of every metric; `Name.labels` come after them."""

_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_TOKENS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000
)  # fmt: skip
_SAMPLES: Final = (1, 2, 5, 10, 20, 50, 100)


class Kind(StrEnum):
    """What sort of metric it is. The exposition appends `_total` to the names of counters."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Name:
    """One metric. `bounds` are the buckets of a histogram; `is_shared` ones have the other prefix too."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    is_shared: bool = True


def _histogram(name: str, help_text: str, bounds: tuple[float, ...] = _SECONDS) -> Name:
    return Name(name, Kind.HISTOGRAM, help_text, bounds=bounds)


def _own(name: str, kind: Kind, help_text: str, *labels: str) -> Name:
    return Name(name, kind, help_text, labels, is_shared=False)


NUM_RUNNING: Final = Name("num_requests_running", Kind.GAUGE, "Requests in the running batch")
NUM_WAITING: Final = Name("num_requests_waiting", Kind.GAUGE, "Requests that wait to be computed")
WAITING_BY_REASON: Final = Name(
    "num_requests_waiting_by_reason", Kind.GAUGE, "Requests that wait, all of them for places or memory", ("reason",)
)
KV_USAGE: Final = Name("kv_cache_usage_perc", Kind.GAUGE, "Part of the KV blocks in use; 1 means all")
CACHE_CONFIG: Final = Name(
    "cache_config_info", Kind.GAUGE, "How KV memory is cut; always 1", ("block_size", "num_gpu_blocks")
)
ENGINE_STATE: Final = _own("engine_state", Kind.GAUGE, "1 for the state that the engine is in", "state")
ENGINE_HUNG: Final = _own("engine_hung", Kind.GAUGE, "1 while an engine that is up makes no progress")
LAST_STEP_S: Final = _own("last_step_seconds", Kind.GAUGE, "How long the engine's last step took")
STARTUP_S: Final = _own(
    "startup_phase_seconds", Kind.GAUGE, "How long a phase of the engine's last start took", "phase"
)

PROMPT_TOKENS: Final = Name("prompt_tokens", Kind.COUNTER, "Prompt tokens of requests that got a first token")
GENERATION_TOKENS: Final = Name("generation_tokens", Kind.COUNTER, "Tokens generated")
CACHED_TOKENS: Final = Name("prompt_tokens_cached", Kind.COUNTER, "Prompt tokens whose KV was found computed")
PREFIX_QUERIES: Final = Name("prefix_cache_queries", Kind.COUNTER, "Prompt tokens looked up in the prefix cache")
PREFIX_HITS: Final = Name("prefix_cache_hits", Kind.COUNTER, "Prompt tokens found in the prefix cache")
PREEMPTIONS: Final = Name("num_preemptions", Kind.COUNTER, "Requests that lost their KV blocks to others")
DRAFTED: Final = Name("spec_decode_num_draft_tokens", Kind.COUNTER, "Guessed tokens that were checked")
ACCEPTED: Final = Name("spec_decode_num_accepted_tokens", Kind.COUNTER, "Guessed tokens that were right")
STEPS: Final = _own("engine_steps", Kind.COUNTER, "Steps of the engine")
RESTARTS: Final = _own("engine_restarts", Kind.COUNTER, "Times that the engine's process was started again")
SUCCESSES: Final = Name(
    "request_success", Kind.COUNTER, "Requests that ended, by why their last sample ended", ("finished_reason",)
)
REJECTIONS: Final = Name("admission_rejections", Kind.COUNTER, "Requests that were not taken", ("reason",))
HTTP_REQUESTS: Final = _own("http_requests", Kind.COUNTER, "Answered HTTP requests", "route", "method", "status")

FIRST_TOKEN_S: Final = _histogram("time_to_first_token_seconds", "From the prompt's arrival to its first token")
INTER_TOKEN_S: Final = _histogram(
    "inter_token_latency_seconds", "Between two tokens of an answer", bounds=_TOKEN_SECONDS
)
PER_TOKEN_S: Final = _histogram(
    "request_time_per_output_token_seconds", "Mean time between the tokens of an answer", bounds=_TOKEN_SECONDS
)
E2E_S: Final = _histogram("e2e_request_latency_seconds", "From the prompt's arrival to its last token")
QUEUE_S: Final = _histogram("request_queue_time_seconds", "From the prompt's arrival to its first step")
PREFILL_S: Final = _histogram("request_prefill_time_seconds", "From the prompt's first step to its first token")
DECODE_S: Final = _histogram("request_decode_time_seconds", "From the first token to the last")
INFERENCE_S: Final = _histogram("request_inference_time_seconds", "From the prompt's first step to its last token")
REQUEST_PROMPT: Final = _histogram("request_prompt_tokens", "Tokens of a prompt", bounds=_TOKENS)
REQUEST_GENERATION: Final = _histogram("request_generation_tokens", "Tokens of an answer", bounds=_TOKENS)
PARAMS_N: Final = _histogram("request_params_n", "Samples that a request asks for", bounds=_SAMPLES)
PARAMS_MAX_TOKENS: Final = _histogram(
    "request_params_max_tokens", "Tokens that a request asks for at most", bounds=_TOKENS
)

FROM_ENGINE: Final = {
    PROMPT_TOKENS: "num_prompt_tokens",
    GENERATION_TOKENS: "num_generated_tokens",
    CACHED_TOKENS: "num_cached_tokens",
    PREFIX_QUERIES: "num_prefix_queries",
    PREFIX_HITS: "num_cached_tokens",
    PREEMPTIONS: "num_preemptions",
    DRAFTED: "num_drafted_tokens",
    ACCEPTED: "num_accepted_tokens",
    STEPS: "num_steps",
    RESTARTS: "num_restarts",
}
"""Counters of the engine's process, and the fields of `EngineStats` that they add up."""

HISTOGRAMS: Final = (
    FIRST_TOKEN_S, INTER_TOKEN_S, PER_TOKEN_S, E2E_S, QUEUE_S, PREFILL_S, DECODE_S, INFERENCE_S, REQUEST_PROMPT,
    REQUEST_GENERATION, PARAMS_N, PARAMS_MAX_TOKENS,
)  # fmt: skip
COUNTED_BY_LABEL: Final = (SUCCESSES, REJECTIONS, HTTP_REQUESTS)
