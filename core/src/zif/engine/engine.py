"""The step loop: scheduler, block manager and runner of one model, and the prompts being answered.

Single-threaded: `LLM` and other front ends call `submit` and `step`. While the device computes a step the next one is
planned and submitted, as far ahead as the runner takes them; results are applied in order. A fault of one request ends
that request; an exception out of a step ends the engine, or, where many share it, the request that makes steps raise.
"""

import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from zif.contract import (
    BlockManager,
    FinishReason,
    Request,
    SamplingParams,
    StepFuture,
    StepPlan,
    StepResult,
)
from zif.engine.counts import EngineCounts
from zif.engine.failed_steps import FailedStep, is_survivable, step_error, wait_for
from zif.engine.garbage import collection_paused
from zif.engine.generation import Generation, OutputProcessor, Sample
from zif.engine.inputs import InputProcessor, Prompt, PromptInput, eos_token_ids
from zif.engine.kv_tiers import KVTiers
from zif.engine.outputs import CompletionOutput, RequestOutput
from zif.engine.parts import EngineExtras, EngineParts, open_pooler, wire_parts
from zif.engine.planning import PlannedModel
from zif.engine.pooling import POOLED_SAMPLING, Pooler, PoolingParams
from zif.engine.proposers import make_proposer, set_drafts
from zif.engine.vocabulary import Vocabulary
from zif.errors import ConfigError, DeviceLostError, EngineError, RequestError
from zif.structured import GrammarCompiler, TokenVocabulary

logger = logging.getLogger(__name__)

PhaseProgress = Callable[[str, int, int], None]
"""Called with (phase, units done, total units) while the engine starts."""


class Engine:
    """Answer prompts with one model."""

    def __init__(self, planned: PlannedModel, parts: EngineParts, vocabulary: Vocabulary, pooler: Pooler) -> None:
        self.vocabulary = vocabulary
        self.pooler = pooler
        self.counts = EngineCounts()
        self._parts = parts
        self._scheduler = parts.scheduler
        self._seed = planned.config.seed
        self._inputs = InputProcessor(planned.model, planned.config, vocabulary)
        self._outputs = OutputProcessor(vocabulary)
        eos_ids = eos_token_ids(planned.model, vocabulary)
        grammars = GrammarCompiler(TokenVocabulary(vocabulary.definition, planned.model.vocab_size, eos_ids))
        self._grammars = grammars if parts.runner.attach_grammars(grammars) else None
        self._generations: dict[int, Generation] = {}
        self._samples: dict[int, Sample] = {}
        self._in_flight: deque[tuple[StepPlan, StepFuture]] = deque()
        self._num_requests = 0
        self._num_prompts = 0
        self._proposer = make_proposer(planned.config, parts.runner)
        self._outlives_failed_steps = False
        self._failure: BaseException | None = None
        self._closed = False

    def check(self, given: PromptInput, sampling: SamplingParams) -> Prompt:
        """Read a prompt and check it with its options. Raises `RequestError`."""
        self.pooler.abilities.require_generating()
        self._inputs.check_sampling(sampling)
        if sampling.structured is not None:
            if self._grammars is None:
                raise RequestError(
                    f"structured output is not served by {type(self._parts.runner).__name__}; "
                    "leave structured out or choose another platform"
                )
            self._grammars.check(sampling.structured)
        return self._inputs.prompt(given)

    def check_pooled(self, given: PromptInput, params: PoolingParams) -> Prompt:
        """Read a prompt that is to be pooled, and check whether it can be. Raises `RequestError`."""
        self.pooler.abilities.check(params)
        prompt = self._inputs.prompt(given, room=0)
        return replace(prompt, token_ids=self.pooler.strip_padding(prompt.token_ids))

    def load_grammars(self) -> None:
        """Make ready for structured output before the first request for it. Where it cannot be, requests say so."""
        if self._grammars is not None:
            try:
                self._grammars.load()
            except (ConfigError, RequestError) as error:
                logger.info("no structured output: %s", error)

    @property
    def uses_tenants(self) -> bool:
        """Say whether it matters who a prompt is charged to."""
        return self._inputs.uses_tenants

    def submit(self, prompt: Prompt, sampling: SamplingParams, priority: int = 0) -> Generation:
        """Queue a checked prompt; the samples run from the next step on."""
        self._require_alive()
        generation = Generation(str(self._num_prompts), prompt, sampling, [], time.monotonic())
        self._num_prompts += 1
        requests = [self._request(prompt, sampling, index, priority) for index in range(sampling.n)]
        generation.samples = [self._outputs.begin(i, request, prompt) for i, request in enumerate(requests)]
        for request in requests:
            request.siblings = tuple(requests) if sampling.n > 1 else ()
        self._queue(generation)
        if sampling.prompt_logprobs is not None:
            generation.prompt_logprobs = [None] * len(prompt.token_ids)
        return generation

    def submit_pooled(self, prompt: Prompt, params: PoolingParams, priority: int = 0) -> Generation:
        """Queue a checked prompt that is to be pooled; `Generation.pooled` has the result once it has ended."""
        self._require_alive()
        generation = Generation(str(self._num_prompts), prompt, POOLED_SAMPLING, [], time.monotonic())
        self._num_prompts += 1
        generation.pooled = self.pooler.begin(params, len(prompt.token_ids))
        request = self._request(prompt, POOLED_SAMPLING, 0, priority)
        # One more than there are, so that the last known token is planned like any other.
        request.max_total_tokens = len(prompt.token_ids) + 1
        request.hidden = generation.pooled.rows
        generation.samples = [self._outputs.begin(0, request, prompt)]
        self._queue(generation)
        return generation

    def _queue(self, generation: Generation) -> None:
        for sample in generation.samples:
            request = sample.request
            if generation.prompt.timeout_s is not None:
                request.deadline_s = generation.arrival_s + generation.prompt.timeout_s
            self._generations[request.request_id] = generation
            self._samples[request.request_id] = sample
            self._scheduler.add(request)

    def reject(self, given: PromptInput, error: RequestError) -> RequestOutput:
        """Return the output of a prompt that could not be queued."""
        prompt = Prompt([], given if isinstance(given, str) else None)
        generation = Generation(str(self._num_prompts), prompt, SamplingParams(detokenize=False), [], time.monotonic())
        self._num_prompts += 1
        request = self._request(prompt, generation.sampling, 0, 0)
        request.finish_reason, request.error = FinishReason.ERROR, str(error)
        generation.samples = [self._outputs.begin(0, request, prompt)]
        generation.finished_s = generation.arrival_s
        return self._outputs.output(generation)

    def step(self) -> list[Generation]:
        """Submit steps ahead and wait for the oldest. Returns the prompts that got tokens or ended, if any."""
        self._require_alive()
        began = time.monotonic()
        try:
            self._submit_ahead()
            if not self._in_flight:
                self._require_progress()
                return []
            plan, future = self._in_flight.popleft()
            try:
                result = future.result()
            except Exception as error:
                return self._recover(plan, error)
            changed = self._apply(plan, result)
            self.counts.num_steps += 1
            self.counts.last_step_s = time.monotonic() - began
            return changed
        except BaseException as error:
            self._failure = error
            raise

    def abort(self, generation: Generation) -> None:
        """End every sample that still runs; what was generated stays. Harmless when all have ended."""
        for sample in generation.samples:
            self._finish(sample, FinishReason.ABORT)
        self._settle(generation)

    def output(self, generation: Generation) -> RequestOutput:
        """Return what there is of an answer now."""
        return self._outputs.output(generation)

    def take(self, generation: Generation) -> list[CompletionOutput]:
        """Return what each sample got since the last call; `OutputProcessor.take` says what that does to `output`."""
        return self._outputs.take(generation)

    @property
    def num_running(self) -> int:
        """Count the samples in the running batch."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Count the samples that hold no place in the running batch."""
        return self._scheduler.num_waiting

    def kv_usage(self) -> float:
        """Return which part of its KV blocks the fullest layer group has given to requests, 0 to 1."""
        groups = self._parts.block_manager.usage()
        totals = [group.num_free + group.num_cached + group.num_owned + group.num_lendable for group in groups]
        return max((g.num_owned / total for g, total in zip(groups, totals, strict=True) if total), default=0.0)

    def has_work(self) -> bool:
        """Say whether a step would do anything."""
        return self._scheduler.has_requests()

    def reset_prefix_cache(self) -> None:
        """Forget every computed prefix."""
        self._parts.block_manager.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert that no block is lost, and none held by a request that is gone."""
        live = [s.request for s in self._samples.values() if not s.finished] + self._scheduler.holders()
        self._parts.block_manager.check_integrity(live)

    def close(self) -> None:
        """Give memory and device back. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._parts.store is not None:
                self._parts.store.close()
            try:
                # What a lost device held is gone with it, and who lost it has been told.
                with contextlib.suppress(DeviceLostError), self._parts.device.watch():
                    self._parts.runner.close()
            finally:
                self._parts.device.close()

    def outlive_failed_steps(self) -> None:
        """From now on let a step that raises end the request that makes it raise, and the others go on."""
        self._outlives_failed_steps = True

    def _recover(self, plan: StepPlan, error: Exception) -> list[Generation]:
        """Go on after `plan` raised, without the request that was the cause once it is known; else raise `error`."""
        if not (self._outlives_failed_steps and is_survivable(error)):
            raise error
        later = [*self._in_flight]
        self._in_flight.clear()
        wait_for(future for _, future in later)
        updates = self._scheduler.abandon([plan, *(each for each, _ in later)], step_error(error))
        if updates is None:
            raise error
        for update in updates:
            # No token follows: text that was held back for a stop string or the rest of a character is shown.
            self._outputs.append(self._samples[update.request.request_id], [], [])
        logger.error("a step of %d requests raised, %d ended", len(plan.request_ids), len(updates), exc_info=error)
        return self._settle_all(self._generations[update.request.request_id] for update in updates)

    def _submit_ahead(self) -> None:
        """Plan and submit steps until the runner has as many under way as it takes, or there is nothing to plan."""
        # Guesses follow known tokens only, so with them one step waits for the other.
        max_in_flight = 1 if self._proposer else self._parts.runner.max_steps_in_flight
        while len(self._in_flight) < max_in_flight:
            if self._proposer is not None:
                set_drafts(self._proposer, [sample.request for sample in self._samples.values()])
            plan = self._scheduler.schedule()
            if plan is None:
                return
            self._note_started(plan)
            try:
                future = self._parts.runner.submit(plan)
            except Exception as error:
                # What earlier steps gave is still good: the failure waits for its turn.
                future = FailedStep(error)
            self._in_flight.append((plan, future))

    def _note_started(self, plan: StepPlan) -> None:
        """Note when the first sample of each prompt left the queue."""
        now = time.monotonic()
        for start in plan.started:
            generation = self._generations.get(start.request_id)
            if generation is not None and generation.started_s is None:
                generation.started_s = now

    def _request(self, prompt: Prompt, sampling: SamplingParams, index: int, priority: int) -> Request:
        """Build sample `index`; only the first reports on the prompt that all share."""
        request_id = self._num_requests
        self._num_requests += 1
        own = sampling.for_sample(index)
        seed = own.seed if own.seed is not None else _derived_seed(self._seed, request_id)
        return self._inputs.request(request_id, prompt, own, seed, priority)

    def _apply(self, plan: StepPlan, result: StepResult) -> list[Generation]:
        now = time.monotonic()
        changed: dict[int, Generation] = {}
        for update in self._scheduler.update(plan, result):
            request_id = update.request.request_id
            generation = self._generations[request_id]
            changed[id(generation)] = generation
            if generation.first_token_s is None and (update.new_token_ids or request_id in result.hidden):
                generation.first_token_s = now
                self.counts.add_prompt(generation.samples[0].request)
            self.counts.num_generated_tokens += len(update.new_token_ids)
            sample = self._samples[request_id]
            if self._outputs.append(sample, update.new_token_ids, result.logprobs.get(request_id, [])):
                self._finish(sample, FinishReason.STOP)
        if result.prompt_logprobs:
            self._report_prompts(plan, result)
        if result.hidden:
            self._take_hidden(plan, result)
        return self._settle_all(changed.values())

    def _settle_all(self, generations: Iterable[Generation]) -> list[Generation]:
        changed = list(dict.fromkeys(generations))
        for generation in changed:
            self._settle(generation)
        return changed

    def _report_prompts(self, plan: StepPlan, result: StepResult) -> None:
        """Put prompt log-probabilities at their positions; a chunk computed twice lands on itself."""
        for request_id, num_computed in zip(plan.request_ids, plan.num_computed, strict=True):
            reported = self._generations[request_id].prompt_logprobs if request_id in self._generations else None
            for offset, entry in enumerate(result.prompt_logprobs.get(request_id, [])):
                assert reported is not None, f"request {request_id} did not ask for prompt log-probabilities"
                reported[num_computed + 1 + offset] = self._outputs.position_logprobs(entry)

    def _take_hidden(self, plan: StepPlan, result: StepResult) -> None:
        """Give hidden states to the prompts that are pooled, but those of rows that were void."""
        for request_id, start, num_tokens in zip(plan.request_ids, plan.num_computed, plan.num_tokens, strict=True):
            generation, data = self._generations.get(request_id), result.hidden.get(request_id)
            if generation is None or data is None:
                continue
            assert generation.pooled is not None, f"request {request_id} did not ask for hidden states"
            if generation.samples[0].request.num_computed_tokens >= start + num_tokens:
                generation.pooled.take(data, start, num_tokens)

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        if self._scheduler.finish(sample.request.request_id, reason) is not None and sample.text is not None:
            sample.text.finish()

    def _settle(self, generation: Generation) -> None:
        """Forget samples that have ended."""
        for sample in generation.samples:
            if sample.finished and self._samples.pop(sample.request.request_id, None) is not None:
                del self._generations[sample.request.request_id]
                self.counts.add_ended(sample.request)
                if self._proposer is not None:
                    self._proposer.forget(sample.request)
        if generation.finished_s is None and all(sample.finished for sample in generation.samples):
            generation.finished_s = time.monotonic()

    def _require_alive(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        if self._failure is not None:
            raise EngineError(f"an earlier step failed ({self._failure!r}); make a new engine") from self._failure

    def _require_progress(self) -> None:
        if self._samples:
            raise EngineError(f"{len(self._samples)} requests wait and none can be scheduled; this is a fault of zif")


def start_engine(
    planned: PlannedModel,
    vocabulary: Vocabulary,
    on_phase: PhaseProgress,
    extras: EngineExtras = EngineExtras(),  # noqa: B008 - frozen value
) -> Engine:
    """Open the device, load the weights and wire the parts. On failure everything opened is given back."""
    started = time.monotonic()
    with collection_paused():  # Here array libraries are imported.
        device = planned.platform.open(planned.plan, rank=0)
    try:
        tiers = KVTiers(planned, extras.remote_kv)
        with collection_paused():
            parts = wire_parts(planned, device, tiers, extras.journal)
        pooler = open_pooler(planned.model, parts)
        for note in pooler.notes:
            logger.warning(note)
        parts.runner.load(planned.model, lambda done, total: on_phase("loading weights", done, total))
        on_phase("allocating KV blocks", 0, 1)
        parts.runner.start(planned.arena)
        tiers.attach(parts.runner)
        on_phase("allocating KV blocks", 1, 1)
        parts.runner.warm_up(lambda done, total: on_phase("warming up", done, total))
        engine = Engine(planned, parts, vocabulary, pooler)
        _require_room(planned, parts.block_manager)
    except BaseException:
        device.close()
        raise
    logger.info("engine ready on %s after %.2f s", planned.plan.platform, time.monotonic() - started)
    return engine


def _require_room(planned: PlannedModel, block_manager: BlockManager) -> None:
    """Refuse a block manager under which the longest request could wait for ever."""
    if not block_manager.fits(planned.config.max_model_len):
        raise EngineError(
            f"{type(block_manager).__name__} cannot hold one request of max_model_len={planned.config.max_model_len} "
            f"tokens in the {planned.arena.num_bytes} bytes that the plan gives it; this is a fault of the plan"
        )


def _derived_seed(engine_seed: int, request_id: int) -> int:
    """Return the seed of a request that brought none: fixed by the engine's seed and the request's number."""
    digest = hashlib.sha256(f"zif.seed:{engine_seed}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
