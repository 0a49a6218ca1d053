"""Core's model runner for platforms that torch drives: load, batch, run, sample.

It uses a device only through the contract: allocator, attention, ops and graphs. A platform whose arrays are not torch
tensors brings its own runner through the hook `zif_model_runner`.
"""

import logging
from collections.abc import Callable, Mapping
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
    Grammars,
    HiddenRows,
    KVArena,
    KVStore,
    ModelDescription,
    ModelRunner,
    Progress,
    RecurrentStateSpec,
    StepFuture,
    StepPlan,
    StepResult,
    carry_out,
)
from zif.errors import DeviceLostError
from zif.models.model import Model
from zif.runtime.batch import StepBatch
from zif.runtime.blocks import ArenaBlocks
from zif.runtime.book import RequestBook
from zif.runtime.hidden import report_hidden
from zif.runtime.logprobs import prompt_logprobs
from zif.runtime.sampler import Sampler
from zif.runtime.states import StateMemory
from zif.runtime.verification import without_guesses
from zif.runtime.warm_up import WarmUpSteps

logger = logging.getLogger(__name__)

MAX_LOGIT_ELEMENTS = 1 << 24
"""Prompt log-probabilities are computed in pieces of at most this many logits, to bound memory."""


@dataclass(frozen=True, slots=True)
class _LayerCache:
    """Where a layer's KV lives: its group's index and the backend's view of it. Another layer's if `is_reader`."""

    group: int
    cache: Any
    is_reader: bool = False


class StepAttention:
    """Attention of every layer, bound to one step. `prepared` is what the backend prepared, by layer group."""

    def __init__(
        self, backend: AttentionBackend[Any, Any], layers: dict[int, _LayerCache], prepared: Mapping[int, Any]
    ) -> None:
        self._backend = backend
        self._layers = layers
        self.prepared = prepared

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        home = self._layers[layer]
        prepared = self.prepared[home.group]
        if not home.is_reader:
            self._backend.write(key, value, home.cache, prepared)
        return self._backend.attend(query, home.cache, prepared, params)


class TorchRunner(ModelRunner):
    """Run one model on one device, a step at a time. How drafts are verified is in `zif.runtime.verification`."""

    def __init__(self, config: EngineConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._layers: dict[int, _LayerCache] = {}
        self._vocab_size = 0
        self._model: Model
        self._run_layers: Callable[..., torch.Tensor]
        self._states = StateMemory()
        self._book: RequestBook
        self._sampler: Sampler
        self._blocks: ArenaBlocks
        self._arena: KVArena
        self._store: KVStore | None = None

    def load(self, model: ModelDescription, progress: Progress) -> None:
        self._model = _load_model(model, self._device, progress)
        self._run_layers = self._device.graphs.wrap(self._model.forward)
        self._vocab_size = model.vocab_size
        device = self._device
        self._sampler = Sampler(self._config.max_num_seqs, model.vocab_size, device.array_device, device.ops)

    def start(self, arena: KVArena) -> None:
        self._arena = arena
        self._book = RequestBook(self._config, arena.groups, self._sampler)
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

    def warm_up(self, progress: Progress) -> None:
        if not self._device.compiles_on_first_use:
            return
        hidden = None if self._model.gives_logits else HiddenRows.LAST
        steps = WarmUpSteps(self._config, self._device.plan.constraints, self._arena, self._vocab_size, hidden)
        kinds = steps.kinds()
        for done, rows in enumerate(kinds):
            progress(done, len(kinds))
            plan = steps.plan(rows)
            try:
                self.submit(plan).result()
            except DeviceLostError:
                raise
            except Exception as error:  # compilers raise what they like, and a step that needs this will say it again
                logger.warning("warming up %d requests, %d tokens: %s", len(rows), plan.total_tokens, error)
            finally:
                self._book.apply(steps.release(plan))
        progress(len(kinds), len(kinds))

    @property
    def verifies_drafts(self) -> bool:
        return True

    @property
    def reports_hidden(self) -> bool:
        return True

    def attach_store(self, store: KVStore) -> bool:
        self._store = store
        return True

    def attach_grammars(self, grammars: Grammars) -> bool:
        self._sampler.attach_grammars(grammars)
        return True

    @torch.inference_mode()
    def submit(self, step: StepPlan) -> StepFuture:
        self._book.apply(step)
        with self._device.watch():
            lost = self._copy_blocks(step)
        if not step.request_ids:
            return CompletedStep(StepResult(step.step, [], lost=lost))
        with self._device.watch():
            result = self._compute(step)
        result.lost = lost
        self._book.settle(step, result)
        return CompletedStep(result)

    def close(self) -> None:
        self._layers.clear()
        for name in ("_model", "_run_layers", "_book", "_states", "_sampler", "_blocks", "_arena"):
            self.__dict__.pop(name, None)
        self._device.allocator.free_tag("kv")
        self._device.allocator.free_tag("weights")

    def _copy_blocks(self, step: StepPlan) -> list[int]:
        """Make the copies that precede the step; return the handles of those that are lost."""
        if step.transfers is None:
            return []
        assert self._store is not None, "blocks are to be copied and no store is attached"
        return carry_out(step.transfers, self._store, self._blocks)

    def _compute(self, step: StepPlan) -> StepResult:
        """Run and sample the rows of a plan, whose other parts have been applied."""
        batch = self._book.batch(step)
        hidden = self._forward(batch)
        result = StepResult(step.step, [[] for _ in step.request_ids])
        doubtful: list[int] = []
        if len(batch.sample_requests):
            logits = self._model.logits(hidden[self._to_device(batch.sample_tokens)])
            sampled = self._sampler.sample(logits, self._book.positions(batch))
            doubtful = self._book.take(step, batch, sampled, result)
        self._report_prompts(step, batch, hidden, result)
        report_hidden(self._book.hidden_rows(step, batch), hidden, result)
        if doubtful:
            again = self._compute(without_guesses(step, doubtful))
            for request, token_ids in zip(doubtful, again.sampled, strict=True):
                result.sampled[request] = token_ids
            result.logprobs.update(again.logprobs)
            result.faults.update(again.faults)
            result.unsound |= again.unsound
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

    def _report_prompts(self, step: StepPlan, batch: StepBatch, hidden: torch.Tensor, result: StepResult) -> None:
        """Add log-probabilities of prompt tokens to requests that asked for them."""
        size = max(1, MAX_LOGIT_ELEMENTS // self._vocab_size)
        for rows in self._book.prompt_rows(step, batch):
            entries = result.prompt_logprobs[rows.request_id] = []
            for start in range(0, len(rows.tokens), size):
                piece = slice(start, start + size)
                logits = self._model.logits(hidden[self._to_device(rows.tokens[piece])])
                entries += prompt_logprobs(logits, self._to_device(rows.targets[piece]), rows.num_logprobs)

    def _to_device(self, array: "np.ndarray[Any, np.dtype[np.int64]]") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device.array_device)


def _load_model(model: ModelDescription, device: Device, progress: Progress) -> Model:
    if model.implementation == "transformers":
        from zif.models.transformers_backend import load_transformers_model

        return load_transformers_model(model, device.allocator, device.array_device, progress)
    from zif.models.weights import load_decoder

    return load_decoder(model, device.ops, device.allocator, device.array_device, progress)
