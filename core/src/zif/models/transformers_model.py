"""A transformers model with its weights in zif's memory, behind the interface of the torch runner.

Loading goes through host memory: transformers reads the checkpoint there, and tensor by tensor moves into buffers of
the device's allocator, so the device never holds more than the ledger says. Used through `transformers_backend`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from zif.contract import (
    Allocator,
    AttentionParams,
    ModelDescription,
    Progress,
    RecurrentStateSpec,
    SlidingWindowSpec,
    StateTensor,
)
from zif.errors import CheckpointError, UnknownArchitectureError
from zif.models.checkpoint import open_checkpoint
from zif.models.checksums import verify_files
from zif.models.model import LayerAttention, LayerStates, Model, RecurrentModel
from zif.models.transformers_attention import ATTENTION, AttentionCall, attach_handler, register
from zif.models.transformers_parts import SplitModel, find_decoder_path
from zif.models.transformers_states import RequestPerToken, ResumeProbe, StepMixers, attach_mixer_handler

WEIGHTS_TAG = "weights"
_PROBED_TOKENS = 5
_POISONED_TOKEN = 2
_MAX_NAMED_TENSORS = 8


class TransformersModel(RecurrentModel):
    """A causal language model of transformers whose two halves the runner calls one after the other."""

    def __init__(self, parts: SplitModel, description: ModelDescription) -> None:
        self._parts = parts
        self._attention = _StepAttention(description)
        self._mixers = StepMixers()
        attach_handler(parts.decoder, self._attention)
        attach_mixer_handler(parts.decoder, self._mixers)

    @torch.no_grad()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attend: LayerAttention,
        states: LayerStates | None = None,
    ) -> torch.Tensor:
        with self._attention.bound_to(attend), self._mixers.bound_to(states):
            return self._parts.hidden(token_ids[None], positions[None])[0]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._parts.logits(hidden[None])[0]

    def mixes_tokens(self, array_device: str) -> bool:
        """Say whether tokens meet outside attention and state (by token shift, shared statistics).

        One token's embedding becomes NaN, attention gives zeros, and for recurrent layers each token is a request of
        its own: a NaN in another token's row came some other way, or passed from one request to another.
        """
        embedding: torch.nn.Module = self._parts.decoder.get_input_embeddings()  # type: ignore[operator]
        hook = embedding.register_forward_hook(_poison)
        try:
            ids = torch.zeros(_PROBED_TOKENS, dtype=torch.int64, device=array_device)
            positions = torch.arange(_PROBED_TOKENS, device=array_device)
            hidden = self.forward(ids, positions, _attend_to_nothing, RequestPerToken(positions))
        finally:
            hook.remove()
        reached: list[int] = hidden.isnan().any(dim=-1).nonzero().flatten().tolist()
        return reached != [_POISONED_TOKEN]

    def learn_mixers(self, states: Mapping[int, Sequence[StateTensor]], array_device: str) -> None:
        """Find out which recurrent layers, with `states` as tensors, must go on from a state token by token."""
        probe = ResumeProbe(states)
        ids = torch.zeros(_PROBED_TOKENS, dtype=torch.int64, device=array_device)
        attach_mixer_handler(self._parts.decoder, probe)
        self.forward(ids, torch.arange(_PROBED_TOKENS, device=array_device), _attend_to_nothing)
        attach_mixer_handler(self._parts.decoder, self._mixers)
        self._mixers.token_by_token = frozenset(probe.forgetful)


def _poison(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.index_fill(1, torch.tensor([_POISONED_TOKEN], device=output.device), torch.nan)


def _attend_to_nothing(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    return torch.zeros_like(query)


class _StepAttention:
    """Translates attention calls of the model's layers to the runner's attention of the current step."""

    def __init__(self, description: ModelDescription) -> None:
        self._attend: LayerAttention | None = None
        self._windows = {
            layer: spec.window
            for spec in description.kv_specs
            if isinstance(spec, SlidingWindowSpec)
            for layer in (*spec.layers, *(reader for reader, _ in spec.readers))
        }

    @contextlib.contextmanager
    def bound_to(self, attend: LayerAttention) -> Iterator[None]:
        """Serve the calls inside the block with `attend`."""
        self._attend = attend
        try:
            yield
        finally:
            self._attend = None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert self._attend is not None, "attention outside of TransformersModel.forward"
        layer: int = call.module.layer_idx  # type: ignore[assignment]
        key_size, value_size = call.key.shape[-1], call.value.shape[-1]
        scaling = call.options.get("scaling")
        params = AttentionParams(
            scale=key_size**-0.5 if scaling is None else float(scaling),
            window=self._windows.get(layer),
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux"),
        )
        size = max(key_size, value_size)
        query, key, value = (_rows(heads, size) for heads in (call.query, call.key, call.value))
        return self._attend(layer, query, key, value, params)[None, ..., :value_size]


def _rows(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder [1, H, T, D] to [T, H, size]; zeros behind the head's elements change no score and no weighted sum.

    Attention is promised that heads and elements are adjacent; tokens may be apart.
    """
    rows = heads[0].transpose(0, 1)
    if rows.shape[-1] < size:
        rows = torch.nn.functional.pad(rows, (0, size - rows.shape[-1]))
    return rows if rows.stride()[1:] == (size, 1) else rows.contiguous()


def load_transformers_model(
    model: ModelDescription, allocator: Allocator[torch.Tensor], array_device: str, progress: Progress
) -> Model:
    """Read the checkpoint into `allocator` (tag "weights") and return the model.

    Raises `CheckpointError` when files are corrupt or tensors are missing, superfluous or of another shape,
    `OutOfMemoryError` at the allocator's limit, and `UnknownArchitectureError` when the model turns out to mix tokens
    outside attention.
    """
    verify_files({tensor.file for tensor in open_checkpoint(model.path).tensors.values()})
    module = _read_checkpoint(model)
    path = find_decoder_path(module)
    assert path is not None, "describe() refuses models whose decoder cannot be told from the head"
    parts = SplitModel(module.eval(), path)
    _move_weights(parts, allocator, progress)
    loaded = TransformersModel(parts, model)
    if loaded.mixes_tokens(array_device):
        raise UnknownArchitectureError(
            f"architecture {model.architecture!r} cannot be served through the transformers backend: its tokens affect "
            "each other outside attention, so requests in one step would too; it needs a native decoder"
        )
    loaded.learn_mixers(_state_tensors(model), array_device)
    return loaded


def _state_tensors(model: ModelDescription) -> dict[int, tuple[StateTensor, ...]]:
    specs = [spec for spec in model.kv_specs if isinstance(spec, RecurrentStateSpec)]
    return {layer: spec.tensors for spec in specs for layer in spec.layers}


def _read_checkpoint(model: ModelDescription) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    register()
    try:
        with _without_progress_bar():
            module, report = AutoModelForCausalLM.from_pretrained(
                model.path,
                dtype=getattr(torch, model.dtype),
                attn_implementation=ATTENTION,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names all of them
            )
    except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot read the checkpoint in {str(model.path)!r}: {error}; download its files again"
        ) from error
    _check_report(report, model)
    return module  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing; zif reports progress itself."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _check_report(report: dict[str, Any], model: ModelDescription) -> None:
    shapes = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    faults = {
        "missing tensors": report["missing_keys"],
        "tensors that the model does not have": report["unexpected_keys"],
        "tensors of another shape": shapes,
        "errors": report["error_msgs"],
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in faults.items() if names]
    if found:
        raise CheckpointError(
            f"the checkpoint in {str(model.path)!r} does not fit {model.architecture!r}: {'; '.join(found)}; "
            "check that config.json and the weights belong together"
        )


def _some(names: Any) -> str:
    ordered = sorted(str(name) for name in names)
    more = f" and {len(ordered) - _MAX_NAMED_TENSORS} more" if len(ordered) > _MAX_NAMED_TENSORS else ""
    return ", ".join(ordered[:_MAX_NAMED_TENSORS]) + more


def _move_weights(module: torch.nn.Module, allocator: Allocator[torch.Tensor], progress: Progress) -> None:
    """Move each parameter and buffer of `module` into memory of `allocator`; tied ones stay tied."""
    users = _users_of_tensors(module)
    total = sum(tensor.nbytes for tensor, _ in users)
    done = 0
    progress(0, total)
    while users:
        tensor, places = users.pop()
        moved = _move(tensor, allocator)
        for owner, name in places:
            setattr(owner, name, moved)
        done += tensor.nbytes
        progress(done, total)


_Places = list[tuple[torch.nn.Module, str]]


def _users_of_tensors(module: torch.nn.Module) -> list[tuple[torch.Tensor, _Places]]:
    """List every distinct tensor with the places that hold it."""
    users: dict[int, tuple[torch.Tensor, _Places]] = {}
    for owner in module.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                users.setdefault(id(tensor), (tensor, []))[1].append((owner, name))
    return list(users.values())


def _move(tensor: torch.Tensor, allocator: Allocator[torch.Tensor]) -> torch.Tensor:
    moved = tensor.detach()
    if tensor.numel():
        array = allocator.allocate(tensor.nbytes, WEIGHTS_TAG).array
        moved = array.view(tensor.dtype).view(tensor.shape).copy_(moved)
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved
