"""Chats, whatever API they came by: messages to a prompt, the engine's answer to text, reasoning and tool calls.

No wire format is known here: `zif.serving.openai`, `anthropic` and `responses` read requests into a `ChatTurn` and
write `ChatDelta`s as their events. Reading an answer:

    answer = await service.start(turn, request.caller, request.record)
    async with contextlib.aclosing(answer.deltas()) as deltas:     # closing them aborts the request
        async for delta in deltas:
            for event in delta.events: ...   # zif.parsing.events, in order
    answer.num_completion_tokens             # counts are complete when the deltas have ended
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from zif.contract import SamplingParams, StructuredOutput
from zif.errors import RequestError
from zif.parsing.events import ParseEvent, ReasoningPiece, ToolCallBegin, ToolCallEnd
from zif.serving.answers import (
    AnswerDelta,
    EngineClient,
    EnginePrompt,
    PositionLogprobs,
    SampleDelta,
)
from zif.serving.chat.formats import ChatFormat
from zif.serving.chat.plans import AnswerParser, AnswerPlan, plan_answer
from zif.serving.chat.turn import (
    ChatTurn,
    ToolChoice,
    ToolMode,
    check_tools,
    template_messages,
    template_variables,
)
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import Caller, RequestRecord
from zif.serving.prompts import Prompts, Renderer, render_in_thread
from zif.text.chat import ChatOptions

FormCheck = Callable[[StructuredOutput], Awaitable[object]]
"""Compiles a form within limits, as `zif.serving.workers.pool.WorkerPool.check_grammar` does."""

__all__ = [
    "AnswerParser",
    "ChatAnswer",
    "ChatDelta",
    "ChatPrompt",
    "ChatService",
    "ChatTurn",
    "FormCheck",
    "ToolChoice",
    "ToolMode",
    "note_answer",
    "note_prompt",
]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as the model sees it."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one of the n samples got.

    `finish_reason` comes with its last delta: "stop", "length", "tool_calls" (it called a tool and stopped by itself),
    "abort" or "error" (`error` says why). `text` is the undivided text that `events` take apart, markers included.
    """

    index: int
    events: list[ParseEvent]
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class ChatAnswer:
    """One answer under way. Counts grow while `deltas` is read; `prompt_logprobs` is there once the first came."""

    def __init__(
        self,
        prompt: ChatPrompt,
        samples: "list[ChatSample]",
        source: AsyncGenerator[AnswerDelta, None],
        record: RequestRecord,
    ) -> None:
        self.prompt = prompt
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._samples = samples
        self._source = source
        self._record = record

    @property
    def prompt_token_ids(self) -> list[int]:
        """Return the prompt as the model sees it."""
        return self.prompt.token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Count the prompt's tokens."""
        return len(self.prompt.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Count the tokens of all samples so far."""
        return sum(sample.num_tokens for sample in self._samples)

    @property
    def num_reasoning_tokens(self) -> int:
        """Count the tokens so far that were reasoning; a delta that has both is shared by its characters."""
        return sum(round(sample.num_reasoning_tokens) for sample in self._samples)

    async def deltas(self) -> AsyncGenerator[ChatDelta, None]:
        """Give what each sample gets, in order. Closing this aborts the request. Raises what the engine raises."""
        try:
            async for answer in self._source:
                self.num_cached_tokens = self._record.num_cached_tokens = answer.num_cached_tokens
                if answer.prompt_logprobs is not None:
                    self.prompt_logprobs = answer.prompt_logprobs
                note_answer(self._record, answer)
                for sample in answer.samples:
                    yield self._samples[sample.index].take(sample)
        finally:
            await self._source.aclose()


def note_answer(record: RequestRecord, answer: AnswerDelta) -> None:
    """Add a delta to what the access log and the metrics will say of a request."""
    num_new = sum(len(sample.token_ids) for sample in answer.samples)
    if num_new:
        record.last_token_s = time.monotonic()
        record.first_token_s = record.first_token_s or record.last_token_s
        record.num_output_tokens += num_new
    if record.queue_s is None:
        record.queue_s = answer.queue_s
    record.finish_reasons += [sample.finish_reason for sample in answer.samples if sample.finish_reason is not None]


def note_prompt(record: RequestRecord, num_prompt_tokens: int, sampling: SamplingParams) -> None:
    """Add a prompt that goes to the engine to what the access log and the metrics will say of a request."""
    record.num_prompt_tokens += num_prompt_tokens
    record.num_samples = sampling.n
    record.max_tokens = sampling.max_tokens


class ChatSample:
    """One of the n samples: its parser, and what was seen of it."""

    def __init__(self, parser: AnswerParser, in_reasoning: bool, parallel_calls: bool) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0.0
        self._parser = parser
        self._in_reasoning = in_reasoning
        self._parallel_calls = parallel_calls
        self._called = self._calling = False

    def take(self, delta: SampleDelta) -> ChatDelta:
        """Take a sample's delta apart."""
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            events = events + self._parser.finish()
        self._count(delta, events)
        if not self._parallel_calls:
            events = [event for event in events if getattr(event, "index", 0) == 0]
        for event in events:
            if isinstance(event, ToolCallBegin | ToolCallEnd):
                self._calling = isinstance(event, ToolCallBegin)
                self._called = self._called or not self._calling
        # A call that has no end, cut off by a stop string or no JSON, is none that a client may run.
        called = self._called and not self._calling
        reason = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
        return ChatDelta(
            index=delta.index,
            events=events,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=reason,
            stop_reason=delta.stop_reason,
            error=delta.error,
        )

    def _count(self, delta: SampleDelta, events: list[ParseEvent]) -> None:
        num_new = len(delta.token_ids)
        self.num_tokens += num_new
        if len(events) <= 1:
            self._in_reasoning = isinstance(events[0], ReasoningPiece) if events else self._in_reasoning
            self.num_reasoning_tokens += num_new if self._in_reasoning else 0
            return
        lengths = [(isinstance(event, ReasoningPiece), len(getattr(event, "text", "") or " ")) for event in events]
        reasoning = sum(length for is_reasoning, length in lengths if is_reasoning)
        self.num_reasoning_tokens += num_new * reasoning / sum(length for _, length in lengths)
        self._in_reasoning = lengths[-1][0]


class ChatService:
    """Chats of one engine's model. Handlers share it; it keeps nothing of a request once its answer ended.

    Tokenizer and templates are read by `load`, or when first needed: the engine must have started by then.
    """

    def __init__(
        self,
        engine: EngineClient,
        renderer: Renderer = render_in_thread,
        format_name: str | None = None,
        check_form: FormCheck | None = None,
    ) -> None:
        """Take `format_name`, a format of `zif.parsing`, in place of the one that fits the model's template.

        `check_form` raises for a structured output that must not reach the engine, such as one that explodes.
        """
        self._engine = engine
        self._renderer = renderer
        self._format_name = format_name
        self._check_form = check_form
        self._absence: str | None = None
        self._loading = asyncio.Lock()
        self._prompts: Prompts | None = None
        self._format: ChatFormat | None = None

    async def load(self) -> Prompts:
        """Read tokenizer and templates, once. Raises EngineUnavailableError before the engine's first start.

        Raises RequestError when the model has no tokenizer: then only token ids go in and out.
        """
        async with self._loading:
            if self._absence is not None:
                raise RequestError(self._absence)
            if self._prompts is None:
                info = self._engine.info
                try:
                    prompts = await asyncio.to_thread(
                        Prompts.load, Path(info.folder), info.max_model_len, self._renderer
                    )
                except RequestError as error:
                    self._absence = str(error)
                    raise
                self._format = ChatFormat.of(prompts.templates, self._format_name)
                self._prompts = prompts
        return self._prompts

    async def prompts(self) -> Prompts:
        """Return the tokenizer and templates of the model."""
        return self._prompts or await self.load()

    def close(self) -> None:
        """End the threads that encode and decode."""
        if self._prompts is not None:
            self._prompts.close()

    async def render(self, turn: ChatTurn) -> ChatPrompt:
        """Return the prompt that a turn becomes. Raises RequestError for messages that the model does not take."""
        check_tools(turn)
        tools = [] if turn.tool_choice.mode is ToolMode.NONE else list(turn.tools)
        options = ChatOptions(
            add_generation_prompt=turn.add_generation_prompt,
            continue_final_message=turn.continue_final_message,
            tools=tools or None,
            variables=template_variables(turn),
        )
        prompts = await self.prompts()
        source = prompts.templates.choose(bool(tools))
        text = await prompts.render(template_messages(turn.messages, source), options)
        token_ids = await prompts.encode(text, add_special_tokens=False)
        if turn.truncate_prompt_tokens is not None:
            token_ids = token_ids[-turn.truncate_prompt_tokens :]
        return ChatPrompt(text, token_ids)

    async def start(self, turn: ChatTurn, caller: Caller, record: RequestRecord) -> ChatAnswer:
        """Ask the engine for the next message. Mutates `record` as the answer comes.

        Raises RequestError for a turn that this model cannot answer. What the engine refuses comes with the first
        delta.
        """
        prompt = await self.render(turn)
        self._check_length(len(prompt.token_ids), "messages")
        plan = self._plan(turn, prompt.text)
        samples = [
            ChatSample(plan.parser(), plan.in_reasoning, turn.tool_choice.parallel) for _ in range(plan.sampling.n)
        ]
        engine_prompt = EnginePrompt(
            token_ids=prompt.token_ids,
            cache_salt=caller.cache_salt(turn.cache_salt),
            tenant=caller.tenant,
            timeout_s=turn.timeout_s,
        )
        await self._check_plan(plan)
        note_prompt(record, len(prompt.token_ids), plan.sampling)
        return ChatAnswer(prompt, samples, self._engine.generate(engine_prompt, plan.sampling, turn.priority), record)

    def _plan(self, turn: ChatTurn, prompt: str) -> AnswerPlan:
        assert self._prompts is not None, "it was loaded for the prompt"
        assert self._format is not None, "it comes with the prompts"
        grammar = self._format.call_grammar(self._prompts.tokenizer.token_id, self._engine.info.eos_token_ids)
        return plan_answer(turn, self._format, grammar, prompt)

    async def _check_plan(self, plan: AnswerPlan) -> None:
        try:
            await self._check_structured(plan.sampling)
        except RequestError as error:
            if not plan.is_strict:
                raise
            raise RequestError(f"tools: calls cannot be held to their strict schemas: {error}") from error

    async def check(self, num_prompt_tokens: int, sampling: SamplingParams, field: str) -> None:
        """Raise ApiError for a prompt that leaves no room for an answer, RequestError for a form that is refused.

        `field` is the request's field that holds the prompt.
        """
        self._check_length(num_prompt_tokens, field)
        await self._check_structured(sampling)

    def _check_length(self, num_prompt_tokens: int, field: str) -> None:
        limit = self._engine.info.max_model_len
        if num_prompt_tokens >= limit:
            raise ApiError(
                FailureKind.INVALID,
                f"{field} has {num_prompt_tokens} tokens, and the context is {limit} for prompt and answer together;"
                " shorten it",
                param=field,
                code="context_length_exceeded",
            )

    async def _check_structured(self, sampling: SamplingParams) -> None:
        if sampling.structured is not None and self._check_form is not None:
            await self._check_form(sampling.structured)
