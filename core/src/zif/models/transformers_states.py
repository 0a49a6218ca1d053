"""Recurrent layers of transformers models, run request by request over states that zif keeps.

A recurrent mixer (convolution, state space, delta rule) reads and writes its state through the cache object it is
given, and ignores where one request of a packed step ends and the next begins. So each mixer's forward method is
replaced: the call goes to a `MixerHandler`, such as `StepMixers`, which runs the original on one batch of requests
after the other, with a `RecurrentCache` that holds their states. The decoder itself runs without a cache, so attention
never sees one. `transformers_trace` records calls this way, `transformers_model` serves them. No architecture is named.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zif.contract import StateTensor
from zif.models.model import LayerStates, StateRows

_CACHE_PARAMETERS = ("cache_params", "past_key_values")


class RecurrentCache:
    """The states of one layer, in the words of transformers' cache; B requests, all with earlier states or all fresh.

    tensors: by name, each [B, *shape]; mixers also change them in place. What mixers may ask is here, no more: one
    that asks for something else fails when the model is traced.
    """

    def __init__(self, previous: Mapping[str, torch.Tensor] | None) -> None:
        self.tensors: dict[str, torch.Tensor] = dict(previous or {})
        self._has_previous = previous is not None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Say whether the requests began in an earlier step."""
        return self._has_previous

    def is_recording_past(self, layer_idx: int) -> bool:
        """Say that no history is kept beside the state."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of the convolution, [B, C, kernel], None for fresh requests."""
        return self.tensors[_name("conv", state_idx)] if self._has_previous else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the recurrent state, None for fresh requests."""
        return self.tensors[_name("recurrent", state_idx)] if self._has_previous else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> torch.Tensor:
        """Append the inputs [B, C, L] of this step; return what the convolution must see."""
        name = _name("conv", state_idx)
        if self._has_previous:
            seen = torch.cat((self.tensors[name], conv_states), dim=-1)
        else:
            seen = torch.nn.functional.pad(conv_states, (max(0, conv_kernel_size - conv_states.shape[-1]), 0))
        self.tensors[name] = seen[..., -conv_kernel_size:]
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        """Replace the recurrent state."""
        self.tensors[_name("recurrent", state_idx)] = recurrent_states
        return recurrent_states


def _name(kind: str, state_idx: int) -> str:
    return f"{kind}{state_idx}" if state_idx else kind


@dataclass(frozen=True, slots=True)
class MixerCall:
    """One call of a recurrent mixer. hidden: [1, T, C], packed. `options` are its other arguments.

    `run` is the mixer as transformers wrote it, on hidden states [B, L, C] of B requests and their states.
    """

    module: torch.nn.Module
    hidden: torch.Tensor
    options: dict[str, Any]
    run: Callable[[torch.Tensor, RecurrentCache], Any]

    @property
    def layer(self) -> int:
        """Return the index of the mixer's layer."""
        layer: int = self.module.layer_idx  # type: ignore[assignment]
        return layer


class MixerHandler(Protocol):
    """Serves the calls of one model's recurrent mixers."""

    def __call__(self, call: MixerCall) -> torch.Tensor:
        """Return the mixer's output [1, T, C]."""
        ...


def stateful_modules(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """List the modules that carry convolution or recurrent state from token to token, by what they are made of.

    Parts of a module that takes a cache belong to that module.
    """
    found: list[torch.nn.Module] = []
    parts: set[torch.nn.Module] = set()
    for module in decoder.modules():
        if module not in parts and _looks_stateful(module):
            found.append(module)
            parts.update(module.modules() if takes_cache(module) else ())
    return found


def _looks_stateful(module: torch.nn.Module) -> bool:
    has_convolution = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    return has_convolution or "A_log" in dict(module.named_parameters(recurse=False))


def takes_cache(module: torch.nn.Module) -> bool:
    """Say whether a stateful module keeps its state in a cache that it is handed."""
    parameters = inspect.signature(type(module).forward).parameters
    return isinstance(getattr(module, "layer_idx", None), int) and not parameters.keys().isdisjoint(_CACHE_PARAMETERS)


def attach_mixer_handler(decoder: torch.nn.Module, handler: MixerHandler) -> None:
    """Send the calls of all recurrent mixers under `decoder` to `handler`, instead of the one before."""
    for module in filter(takes_cache, stateful_modules(decoder)):
        if not hasattr(module, "zif_mixer_handler"):
            module.forward = _redirected(module)
        object.__setattr__(module, "zif_mixer_handler", handler)


def _redirected(module: torch.nn.Module) -> Callable[..., torch.Tensor]:
    original = module.forward
    signature = inspect.signature(original)
    hidden_name = next(iter(signature.parameters))
    cache_name = next(name for name in _CACHE_PARAMETERS if name in signature.parameters)
    rest = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    def run(hidden: torch.Tensor, cache: RecurrentCache) -> Any:
        return original(**{hidden_name: hidden, cache_name: cache})

    def forward(*inputs: Any, **keywords: Any) -> torch.Tensor:
        options = dict(signature.bind(*inputs, **keywords).arguments)
        for name in rest:
            options |= options.pop(name, {})
        hidden = options.pop(hidden_name)
        options.pop(cache_name, None)
        handler: MixerHandler = module.zif_mixer_handler  # type: ignore[assignment]
        return handler(MixerCall(module, hidden, options, run))

    return forward


class StepMixers:
    """Runs a model's recurrent mixers over the runner's states of the current step.

    `token_by_token`: layers that cannot go on from a state with more than one token at once.
    """

    def __init__(self) -> None:
        self.token_by_token: frozenset[int] = frozenset()
        self._states: LayerStates | None = None

    @contextlib.contextmanager
    def bound_to(self, states: LayerStates | None) -> Iterator[None]:
        """Serve the calls inside the block with `states`."""
        self._states = states
        try:
            yield
        finally:
            self._states = None

    def __call__(self, call: MixerCall) -> torch.Tensor:
        assert self._states is not None, "a recurrent layer without states"
        output: torch.Tensor | None = None
        for index, rows in enumerate(self._states.rows):
            cache = RecurrentCache(None if rows.fresh else self._states.read(call.layer, index))
            num_tokens = rows.tokens.shape[1]
            width = 1 if call.layer in self.token_by_token and not rows.fresh else num_tokens
            for first in range(0, num_tokens, width):
                tokens = rows.tokens[:, first : first + width]
                part = call.run(call.hidden[0, tokens], cache)
                output = torch.empty_like(call.hidden, dtype=part.dtype) if output is None else output
                output[0, tokens] = part
            self._states.write(call.layer, index, cache.tensors)
        assert output is not None, "a step without requests"
        return output


class ResumeProbe:
    """Finds the mixers that forget an earlier state when they are given several tokens at once.

    Each tensor of the state becomes NaN in turn: one that leaves no NaN in the output was not looked at. `states` are
    the tensors of each layer.
    """

    def __init__(self, states: Mapping[int, Sequence[StateTensor]]) -> None:
        self.forgetful: set[int] = set()
        self._states = states

    def __call__(self, call: MixerCall) -> torch.Tensor:
        names = [tensor.name for tensor in self._states[call.layer]]
        if not all(self._reaches_output(name, call) for name in names):
            self.forgetful.add(call.layer)
        return torch.zeros_like(call.hidden)

    def _reaches_output(self, poisoned: str, call: MixerCall) -> bool:
        previous = {
            tensor.name: torch.full(
                (1, *tensor.shape),
                torch.nan if tensor.name == poisoned else 0.0,
                dtype=getattr(torch, tensor.dtype),
                device=call.hidden.device,
            )
            for tensor in self._states[call.layer]
        }
        output = call.run(torch.zeros_like(call.hidden), RecurrentCache(previous))
        return bool(output.isnan().any())


class RequestPerToken:
    """Implements `LayerStates` for fresh requests of one token each, whose states nobody needs. tokens: [T]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._rows = (StateRows(tokens[:, None], fresh=True),)

    @property
    def rows(self) -> Sequence[StateRows]:
        return self._rows

    def read(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        raise AssertionError(f"layer {layer} reads the state of a fresh request")

    def write(self, layer: int, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Drop the states."""
