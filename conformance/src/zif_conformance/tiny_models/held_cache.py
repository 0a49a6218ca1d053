"""A cache of Transformers whose keys and values are what a cache of another dtype holds. Called by `truth`."""

from typing import Any

import torch
from transformers import DynamicCache

from zif_conformance.oracle.codes import held


class HeldCache(DynamicCache):  # type: ignore[misc]
    """An empty cache for a model of `config`; its states, other than keys and values, are as they are."""

    def __init__(self, config: Any, kv_dtype: str) -> None:
        super().__init__(config=config)
        self._kv_dtype = kv_dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep keys and values, [1, K, T, D], rounded; returns all that attention sees of the layer."""
        key, value = (held(states, self._kv_dtype, states.dtype) for states in (key_states, value_states))
        return super().update(key, value, *args, **kwargs)
