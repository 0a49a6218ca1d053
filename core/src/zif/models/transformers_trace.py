"""What a transformers model asks of attention and state, learnt by running it once on tensors without data.

Not a list of architectures: the model stands on torch's meta device, and its own forward pass says which layers
attend, with which heads, scale and window, and which carry which state. What zif cannot do is refused here. Called by
`transformers_backend.describe`; no weight is read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from zif.contract import StateTensor
from zif.errors import UnknownArchitectureError
from zif.models.transformers_attention import AttentionCall, MaskFunction, attach_handler, mask_function_of
from zif.models.transformers_parts import SplitModel
from zif.models.transformers_states import (
    MixerCall,
    RecurrentCache,
    attach_mixer_handler,
    stateful_modules,
    takes_cache,
)

TRACED_TOKENS = 8
MAX_HORIZON = 1 << 20  # masks are looked at over this many positions at most: a few MiB of booleans

# What models pass to the attention registry besides what this module reads, without a say in the result.
_NEUTRAL_OPTIONS = frozenset(
    {
        "cache_position",
        "dropout",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
_KNOWN_OPTIONS = _NEUTRAL_OPTIONS | {"is_causal", "s_aux", "scaling", "sliding_window", "softcap"}
_NEUTRAL_MIXER_OPTIONS = _NEUTRAL_OPTIONS | {"attention_mask"}  # of padding, and a step has none
_FEED_FORWARD_TYPES = frozenset({"mlp", "moe"})  # configured types of layers in which no tokens meet


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """What one layer asks of attention. `window` None means all earlier tokens; `head_dim` is the larger of K and V.

    `owner` is the earlier layer whose keys and values this one reads, if it makes none of its own.
    """

    layer: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    has_softcap: bool
    has_sinks: bool
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class TracedState:
    """The state that one layer carries from token to token, per request."""

    layer: int
    tensors: tuple[StateTensor, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run showed. Activation bytes are the most that lived at once, per token and per row of logits.

    A layer may both attend and carry a state.
    """

    layers: tuple[TracedLayer, ...]
    states: tuple[TracedState, ...]
    num_logits: int
    token_activation_bytes: int
    sample_activation_bytes: int


@dataclass(frozen=True, slots=True)
class TracedConfig:
    """What the trace needs to know of the configuration. A window of `horizon` tokens or more is no window."""

    architecture: str
    num_layers: int
    layer_types: tuple[str, ...]
    horizon: int

    def refuse(self, reason: str) -> UnknownArchitectureError:
        """Build the error that says why the architecture cannot be served."""
        return UnknownArchitectureError(
            f"architecture {self.architecture!r} cannot be served through the transformers backend: {reason}; "
            "it needs a native decoder, or serve another model"
        )

    def type_of(self, layer: int) -> str:
        """Name the configured type of a layer, as an addition to a sentence."""
        return f" (type {self.layer_types[layer]!r})" if layer < len(self.layer_types) else ""


@torch.no_grad()
def trace(model: SplitModel, config: TracedConfig) -> Trace:
    """Run `model`, which stands on the meta device, and report what it asked for. Raises `UnknownArchitectureError`."""
    _refuse_other_state(model.decoder, config)
    recorder = _AttentionRecorder(config)
    attach_handler(model.decoder, recorder)
    state_recorder = _StateRecorder(config)
    attach_mixer_handler(model.decoder, state_recorder)
    with _PeakBytes(model) as activations:
        hidden = _run_decoder(model, config)
    seen = {attending.layer for attending in recorder.layers} | {carrying.layer for carrying in state_recorder.layers}
    _refuse_missing_layers(seen, config)
    with _PeakBytes(model) as head_activations:
        logits = model.logits(hidden)
    return Trace(
        layers=tuple(recorder.layers),
        states=tuple(state_recorder.layers),
        num_logits=logits.shape[-1],
        token_activation_bytes=-(-activations.peak_bytes // TRACED_TOKENS),
        sample_activation_bytes=-(-head_activations.peak_bytes // TRACED_TOKENS),
    )


def _run_decoder(model: SplitModel, config: TracedConfig) -> torch.Tensor:
    ids = torch.zeros((1, TRACED_TOKENS), dtype=torch.int64, device="meta")
    try:
        # The mask of ones keeps transformers from looking for packed sequences in positions that have no data. It has
        # data itself: recurrent layers look whether it says anything.
        return model.hidden(ids, ids, attention_mask=torch.ones(ids.shape, dtype=torch.int64))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        types = sorted(set(config.layer_types))
        raise config.refuse(
            "its forward pass cannot be followed without weights "
            f"(layer types {types}; {type(error).__name__}: {error})"
        ) from error


def _refuse_other_state(decoder: torch.nn.Module, config: TracedConfig) -> None:
    """Refuse layers whose state from token to token is not kept in a cache that they are handed."""
    names = {type(module).__name__ for module in stateful_modules(decoder) if not takes_cache(module)}
    if names:
        types = sorted(set(config.layer_types) - {"full_attention", "sliding_attention"})
        detail = f" (layer types {types})" if types else ""
        raise config.refuse(
            f"it keeps other state than attention's keys and values, in {', '.join(sorted(names))}{detail}"
        )


def _refuse_missing_layers(seen: set[int], config: TracedConfig) -> None:
    feed_forward = {i for i, name in enumerate(config.layer_types) if name in _FEED_FORWARD_TYPES}
    missing = [layer for layer in range(config.num_layers) if layer not in seen | feed_forward]
    if missing:
        raise config.refuse(
            f"{len(missing)} of {config.num_layers} layers do not go through transformers' attention interface, "
            f"the first is layer {missing[0]}{config.type_of(missing[0])}"
        )
    if len(seen) > config.num_layers:
        raise config.refuse(f"{len(seen)} layers attend where the configuration has {config.num_layers}")


class _StateRecorder:
    """Notes which state each recurrent mixer leaves in its cache."""

    def __init__(self, config: TracedConfig) -> None:
        self.layers: list[TracedState] = []
        self._config = config

    def __call__(self, call: MixerCall) -> torch.Tensor:
        layer, name = call.layer, type(call.module).__name__
        unknown = sorted(k for k, v in call.options.items() if v is not None and k not in _NEUTRAL_MIXER_OPTIONS)
        if unknown:
            raise self._config.refuse(f"layer {layer} passes {', '.join(unknown)} to {name}, unknown to zif")
        if any(layer == traced.layer for traced in self.layers):
            raise self._config.refuse(f"{name} runs more than once as layer {layer}")
        cache = RecurrentCache(None)
        output = call.run(call.hidden, cache)
        if not cache.tensors or not isinstance(output, torch.Tensor) or output.shape != call.hidden.shape:
            raise self._config.refuse(f"{name} of layer {layer} does not keep its state in the cache it is handed")
        self.layers.append(TracedState(layer, _state_tensors(cache)))
        return output


def _state_tensors(cache: RecurrentCache) -> tuple[StateTensor, ...]:
    return tuple(
        StateTensor(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in sorted(cache.tensors.items())
    )


class _AttentionRecorder:
    """Notes what each layer asks for, and refuses what zif's attention does not do."""

    def __init__(self, config: TracedConfig) -> None:
        self.layers: list[TracedLayer] = []
        self._config = config
        self._owners = WeakTensorKeyDictionary()
        self._windows: dict[tuple[MaskFunction, int], int | None] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        layer = self._layer_of(call)
        self._refuse_options(call, layer)
        self._refuse_shapes(call, layer)
        self.layers.append(
            TracedLayer(
                layer=layer,
                num_kv_heads=call.key.shape[1],
                head_dim=max(call.key.shape[-1], call.value.shape[-1]),
                window=self._window(call, layer),
                has_softcap=call.options.get("softcap") is not None,
                has_sinks=call.options.get("s_aux") is not None,
                owner=self._owner_of(call),
            )
        )
        self._refuse_other_window(self.layers[-1])
        if self.layers[-1].owner is None:
            self._owners[call.key] = layer
        _, num_heads, num_tokens, _ = call.query.shape
        return call.query.new_empty((1, num_tokens, num_heads, call.value.shape[-1]))

    def _layer_of(self, call: AttentionCall) -> int:
        layer = getattr(call.module, "layer_idx", None)
        name = type(call.module).__name__
        if not isinstance(layer, int):
            raise self._config.refuse(f"{name} does not say which layer it is")
        if any(layer == traced.layer for traced in self.layers):
            raise self._config.refuse(f"{name} attends more than once as layer {layer}")
        return layer

    def _refuse_options(self, call: AttentionCall, layer: int) -> None:
        unknown = sorted(k for k, v in call.options.items() if v is not None and k not in _KNOWN_OPTIONS)
        if unknown:
            raise self._config.refuse(f"layer {layer} passes {', '.join(unknown)} to attention, unknown to zif")
        sinks = call.options.get("s_aux")
        if sinks is not None and sinks.numel() != call.query.shape[1]:
            raise self._config.refuse(f"layer {layer} has {sinks.numel()} sinks for {call.query.shape[1]} heads")

    def _refuse_shapes(self, call: AttentionCall, layer: int) -> None:
        num_tokens = call.query.shape[2]
        if call.key.shape[2] != num_tokens or call.value.shape[2] != num_tokens or num_tokens != TRACED_TOKENS:
            raise self._config.refuse(
                f"layer {layer} attends with {num_tokens} queries to {call.key.shape[2]} keys for "
                f"{TRACED_TOKENS} tokens"
            )
        if call.query.shape[1] % call.key.shape[1] or call.value.shape[1] != call.key.shape[1]:
            raise self._config.refuse(
                f"layer {layer} has {call.query.shape[1]} query, {call.key.shape[1]} key and {call.value.shape[1]} "
                "value heads"
            )

    def _owner_of(self, call: AttentionCall) -> int | None:
        """Return the earlier layer that made these keys, None when they are the layer's own."""
        owner: int | None = self._owners.get(call.key)  # type: ignore[no-untyped-call]
        return owner

    def _refuse_other_window(self, reader: TracedLayer) -> None:
        for owner in self.layers:
            if owner.layer == reader.owner and owner.window != reader.window:
                raise self._config.refuse(
                    f"layer {reader.layer} reads the keys of layer {owner.layer} through a window of {reader.window} "
                    f"tokens, which keeps {owner.window}"
                )

    def _window(self, call: AttentionCall, layer: int) -> int | None:
        """Return the window that the mask would have: the mask is what transformers' own attention goes by."""
        asked: int | None = call.options.get("sliding_window")
        if call.mask is None:
            causal = call.options.get("is_causal")
            if not (getattr(call.module, "is_causal", True) if causal is None else causal):
                raise self._config.refuse(f"layer {layer} attends to later tokens: its attention is not causal")
            return asked
        mask_function = mask_function_of(call.mask)
        if mask_function is None:
            raise self._config.refuse(f"layer {layer}{self._config.type_of(layer)} makes an attention mask of its own")
        horizon = min(max(self._config.horizon, 2 * (asked or 0)), MAX_HORIZON) + 2
        window = self._mask_window(mask_function, horizon)
        if window is None:
            raise self._config.refuse(
                f"the mask of layer {layer}{self._config.type_of(layer)} is neither causal nor a sliding window"
            )
        return window if window < horizon else None

    def _mask_window(self, mask_function: MaskFunction, horizon: int) -> int | None:
        """Look at each mask once: most layers share one."""
        key = (mask_function, horizon)
        if key not in self._windows:
            self._windows[key] = causal_window(mask_function, horizon)
        return self._windows[key]


def causal_window(mask_function: MaskFunction, horizon: int) -> int | None:
    """Return W when each query before `horizon` sees exactly the W tokens up to its own, None for any other mask.

    W is `horizon` when every earlier token is seen.
    """
    keys = torch.arange(horizon)
    try:
        window = int(_visible_keys(mask_function, horizon - 1, keys).sum())
        queries = {0, 1, window - 1, window, window + 1, horizon // 3, horizon // 2, horizon - 1}
        for query in sorted(q for q in queries if 0 <= q < horizon):
            expected = (keys <= query) & (keys > query - window)
            if not torch.equal(_visible_keys(mask_function, query, keys), expected):
                return None
    except (IndexError, RuntimeError):  # the mask depends on data of the step
        return None
    return window


def _visible_keys(mask_function: MaskFunction, query: int, keys: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return mask_function(zero, zero, torch.tensor(query), keys).expand(keys.shape).bool()


class _PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures the most bytes that results of operations held at once. The weights of `model` do not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        expired = [key for key, (reference, _) in self._live.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in expired:
            del self._live[key]
        if storage._cdata not in self._weights:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._live[storage._cdata] = (reference, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._live.values()))
