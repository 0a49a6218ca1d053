"""The offline interface: prompts in, texts out. vLLM's quick start runs with only the import changed."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast, overload

from zif.contract import KVArena, ModelDescription, Plan, RemoteTier, SamplingParams
from zif.engine.engine import Engine, PhaseProgress, start_engine
from zif.engine.generation import Generation
from zif.engine.inputs import Prompt, PromptInput, default_sampling
from zif.engine.interaction import deferred_interrupt, progress_bar
from zif.engine.outputs import ClassificationOutput, EmbeddingOutput, PooledOutput, RequestOutput, ScoringOutput
from zif.engine.parts import EngineExtras
from zif.engine.planning import PlannedModel, plan_model
from zif.engine.pooled_batch import BatchOptions, classify_all, embed_all, score_all
from zif.engine.vocabulary import Vocabulary
from zif.errors import ConfigError, EngineError, RequestError
from zif.kv.journal import BlockJournal
from zif.settings import EngineSettings
from zif.text.chat import ChatOptions, ChatTemplates, load_chat_templates, render_chat

logger = logging.getLogger(__name__)

ChatMessage = Mapping[str, Any]

QUEUED_PER_RUNNING = 2
"""Prompts in the engine per place in a step: enough that a place freed is filled at once."""
HELD_PER_RUNNING = 16
"""Answers held for an earlier one, per place in a step: bounds memory when prompts come from an iterator."""


class LLM:
    """A model, ready to generate.

    Keywords are the fields of `zif.settings.EngineSettings`; an unknown or unsupported one is refused by name. Raises
    `ConfigError`, `ModelError`, `PlatformError` or `OutOfMemoryError`. Close it, or use it as a context manager, to
    give its memory back. `remote_kv` is a place for KV that engines share, below host memory and disk.
    """

    def __init__(self, model: str | Path, *, remote_kv: RemoteTier | None = None, **settings: Any) -> None:
        self._open(EngineSettings.from_values({"model": str(model), **settings}), _log_phase, EngineExtras(remote_kv))

    @classmethod
    def from_settings(
        cls, settings: EngineSettings, on_phase: PhaseProgress | None = None, journal: BlockJournal | None = None
    ) -> "LLM":
        """Open a model from resolved settings; `on_phase` hears how the start goes, `journal` what becomes findable."""
        llm = cls.__new__(cls)
        llm._open(settings, on_phase or _log_phase, EngineExtras(journal=journal))
        return llm

    def _open(self, settings: EngineSettings, on_phase: PhaseProgress, extras: EngineExtras) -> None:
        self._settings = settings
        on_phase("planning", 0, 1)
        self._planned: PlannedModel = plan_model(settings)
        for note in self._planned.notes:
            logger.warning(note)
        on_phase("planning", 1, 1)
        folder = Path(settings.tokenizer or settings.model)
        self._vocabulary = Vocabulary(folder, settings.trust_remote_code)
        self._chat_templates = _chat_templates(folder, settings.chat_template)
        self._engine: Engine = start_engine(self._planned, self._vocabulary, on_phase, extras)

    @property
    def plan(self) -> Plan:
        """Return what was decided before the weights were loaded."""
        return self._planned.plan

    @property
    def model(self) -> ModelDescription:
        """Return the model's description."""
        return self._planned.model

    @property
    def arena(self) -> KVArena:
        """Return how KV memory is cut."""
        return self._planned.arena

    @property
    def engine(self) -> Engine:
        """Return the engine, for callers that drive steps themselves."""
        return self._engine

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling options that the model's authors recommend."""
        return default_sampling(self._planned.model.path)

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Iterator[PromptInput],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        use_tqdm: bool = True,
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput] | Iterator[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer prompts, in their order.

        A prompt or a sequence of prompts gives a list. All prompts are checked before any is computed: `RequestError`
        names the first that is wrong. Ctrl-C ends the batch early: the list then holds what was generated, unfinished
        answers marked with finish reason "abort"; a second Ctrl-C raises KeyboardInterrupt.

        An iterator gives an iterator with bounded memory; a wrong prompt gives an output with finish reason "error".
        Ctrl-C while it computes ends it early: it yields what it holds, then raises KeyboardInterrupt.
        """
        if isinstance(prompts, Iterator):
            if not (sampling_params is None or isinstance(sampling_params, SamplingParams)) or not _is_one(priority):
                raise RequestError("an iterator of prompts takes one SamplingParams and one priority for all")
            self.check_priority(priority)
            return self._generate_lazily(prompts, sampling_params or self.get_default_sampling_params(), priority)
        given = _listed(prompts)
        options = self._per_prompt(sampling_params, len(given))
        priorities = [priority] * len(given) if isinstance(priority, int) else list(priority)
        if len(priorities) != len(given):
            raise RequestError(f"{len(priorities)} priorities for {len(given)} prompts; pass one, or one for each")
        for value in priorities:
            self.check_priority(value)
        return self._generate_all(given, options, priorities, use_tqdm)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **rendering: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, written out by the model's chat template.

        `rendering` takes the keywords of `render_chat`.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[ChatMessage]]", messages if several else [messages])
        return self.generate(
            [self.render_chat(c, **rendering) for c in conversations], sampling_params, use_tqdm=use_tqdm
        )

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptInput:
        """Write a conversation out as a prompt of tokens. Raises `RequestError` when that cannot be done."""
        options = ChatOptions(add_generation_prompt, continue_final_message, tools, chat_template_kwargs or {})
        templates = self._chat_templates
        if chat_template is not None:
            templates = ChatTemplates({"default": chat_template}, templates.special_tokens)
        text = render_chat(templates, messages, options)
        return {"prompt": text, "prompt_token_ids": self._vocabulary.encode(text, add_special_tokens=False)}

    def stream(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Yield the growing answer of one prompt, once per step that changed it.

        A wrong prompt raises here, the request is queued with the first `next`. Closing the iterator aborts it, and so
        does Ctrl-C; the engine stays usable.
        """
        options = sampling_params or self.get_default_sampling_params()
        self.check_priority(priority)
        return self._follow(self._engine.check(prompt, options), options, priority)

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        *,
        dimensions: int | None = None,
        priority: int = 0,
        use_tqdm: bool = True,
    ) -> list[PooledOutput[EmbeddingOutput]]:
        """Return the vector of each prompt: of its last token, or as the checkpoint's files say.

        `dimensions` shortens vectors to their first elements, for models trained so. All prompts are checked before
        any is computed; Ctrl-C ends the batch early.
        """
        self.check_priority(priority)
        return embed_all(self._engine, _listed(prompts), dimensions, BatchOptions(priority, use_tqdm))

    def classify(
        self, prompts: PromptInput | Sequence[PromptInput], *, priority: int = 0, use_tqdm: bool = True
    ) -> list[PooledOutput[ClassificationOutput]]:
        """Return what the model's score head says of each prompt."""
        self.check_priority(priority)
        return classify_all(self._engine, _listed(prompts), BatchOptions(priority, use_tqdm))

    def score(
        self, queries: str | Sequence[str], documents: str | Sequence[str], *, priority: int = 0, use_tqdm: bool = True
    ) -> list[PooledOutput[ScoringOutput]]:
        """Return how well each document answers its query; one query stands for all documents.

        The score head says so where the model has one; else it is the cosine of the two embeddings.
        """
        self.check_priority(priority)
        asked = [queries] if isinstance(queries, str) else list(queries)
        found = [documents] if isinstance(documents, str) else list(documents)
        if len(asked) not in (1, len(found)):
            raise RequestError(f"{len(asked)} queries for {len(found)} documents; pass one, or one for each")
        asked = asked * len(found) if len(asked) == 1 else asked
        return score_all(self._engine, asked, found, BatchOptions(priority, use_tqdm))

    def reset_prefix_cache(self) -> None:
        """Forget every computed prefix."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Give memory and device back. Idempotent."""
        self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _per_prompt(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * num_prompts
        if len(given) != num_prompts:
            raise RequestError(f"{len(given)} SamplingParams for {num_prompts} prompts; pass one, or one for each")
        return list(given)

    def check_priority(self, priority: int) -> None:
        """Raise `RequestError` for a priority that is no integer, or that this engine would ignore."""
        if type(priority) is not int:
            raise RequestError(f"priority={priority!r} must be an integer")
        if priority and self._settings.scheduling_policy == "fcfs":
            raise RequestError(
                f"priority={priority} has no meaning under scheduling_policy={self._settings.scheduling_policy!r}; "
                "open the engine with scheduling_policy='priority' or 'fair', or leave it out"
            )

    def _follow(self, prompt: Prompt, sampling: SamplingParams, priority: int) -> Iterator[RequestOutput]:
        generation = self._engine.submit(prompt, sampling, priority)
        has_ended = False
        try:
            while not has_ended:
                # Steps for other callers may have moved this answer on, even to its end.
                changed = [generation] if generation.finished else self._step()
                has_ended = generation.finished
                if generation in changed:
                    yield self._engine.output(generation)
        finally:
            self._engine.abort(generation)

    def _step(self) -> list[Generation]:
        """Compute a step; Ctrl-C raises after it, so that it is not torn and the engine stays usable."""
        with deferred_interrupt() as interrupted:
            changed = self._engine.step()
        if interrupted.is_set():
            raise KeyboardInterrupt
        return changed

    def _generate_all(
        self,
        given: list[PromptInput],
        options: list[SamplingParams],
        priorities: list[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        prompts = []
        for index, (prompt, sampling) in enumerate(zip(given, options, strict=True)):
            try:
                prompts.append(self._engine.check(prompt, sampling))
            except RequestError as error:
                raise RequestError(f"prompt {index}: {error}") from error
        generations: list[Generation] = []
        try:
            with progress_bar(len(prompts), use_tqdm) as advance, deferred_interrupt() as interrupted:
                generations += [self._engine.submit(*e) for e in zip(prompts, options, priorities, strict=True)]
                unfinished = set(generations)
                while unfinished and not interrupted.is_set():
                    for generation in unfinished.intersection(self._engine.step()):
                        if generation.finished:
                            unfinished.remove(generation)
                            advance(sum(sample.request.num_output_tokens for sample in generation.samples))
                for generation in generations:
                    self._engine.abort(generation)
        except Exception as error:
            outputs = [self._engine.output(generation) for generation in generations]
            raise EngineError(f"the engine failed: {error!r}; what was generated is in .outputs", outputs) from error
        return [self._engine.output(generation) for generation in generations]

    def _generate_lazily(
        self, prompts: Iterator[PromptInput], sampling: SamplingParams, priority: int
    ) -> Iterator[RequestOutput]:
        """Answer in order while pulling prompts only as the engine has room for them."""
        max_running = self._settings.max_num_seqs
        held: deque[Generation | RequestOutput] = deque()
        exhausted = is_interrupted = False
        try:
            while held or not exhausted:
                while not exhausted and _wants_more(held, max_running):
                    try:
                        held.append(self._submit_or_reject(next(prompts), sampling, priority))
                    except StopIteration:
                        exhausted = True
                if any(isinstance(entry, Generation) and not entry.finished for entry in held):
                    is_interrupted = self._step_or_abort(held)
                    exhausted |= is_interrupted
                while held and (isinstance(held[0], RequestOutput) or held[0].finished):
                    entry = held.popleft()
                    yield entry if isinstance(entry, RequestOutput) else self._engine.output(entry)
            if is_interrupted:
                raise KeyboardInterrupt
        finally:
            self._abort(held)

    def _step_or_abort(self, held: Iterable[Generation | RequestOutput]) -> bool:
        """Compute a step. True when Ctrl-C came meanwhile: then every answer that was not finished is aborted."""
        try:
            self._step()
        except KeyboardInterrupt:
            self._abort(held)
            return True
        return False

    def _abort(self, held: Iterable[Generation | RequestOutput]) -> None:
        for entry in held:
            if isinstance(entry, Generation):
                self._engine.abort(entry)

    def _submit_or_reject(
        self, prompt: PromptInput, sampling: SamplingParams, priority: int
    ) -> Generation | RequestOutput:
        try:
            return self._engine.submit(self._engine.check(prompt, sampling), sampling, priority)
        except RequestError as error:
            return self._engine.reject(prompt, error)


def _chat_templates(folder: Path, override: str | None) -> ChatTemplates:
    """Read the tokenizer's templates; an override, a file or a template itself, takes their place."""
    shipped = load_chat_templates(folder)
    if override is None:
        return shipped
    is_template = "{" in override or "\n" in override
    source = override if is_template else _read_template(Path(override))
    return ChatTemplates({"default": source}, shipped.special_tokens)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template={str(path)!r} cannot be read ({error}); give a file or the template"
        ) from error


def _listed(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    return [prompts] if isinstance(prompts, str | Mapping) else list(prompts)


def _is_one(priority: int | Sequence[int]) -> TypeGuard[int]:
    return isinstance(priority, int)


def _wants_more(held: Iterable[Generation | RequestOutput], max_running: int) -> bool:
    """Say whether another prompt may be pulled: places to fill, and not too many answers held back."""
    entries = list(held)
    num_unfinished = sum(isinstance(entry, Generation) and not entry.finished for entry in entries)
    return num_unfinished < QUEUED_PER_RUNNING * max_running and len(entries) < HELD_PER_RUNNING * max_running


def _log_phase(phase: str, done: int, total: int) -> None:
    if done == total:
        logger.info("%s: done", phase)
