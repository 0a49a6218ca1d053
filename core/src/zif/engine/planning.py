"""From settings to a plan: which model, on which platform, with which memory.

Nothing is loaded here and no device opened. Called by `LLM` and by `zif explain`.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from zif.contract import (
    AttentionSpec,
    EngineConfig,
    Feature,
    KVArena,
    ModelDescription,
    Plan,
    Platform,
    Refusal,
    Workload,
    slab_arena,
)
from zif.errors import PlanRefusedError
from zif.models.description import ModelSource, describe_model
from zif.plugins import PlatformRegistry
from zif.settings import EngineSettings, parse_tenant_percent, parse_tenant_weights

DEFAULT_BLOCK_SIZE = 16
DEFAULT_DRAFT_TOKENS = 4
DEFAULT_HOST_KV_BYTES_PER_S = 8 * 10**9
"""Pageable memory over a PCIe 4 link of 16 lanes gets about this."""
DEFAULT_PREFILL_TOKENS_PER_S = 2000
MIN_FITTED_TOKENS = 64
"""When the context is fitted to memory, anything shorter than this is refused instead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """Everything that is decided before weights load. `notes` says what was fitted to memory."""

    model: ModelDescription
    platform: Platform
    plan: Plan
    arena: KVArena
    config: EngineConfig
    registry: PlatformRegistry
    notes: tuple[str, ...] = ()


def plan_model(settings: EngineSettings, registry: PlatformRegistry | None = None) -> PlannedModel:
    """Describe the model, choose the platform and ask it for a plan.

    Without a `max_model_len` in the settings the model's own is used, shortened to what KV memory holds if need be.
    Raises `ModelError`, `ConfigError`, `PlatformError`; `PlanRefusedError` lists every reason.
    """
    registry = registry or PlatformRegistry.discover()
    platform = registry.select(settings.platform)
    model = describe_model(_model_source(settings))
    notes: tuple[str, ...] = ()
    answer = platform.plan(_workload(settings, model, model.max_model_len))
    if isinstance(answer, Refusal) and settings.max_model_len is None:
        fitted = _fit_context(settings, model, platform)
        if fitted:
            notes = (
                f"max_model_len is {fitted} instead of the model's {model.max_model_len}: KV memory holds no more",
            )
            model = replace(model, max_model_len=fitted)
            answer = platform.plan(_workload(settings, model, fitted))
    if isinstance(answer, Refusal):
        raise PlanRefusedError(_refusal_text(answer))
    arena = slab_arena(answer.memory.kv_bytes, answer.kv_groups)
    return PlannedModel(model, platform, answer, arena, _engine_config(settings, model), registry, notes)


def _model_source(settings: EngineSettings) -> ModelSource:
    return ModelSource(
        path=Path(settings.model),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size or DEFAULT_BLOCK_SIZE,
        kv_dtype=settings.kv_cache_dtype,
        implementation=cast("Literal['auto', 'native', 'transformers']", settings.model_impl),
        trust_remote_code=settings.trust_remote_code,
        quantization=settings.quantization,
    )


def _workload(settings: EngineSettings, model: ModelDescription, max_model_len: int) -> Workload:
    max_tokens = settings.max_num_batched_tokens
    max_samples = min(settings.max_num_seqs * (1 + _max_draft_tokens(settings)), max_tokens)
    activations = model.token_activation_bytes * max_tokens + model.sample_activation_bytes * max_samples
    return Workload(
        dtype=model.dtype,
        kv_specs=model.kv_specs,
        head_sizes=tuple(sorted({spec.head_dim for spec in model.kv_specs if isinstance(spec, AttentionSpec)})),
        features=model.features | ({Feature.PREFIX_CACHING} if settings.enable_prefix_caching else set()),
        weight_bytes=model.weight_bytes,
        activation_bytes=activations,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max_tokens,
        kv_bytes=settings.kv_bytes,
        memory_limit_bytes=settings.memory_limit,
        tensor_parallel_size=settings.tensor_parallel_size,
        batch_invariant=settings.batch_invariant,
    )


def _fit_context(settings: EngineSettings, model: ModelDescription, platform: Platform) -> int:
    """Return the longest context that the platform accepts, 0 if even a short one is refused. Plans are cheap."""
    low, high = 0, model.max_model_len - 1
    if isinstance(platform.plan(_workload(settings, model, min(MIN_FITTED_TOKENS, high))), Refusal):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        refused = isinstance(platform.plan(_workload(settings, model, middle)), Refusal)
        low, high = (low, middle - 1) if refused else (middle, high)
    return low


def _engine_config(settings: EngineSettings, model: ModelDescription) -> EngineConfig:
    return EngineConfig(
        max_model_len=model.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=settings.enable_prefix_caching,
        scheduling_policy=settings.scheduling_policy,
        seed=settings.seed,
        max_partial_prefills=settings.max_partial_prefills,
        max_prefill_chunk=settings.max_prefill_chunk,
        max_bypasses=settings.max_bypasses,
        expected_output_percent=settings.expected_output_percent,
        tenant_weights=parse_tenant_weights(settings.tenant_weights),
        tenant_cache_percent=parse_tenant_percent(settings.tenant_cache_percent),
        speculation=settings.speculation,
        max_draft_tokens=_max_draft_tokens(settings),
        host_kv_bytes=settings.host_kv_bytes,
        disk_kv_bytes=settings.disk_kv_bytes,
        disk_kv_path=settings.disk_kv_path,
        host_kv_bytes_per_s=settings.host_kv_bytes_per_s or DEFAULT_HOST_KV_BYTES_PER_S,
        prefill_tokens_per_s=settings.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S,
    )


def _max_draft_tokens(settings: EngineSettings) -> int:
    if settings.speculation == "off":
        return 0
    return settings.max_draft_tokens or DEFAULT_DRAFT_TOKENS


def _refusal_text(refusal: Refusal) -> str:
    reasons = "".join(f"\n  - {reason}" for reason in refusal.reasons)
    return f"platform {refusal.platform!r} cannot run this model:{reasons}"
