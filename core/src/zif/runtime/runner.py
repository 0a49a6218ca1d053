"""Core's model runner for platforms that torch drives: load, batch, run, sample.

It uses a device only through the contract: allocator, attention, ops and graphs. A platform whose arrays are not torch
tensors brings its own runner through the hook `zif_model_runner`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from zif.contract import (
    AttentionBackend,
    AttentionParams,
    AttentionSpec,
    CompletedStep,
    Device,
    EngineConfig,
    KVArena,
    KVStore,
    ModelDescription,
    ModelRunner,
    Progress,
    RecurrentStateSpec,
    RequestStart,
    StepFuture,
    StepPlan,
    StepResult,
    TokenLogprobs,
    carry_out,
)
from zif.models.model import Model
from zif.runtime.batch import BatchState, StepBatch
from zif.runtime.blocks import ArenaBlocks
from zif.runtime.logprobs import prompt_logprobs
from zif.runtime.sampler import Sampler
from zif.runtime.states import StateMemory
from zif.runtime.verification import doubtful_requests, kept_positions, without_guesses

MAX_LOGIT_ELEMENTS = 1 << 24
"""Prompt log-probabilities are computed in pieces of at most this many logits, to bound memory."""


@dataclass(frozen=True, slots=True)
class _LayerCache:
    """Where a layer's KV lives: its group's index and the backend's view of it. Another layer's if `is_reader`."""

    group: int
    cache: Any
    is_reader: bool = False


class StepAttention:
    """Attention of every layer, bound to one step."""

    def __init__(
        self, backend: AttentionBackend[Any, Any], layers: dict[int, _LayerCache], prepared: Mapping[int, Any]
    ) -> None:
        self._backend = backend
        self._layers = layers
        self._prepared = prepared

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        home = self._layers[layer]
        prepared = self._prepared[home.group]
        if not home.is_reader:
            self._backend.write(key, value, home.cache, prepared)
        return self._backend.attend(query, home.cache, prepared, params)


class TorchRunner(ModelRunner):
    """Run one model on one device, a step at a time. How drafts are verified is in `zif.runtime.verification`."""

    def __init__(self, config: EngineConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._layers: dict[int, _LayerCache] = {}
        self._prompt_logprobs: dict[int, int] = {}
        self._vocab_size = 0
        self._model: Model
        self._run_layers: Callable[..., torch.Tensor]
        self._states = StateMemory()
        self._state: BatchState
        self._sampler: Sampler
        self._blocks: ArenaBlocks
        self._store: KVStore | None = None

    def load(self, model: ModelDescription, progress: Progress) -> None:
        self._model = _load_model(model, self._device, progress)
        self._run_layers = self._device.graphs.wrap(self._model.forward)
        self._vocab_size = model.vocab_size
        self._sampler = Sampler(self._config.max_num_seqs, model.vocab_size, self._device.array_device)

    def start(self, arena: KVArena) -> None:
        self._state = BatchState(self._config.max_num_seqs, arena.groups)
        if not arena.groups:
            return
        buffer = self._device.allocator.allocate(arena.num_bytes, "kv", alignment=4096)
        self._blocks = ArenaBlocks(arena, buffer.array)
        for index, group in enumerate(arena.groups):
            if isinstance(group.spec, RecurrentStateSpec):
                self._states.bind(arena, index, buffer.array)
                continue
            caches = self._device.attention.bind(arena, index, buffer.array)
            for layer, cache in zip(group.spec.layers, caches, strict=True):
                self._layers[layer] = _LayerCache(index, cache)
            if isinstance(group.spec, AttentionSpec):
                self._layers.update((r, replace(self._layers[o], is_reader=True)) for r, o in group.spec.readers)

    @property
    def verifies_drafts(self) -> bool:
        return True

    def attach_store(self, store: KVStore) -> bool:
        self._store = store
        return True

    @torch.inference_mode()
    def submit(self, step: StepPlan) -> StepFuture:
        self._apply(step)
        lost = self._copy_blocks(step)
        if not step.request_ids:
            return CompletedStep(StepResult(step.step, [], lost=lost))
        result = self._compute(step)
        result.lost = lost
        for request, request_id in enumerate(step.request_ids) if step.drafts else ():
            draft = step.drafts.get(request_id)
            if draft is not None and len(result.sampled[request]) > len(draft.token_ids):
                self._state.keep_states(step, request)
        return CompletedStep(result)

    def close(self) -> None:
        self._layers.clear()
        for name in ("_model", "_run_layers", "_state", "_states", "_sampler", "_blocks"):
            self.__dict__.pop(name, None)
        self._device.allocator.free_tag("kv")
        self._device.allocator.free_tag("weights")

    def _apply(self, step: StepPlan) -> None:
        """Bring the rows up to date with what the plan released, started and allocated."""
        for request_id in step.released:
            row = self._state.release(request_id)
            self._prompt_logprobs.pop(request_id, None)
            if row is not None:
                self._sampler.remove(row)
        for start in step.started:
            self._start(start)
        for update in step.block_updates:
            self._state.put_blocks(update.request_id, update.group, update.start, update.block_ids)

    def _copy_blocks(self, step: StepPlan) -> list[int]:
        """Make the copies that precede the step; return the handles of those that are lost."""
        if step.transfers is None:
            return []
        assert self._store is not None, "blocks are to be copied and no store is attached"
        return carry_out(step.transfers, self._store, self._blocks)

    def _start(self, start: RequestStart) -> None:
        self._sampler.add(self._state.start(start), start)
        if start.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[start.request_id] = start.sampling.prompt_logprobs

    def _compute(self, step: StepPlan) -> StepResult:
        """Run and sample the rows of a plan, whose other parts have been applied."""
        batch = self._state.batch(step)
        hidden = self._forward(batch)
        result = StepResult(step.step, [[] for _ in step.request_ids])
        doubtful = self._sample(step, batch, hidden, result) if len(batch.sample_requests) else []
        if self._prompt_logprobs:
            self._report_prompts(step, batch, hidden, result)
        if doubtful:
            again = self._compute(without_guesses(step, doubtful))
            for request, token_ids in zip(doubtful, again.sampled, strict=True):
                result.sampled[request] = token_ids
            result.logprobs.update(again.logprobs)
            result.faults.update(again.faults)
        return result

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        """Return the hidden states of the step's tokens, [T, C]."""
        prepared = {index: self._device.attention.prepare(group) for index, group in batch.attention.items()}
        attend = StepAttention(self._device.attention, self._layers, prepared)
        token_ids, positions = self._to_device(batch.token_ids), self._to_device(batch.positions)
        if not batch.states:
            return self._run_layers(token_ids, positions, attend)
        states = self._states.step(batch.states, self._device.array_device)
        return self._run_layers(token_ids, positions, attend, states)

    def _sample(self, step: StepPlan, batch: StepBatch, hidden: torch.Tensor, result: StepResult) -> list[int]:
        """Choose the next tokens of each request that caught up with its known tokens.

        Returns the indices of requests that got none, because a fault struck beside a draft.
        """
        logits = self._model.logits(hidden[self._to_device(batch.sample_tokens)])
        positions = batch.sample_positions(self._state.tokens)
        sampled = self._sampler.sample(logits, positions)
        chosen = np.asarray(sampled.token_ids, dtype=np.int64)
        kept, doubtful = np.ones(len(chosen), dtype=np.bool_), []
        if step.drafts:
            kept = kept_positions(batch.sample_requests, positions, chosen)
            doubtful = doubtful_requests(step, batch.sample_requests[[i for i in sampled.faults if kept[i]]])
            kept &= ~np.isin(batch.sample_requests, doubtful)
        self._state.tokens.put(positions.rows[kept], positions.num_tokens[kept], chosen[kept])
        requests = batch.sample_requests.tolist()
        for index in np.flatnonzero(kept).tolist():
            result.sampled[requests[index]].append(sampled.token_ids[index])
        for index, entry in sampled.logprobs.items():
            if kept[index]:
                result.logprobs.setdefault(step.request_ids[requests[index]], []).append(entry)
        for index, fault in sampled.faults.items():
            if kept[index]:
                result.faults.setdefault(step.request_ids[requests[index]], fault)
        return doubtful

    def _report_prompts(self, step: StepPlan, batch: StepBatch, hidden: torch.Tensor, result: StepResult) -> None:
        """Add log-probabilities of prompt tokens to requests that asked for them."""
        for request, request_id in enumerate(step.request_ids):
            if request_id in self._prompt_logprobs:
                entries = [*self._prompt_entries(request, batch, hidden, self._prompt_logprobs[request_id])]
                if entries:
                    result.prompt_logprobs[request_id] = entries

    def _prompt_entries(
        self, request: int, batch: StepBatch, hidden: torch.Tensor, num_logprobs: int
    ) -> Iterator[TokenLogprobs]:
        """Yield an entry for each prompt token whose predecessor this step computed."""
        row, first = int(batch.rows[request]), int(batch.query_start[request])
        computed = int(batch.positions[first])
        tokens = self._state.tokens
        end = min(computed + int(batch.query_start[request + 1]) - first, int(tokens.num_prompt_tokens[row]) - 1)
        piece = max(1, MAX_LOGIT_ELEMENTS // self._vocab_size)
        for start in range(computed, end, piece):
            stop = min(start + piece, end)
            logits = self._model.logits(hidden[first + start - computed : first + stop - computed])
            targets = tokens.tokens[row, start + 1 : stop + 1].astype(np.int64)
            yield from prompt_logprobs(logits, self._to_device(targets), num_logprobs)

    def _to_device(self, array: "np.ndarray[Any, np.dtype[np.int64]]") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device.array_device)


def _load_model(model: ModelDescription, device: Device, progress: Progress) -> Model:
    if model.implementation == "transformers":
        from zif.models.transformers_backend import load_transformers_model

        return load_transformers_model(model, device.allocator, device.array_device, progress)
    from zif.models.weights import load_decoder

    return load_decoder(model, device.ops, device.allocator, device.array_device, progress)
