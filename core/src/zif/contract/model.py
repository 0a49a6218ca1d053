"""The model as planning sees it: known from its configuration and its file headers, before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zif.contract.capabilities import Feature
from zif.contract.kv import KVSpec


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model needs of a platform.

    `implementation` is "native" or "transformers". `config` is the checkpoint's `config.json`, read only.
    `weight_bytes` counts the weights as held: in `dtype`, or in the schemes that `weight_schemes` names, in the order
    of first use. `quantization` is what loading rounds weights to ("int8", "int4"), None where they stay as stored.
    `token_activation_bytes` estimates the peak working memory per token of a step, `sample_activation_bytes` the
    working memory per sampled row (logits; states in transit, where layers keep them).
    """

    path: Path
    architecture: str
    implementation: str
    config: dict[str, Any]
    dtype: str
    vocab_size: int
    max_model_len: int
    kv_specs: tuple[KVSpec, ...]
    features: frozenset[Feature]
    weight_bytes: int
    token_activation_bytes: int
    sample_activation_bytes: int
    trust_remote_code: bool = False
    quantization: str | None = None
    weight_schemes: tuple[str, ...] = ()
