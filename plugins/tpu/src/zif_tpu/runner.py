"""The model runner for XLA: every step is a few compiled programs, all of them made before the first request.

    step -> groups of requests in rows of one width (zif_tpu.buckets)
         -> per group: one array of integers up (zif_tpu.packing), one program: layers, KV cache updated in place,
            hidden states of the places that sample kept on the device
         -> one program that samples, one transfer down

Programs for the generic Transformers backend are not made: its modules shape their work by values.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zif.contract import (
    AttentionParams,
    AttentionSpec,
    CompletedStep,
    EngineConfig,
    KVArena,
    KVStore,
    ModelDescription,
    ModelRunner,
    Plan,
    Progress,
    StepFuture,
    StepPlan,
    StepResult,
    carry_out,
)
from zif.host.memory import HostAllocator
from zif.runtime import (
    Model,
    PromptRows,
    RequestBook,
    SampledTokens,
    Sampler,
    StepBatch,
    TokenLogprobs,
    load_decoder,
    prompt_logprobs,
    without_guesses,
)
from zif_tpu.attention import LayerCache, Pages, PreparedStep
from zif_tpu.bits import stored_dtype
from zif_tpu.blocks import PageBlocks
from zif_tpu.buckets import Buckets, StepGroup, StepShape
from zif_tpu.device import XlaDevice
from zif_tpu.packing import Packing, num_blocks
from zif_tpu.programs import CompilationError, Program, compile_program
from zif_tpu.sampling import Choice, Places, choice_for, choose, logits_of, places_for, read_choices

logger = logging.getLogger(__name__)

_SamplingKey = tuple[int, Choice]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where a layer's KV lives: its group, and its place in the group's blocks. Another layer's if `is_reader`."""

    group: int
    index: int
    num_layers: int
    is_reader: bool = False


@dataclass(frozen=True, slots=True)
class _TracedAttention:
    """Attention of every layer, inside a program."""

    device: XlaDevice
    layers: dict[int, _Layer]
    pages: Pages
    prepared: Sequence[PreparedStep]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        home = self.layers[layer]
        cache = LayerCache(self.pages, home.index, home.num_layers)
        prepared = self.prepared[home.group]
        if not home.is_reader:
            self.device.attention.write(key, value, cache, prepared)
        return self.device.attention.attend(query, cache, prepared, params)


class XlaRunner(ModelRunner):
    """Run one model on one XLA device. A shape that cannot be compiled is served by a larger one, or refused."""

    def __init__(self, config: EngineConfig, plan: Plan, device: XlaDevice) -> None:
        self._config = config
        self._device = device
        self._layers: dict[int, _Layer] = {}
        self._programs: dict[StepShape | _SamplingKey, Program | CompilationError] = {}
        self._vocab_size = 0
        self._dtype = self._kv_dtype = torch.float32
        self._model: Model
        self._sampler: Sampler
        self._book: RequestBook
        self._buckets: Buckets
        self._packing: Packing
        self._rows: torch.Tensor
        self._hidden: torch.Tensor
        self._store: KVStore | None = None
        self._blocks: PageBlocks | None = None
        self._arena: KVArena

    def load(self, model: ModelDescription, progress: Progress) -> None:
        staging = HostAllocator(self._device.plan.memory.available_bytes)
        self._vocab_size = model.vocab_size
        self._dtype = getattr(torch, model.dtype)
        array_device = self._device.array_device
        self._model = load_decoder(model, self._device.ops, staging, array_device, progress, self._keep_weight)
        self._sampler = Sampler(self._config.max_num_seqs, model.vocab_size, "cpu")

    def start(self, arena: KVArena) -> None:
        config, layout = self._config, arena.groups[0].layout
        self._arena = arena
        self._book = RequestBook(config, arena.groups, self._sampler)
        self._packing = Packing(arena.groups)
        block_size = arena.groups[0].spec.block_size
        self._buckets = Buckets.of(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            -(-config.max_model_len // block_size),
            config.max_num_seqs * (1 + config.max_draft_tokens),
        )
        for index, group in enumerate(arena.groups):
            spec = group.spec
            assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
            homes = {layer: _Layer(index, place, len(spec.layers)) for place, layer in enumerate(spec.layers)}
            self._layers |= homes
            for reader, owner in spec.readers:
                self._layers[reader] = _Layer(index, homes[owner].index, len(spec.layers), is_reader=True)
        _, _, num_kv_heads, _, head_dim = layout.shape
        self._kv_dtype = getattr(torch, layout.dtype)
        dtype = stored_dtype(self._kv_dtype, self._device.pjrt_device)
        num_rows = arena.num_bytes // (2 * num_kv_heads * head_dim * dtype.itemsize)
        rows = self._device.allocator.zeros("kv", dtype, num_rows, 2 * num_kv_heads, head_dim)
        self._rows = self._device.sharding.cache(rows)
        # One row more than there can be tokens in a step: where padding leaves its results.
        num_places = max(config.max_num_batched_tokens, self._buckets.samples[-1]) + 1
        self._hidden = self._device.allocator.zeros("activations", self._dtype, num_places, self._hidden_size())

    @property
    def verifies_drafts(self) -> bool:
        return True

    def attach_store(self, store: KVStore) -> bool:
        try:
            self._blocks = PageBlocks(self._arena, self, self._device.settings.compile_deadline_s)
        except CompilationError as error:
            logger.warning("blocks stay on the device: no program copies them: %s", error)
            return False
        self._store = store
        return True

    def warm_up(self, progress: Progress) -> None:
        keys: list[StepShape | _SamplingKey] = [*self._buckets.shapes()]
        keys += [(size, choice) for size in self._buckets.samples for choice in Choice]
        for done, key in enumerate(keys):
            progress(done, len(keys))
            self._program(key)
        progress(len(keys), len(keys))
        for key, outcome in self._programs.items():
            if isinstance(outcome, CompilationError):
                logger.warning("no program for %s: %s", _name(key), outcome)

    def submit(self, step: StepPlan) -> StepFuture:
        self._book.apply(step)
        lost = []
        if step.transfers is not None:
            assert self._store is not None, "blocks are to be copied and no store is attached"
            assert self._blocks is not None
            lost = carry_out(step.transfers, self._store, self._blocks)
        if not step.request_ids:
            return CompletedStep(StepResult(step.step, [], lost=lost))
        result = self._compute(step)
        result.lost = lost
        self._book.settle(step, result)
        return CompletedStep(result)

    def close(self) -> None:
        self._layers.clear()
        self._programs.clear()
        for name in ("_model", "_book", "_sampler", "_rows", "_hidden", "_blocks", "_store"):
            self.__dict__.pop(name, None)
        for tag in ("kv", "weights", "activations"):
            self._device.allocator.free_tag(tag)

    @property
    def rows(self) -> torch.Tensor:
        """The KV cache: [pages * block_size, 2 * K, D]. Each program that is given it makes it void and returns it."""
        return self._rows

    @rows.setter
    def rows(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def _compute(self, step: StepPlan) -> StepResult:
        """Run and sample the rows of a plan, whose other parts have been applied."""
        batch = self._book.batch(step)
        result = StepResult(step.step, [[] for _ in step.request_ids])
        prompts = [*self._book.prompt_rows(step, batch)]
        # Where hidden states are kept: those to be sampled from first, then those of prompts.
        kept = np.concatenate([batch.sample_tokens, *(rows.tokens for rows in prompts)])
        tokens, numbers = np.unique(kept, return_index=True)
        places = np.full(len(batch.token_ids), self._hidden.shape[0] - 1, dtype=np.int64)
        places[tokens] = numbers
        refused = self._run_layers(batch, places)
        for request, error in refused.items():
            result.faults[step.request_ids[request]] = str(error)
        doubtful: list[int] = []
        if len(batch.sample_requests):
            sampled = self._sample(batch, refused)
            doubtful = self._book.take(step, batch, sampled, result)
        for rows in prompts:
            try:
                result.prompt_logprobs[rows.request_id] = self._prompt_logprobs(rows, places)
            except CompilationError as error:
                result.faults.setdefault(rows.request_id, str(error))
        if doubtful:
            again = self._compute(without_guesses(step, doubtful))
            for request, token_ids in zip(doubtful, again.sampled, strict=True):
                result.sampled[request] = token_ids
                result.faults.pop(step.request_ids[request], None)
            result.logprobs.update(again.logprobs)
            result.faults.update(again.faults)
            result.unsound |= again.unsound
        return result

    def _prompt_logprobs(self, rows: PromptRows, places: "np.ndarray[Any, np.dtype[np.int64]]") -> list[TokenLogprobs]:
        entries, size = [], self._buckets.samples[-1]
        for start in range(0, len(rows.tokens), size):
            piece = slice(start, start + size)
            logits = self._logits(places[rows.tokens[piece]])
            entries += prompt_logprobs(logits, torch.from_numpy(rows.targets[piece]), rows.num_logprobs)
        return entries

    def _run_layers(self, batch: StepBatch, places: "np.ndarray[Any, np.dtype[np.int64]]") -> dict[int, str]:
        """Compute all tokens of a step. Returns why requests could not be computed, by index."""
        refused: dict[int, str] = {}
        lengths = np.diff(batch.query_start).tolist()
        for group in self._buckets.groups(lengths, num_blocks(batch)):
            shape, program = self._fitting_program(group.shape)
            if isinstance(program, CompilationError):
                refused |= dict.fromkeys(group.requests, f"no program for {shape}: {program}")
                continue
            packed = self._packing.pack(StepGroup(shape, group.requests), batch, places, self._hidden.shape[0] - 1)
            self._rows, self._hidden = program(self._rows, self._hidden, self._up(packed))
        return refused

    def _sample(self, batch: StepBatch, refused: dict[int, str]) -> SampledTokens:
        positions = self._book.positions(batch)
        count, wanted = len(positions.rows), choice_for(self._sampler, positions.rows)
        size, choice, program = self._sampling_program(count, wanted)
        if isinstance(program, CompilationError):
            return SampledTokens([0] * count, faults=dict.fromkeys(range(count), f"no program samples: {program}"))
        results = self._run_sampling(program, places_for(self._sampler, positions, size))
        faults = {i: refused[r] for i, r in enumerate(batch.sample_requests.tolist()) if r in refused}
        if wanted == Choice.OPEN != choice:
            # The others' tokens are there; those that need their logits on the host go without.
            needs = np.flatnonzero(~self._sampler.is_plain(positions.rows)).tolist()
            faults = {**dict.fromkeys(needs, "no program brings logits to the host: its compilation failed"), **faults}
        sampled = read_choices(results[:count], self._sampler, positions, has_logits=choice == Choice.OPEN)
        return SampledTokens(sampled.token_ids, sampled.logprobs, {**sampled.faults, **faults}, sampled.unsound)

    def _logits(self, numbers: "np.ndarray[Any, np.dtype[np.int64]]") -> torch.Tensor:
        """Return the logits of hidden states that were kept, in host memory. numbers: [P]. Returns [P, V].

        Raises `CompilationError` when no program gives them.
        """
        size, choice, program = self._sampling_program(len(numbers), Choice.OPEN)
        if isinstance(program, CompilationError):
            raise program
        if choice != Choice.OPEN:
            raise CompilationError("no program brings logits to the host: its compilation failed")
        places = Places.of(size, len(numbers))
        places.integers[: len(numbers), 0] = numbers
        return logits_of(self._run_sampling(program, places)[: len(numbers)])

    def _sampling_program(self, count: int, wanted: Choice) -> tuple[int, Choice, Program | CompilationError]:
        """Return a program for at least so many places, the wanted one if it could be made.

        Without it another serves: OPEN does what DRAWN does, DRAWN what GREEDY does; of OPEN, DRAWN serves a part.
        """
        sizes = [size for size in self._buckets.samples if size >= count]
        more = [choice for choice in (Choice.DRAWN, Choice.OPEN) if choice != wanted]
        for choice in (wanted, *(more if wanted != Choice.OPEN else [Choice.DRAWN])):
            for size in sizes:
                program = self._program((size, choice))
                if isinstance(program, Program):
                    return size, choice, program
        return sizes[0], wanted, self._program((sizes[0], wanted))

    def _run_sampling(self, program: Program, places: Places) -> torch.Tensor:
        (results,) = program(self._hidden, self._up(places.integers), self._up(places.reals))
        return results.cpu()

    def _fitting_program(self, shape: StepShape) -> tuple[StepShape, Program | CompilationError]:
        """Return the program of a shape, or of a larger one if it could not be made."""
        program = self._program(shape)
        if isinstance(program, CompilationError):
            for larger in self._buckets.larger(shape):
                found = self._program(larger)
                if isinstance(found, Program):
                    return larger, found
        return shape, program

    def _program(self, key: StepShape | _SamplingKey) -> Program | CompilationError:
        if key not in self._programs:
            try:
                self._programs[key] = self._compiled(key)
            except CompilationError as error:
                self._programs[key] = error
        return self._programs[key]

    def _compiled(self, key: StepShape | _SamplingKey) -> Program:
        deadline_s = self._device.settings.compile_deadline_s
        if isinstance(key, StepShape):
            packed = self._up(np.zeros(self._packing.length(key), dtype=np.int32))
            return compile_program(
                self._layers_of(key), (self._rows, self._hidden, packed), frozenset({0, 1}), deadline_s
            )
        size, choice = key
        places = Places.of(size, 0)
        arguments = (self._hidden, self._up(places.integers), self._up(places.reals))
        return compile_program(self._choice_of(choice), arguments, frozenset(), deadline_s)

    def _layers_of(self, shape: StepShape) -> Callable[..., Sequence[torch.Tensor]]:
        @torch.no_grad()
        def run(rows: torch.Tensor, hidden: torch.Tensor, packed: torch.Tensor) -> Sequence[torch.Tensor]:
            inputs = self._packing.unpack(packed, shape)
            pages = Pages(rows, self._kv_dtype, aliases=False)
            attend = _TracedAttention(self._device, self._layers, pages, inputs.prepared)
            computed = self._model.forward(inputs.token_ids, inputs.positions, attend)
            return pages.rows, hidden.index_put((inputs.places,), computed)

        return run

    def _choice_of(self, choice: Choice) -> Callable[..., Sequence[torch.Tensor]]:
        @torch.no_grad()
        def run(hidden: torch.Tensor, integers: torch.Tensor, reals: torch.Tensor) -> Sequence[torch.Tensor]:
            logits = self._model.logits(hidden.index_select(0, integers[:, 0]))
            return (choose(logits, integers, reals, choice),)

        return run

    def _hidden_size(self) -> int:
        """Return the width of the model's hidden states: traced, never computed."""
        shape = self._buckets.shapes()[0]
        packed = self._up(np.zeros(self._packing.length(shape), dtype=np.int32))

        inputs = self._packing.unpack(packed, shape)
        attend = _TracedAttention(
            self._device, self._layers, Pages(self._rows, self._kv_dtype, aliases=False), inputs.prepared
        )
        with torch.no_grad():
            return self._model.forward(inputs.token_ids, inputs.positions, attend).shape[1]

    def _keep_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._device.allocator.reserve(max(1, tensor.nbytes), "weights")
        return self._device.sharding.weight(name, tensor.to(self._device.array_device))

    def _up(self, array: "np.ndarray[Any, np.dtype[Any]]") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device.array_device)


def _name(key: StepShape | _SamplingKey) -> str:
    return str(key) if isinstance(key, StepShape) else f"{key[1]} sampling at {key[0]} places"
