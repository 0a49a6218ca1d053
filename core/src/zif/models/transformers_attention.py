"""The door between models of the transformers package and zif's attention.

A model built with `attn_implementation=ATTENTION` asks transformers' attention registry for our function on every
layer; the function hands the call to the `AttentionHandler` that was attached to the layer's module. What the handler
does is not decided here: `transformers_trace` records the call, `transformers_backend` runs it over paged KV.
No mask is built under ATTENTION. Under TRACED_ATTENTION a mask is a stand-in that says how it would have been made.
TRACED_EXPERTS are experts that compute nothing, for tensors without data, where no token can be sent to its experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

ATTENTION = "zif"
TRACED_ATTENTION = "zif-trace"
TRACED_EXPERTS = "zif-trace"

MaskFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Says whether a query sees a key, given index tensors (batch, head, query, key)."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention registry.

    query: [1, H, T, D], key: [1, K, T, D], value: [1, K, T, V]. `options` are the keyword arguments of the model.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]


class AttentionHandler(Protocol):
    """Serves the attention calls of one model."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """Return the attention output [1, T, H, V]."""
        ...


def register() -> None:
    """Make ATTENTION, TRACED_ATTENTION and TRACED_EXPERTS known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionInterface.register(TRACED_ATTENTION, _attention_forward)
    AttentionMaskInterface.register(TRACED_ATTENTION, _describe_mask)
    ExpertsInterface.register(TRACED_EXPERTS, _hold_expert_activations)


def attach_handler(decoder: torch.nn.Module, handler: AttentionHandler) -> None:
    """Send the attention calls of all modules under `decoder` to `handler`.

    The handler travels on the module because that is the one argument that every architecture passes to the registry;
    keyword arguments of the forward pass get lost in some.
    """
    for module in decoder.modules():
        object.__setattr__(module, "zif_attention_handler", handler)


def mask_function_of(mask: torch.Tensor) -> MaskFunction | None:
    """Return how a mask of TRACED_ATTENTION would have been made, or None when the model made or changed it itself."""
    return getattr(mask, "zif_mask_function", None)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    handler: AttentionHandler = module.zif_attention_handler  # type: ignore[assignment]
    return handler(AttentionCall(module, query, key, value, attention_mask, options)), None


def _describe_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, **_options: Any
) -> torch.Tensor:
    mask = torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device="meta")
    mask.zif_mask_function = mask_function  # type: ignore[attr-defined]
    return mask


def _hold_expert_activations(
    module: torch.nn.Module, hidden_states: torch.Tensor, expert_ids: torch.Tensor, *_routing: torch.Tensor
) -> torch.Tensor:
    """Hold what experts hold at once: for each chosen expert its input, its inner channels (gate and up, their bias,
    what the gate makes of them), its output, and the output weighted."""
    num_channels = hidden_states.shape[-1]
    matrices = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    width = max((p.numel() // (p.shape[0] * num_channels) for p in matrices), default=num_channels)
    sizes = (num_channels, width, width, width, num_channels, num_channels)
    held = [hidden_states.new_empty((expert_ids.numel(), size)) for size in sizes]
    return held[-1].new_empty(hidden_states.shape)
