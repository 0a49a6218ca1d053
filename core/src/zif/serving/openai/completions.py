"""POST /v1/completions, and what its prompts are: /v1/completions/render."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec

from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.serving.answers import AnswerDelta, EngineClient, EnginePrompt
from zif.serving.chat.service import ChatService, note_answer, note_prompt
from zif.serving.http.exchange import AuthScope, Request, RequestRecord, Response, Stream, event, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.completion_answer import Completion, CompletionChoice
from zif.serving.openai.completion_request import (
    COMPLETION_NO_EFFECT,
    CompletionRequest,
    TextOrTokens,
    check_completion,
    completion_sampling,
    is_text,
    prompts_of,
)
from zif.serving.openai.completion_writer import CompletionStyle, PromptAnswer, joined
from zif.serving.openai.logprobs import TokenNames, written
from zif.serving.openai.models import served_model
from zif.serving.openai.samples import Item, merged
from zif.serving.openai.token_requests import RenderedPrompt, sampling_json
from zif.serving.openai.usage import Usage, origin_of, usage_of
from zif.serving.prompts import Prompts

PROMPTS_AT_ONCE = 64
"""Of one request, in the engine: so that one long list does not fill everybody's queue."""

_encode = msgspec.json.Encoder().encode


class CompletionsApi:
    """Completions by one model."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "/v1/completions",
                "POST",
                AuthScope.INFERENCE,
                self.create,
                CompletionRequest,
                no_effect=COMPLETION_NO_EFFECT,
                asks_engine=True,
                summary="Complete text",
                answer_type=Completion,
            ),
            Route(
                "/v1/completions/render",
                "POST",
                AuthScope.INFERENCE,
                self.render,
                CompletionRequest,
                no_effect=COMPLETION_NO_EFFECT,
                summary="Return the tokens of prompts",
                answer_type=list[RenderedPrompt],
            ),
        ]

    async def create(self, request: Request[CompletionRequest], context: ServerContext) -> Response | Stream:
        """Complete one or several prompts, whole or as a stream."""
        body, engine = request.body, context.engine
        model = served_model(body.model, context)
        check_completion(body)
        sampling = completion_sampling(body, engine.info.default_sampling)
        prompts = await self._prompts_for(body)
        if prompts is None:
            sampling = replace(sampling, detokenize=False)
        given = await prompts_of(body, prompts)
        await self._service.check(max(len(prompt.token_ids) for prompt in given), sampling, "prompt")
        as_ids = prompts is None or bool(body.return_tokens_as_token_ids)
        names = TokenNames(_unspelled if prompts is None else prompts.token_spelling, as_ids)
        style = CompletionStyle.of(body, origin_of("cmpl", request.id, model, engine.info), names)
        run = CompletionRun(
            [await self._answer(index, prompt, body, style) for index, prompt in enumerate(given)], request.record
        )
        request.record.model, request.record.streamed = model, bool(body.stream)
        source = merged(_asked(engine, request, given, sampling), PROMPTS_AT_ONCE)
        if body.stream:
            return Stream(_chunks(source, run, style))
        return json_response(await _whole(source, run, style))

    async def render(self, request: Request[CompletionRequest], context: ServerContext) -> Response:
        """Return each prompt as the model sees it."""
        body, info = request.body, context.engine.info
        model = request.record.model = served_model(body.model, context)
        check_completion(body)
        sampling = sampling_json(completion_sampling(body, info.default_sampling))
        given = await prompts_of(body, await self._service.prompts())
        return json_response(
            [
                RenderedPrompt(
                    request_id=f"cmpl-{request.id}-{index}",
                    model=model,
                    token_ids=prompt.token_ids,
                    sampling_params=sampling,
                    max_model_len=info.max_model_len,
                    prompt=prompt.text,
                )
                for index, prompt in enumerate(given)
            ]
        )

    async def _prompts_for(self, body: CompletionRequest) -> Prompts | None:
        """Return the model's tokenizer; None where it has none and only token ids go in and out."""
        try:
            return await self._service.prompts()
        except RequestError as error:
            if is_text(body.prompt) or body.echo or not body.return_token_ids:
                raise RequestError(
                    f"{error}; it takes token ids as 'prompt', and answers in them with return_token_ids=true"
                ) from error
            return None

    async def _answer(
        self, index: int, prompt: TextOrTokens, body: CompletionRequest, style: CompletionStyle
    ) -> PromptAnswer:
        """Return where the answers to prompt `index` are written."""
        first_index = index * (body.n or 1)
        if not body.echo:
            return PromptAnswer(first_index, prompt.token_ids, None, "", style)
        # Short prompts are decoded on the event loop: between two of them others get their turn.
        await asyncio.sleep(0)
        prompts = await self._service.prompts()
        first = prompts.token_text(prompt.token_ids[0]) if prompt.token_ids else ""
        return PromptAnswer(first_index, prompt.token_ids, await self._echoed(prompt), first, style)

    async def _echoed(self, prompt: TextOrTokens) -> str:
        """Return a prompt's text as it is repeated: as it came, or as its tokens read."""
        if prompt.text is not None:
            return prompt.text
        prompts = await self._service.prompts()
        return await prompts.decode(prompt.token_ids)


def _unspelled(token_id: int) -> str | None:
    return None


def _asked(
    engine: EngineClient,
    request: Request[CompletionRequest],
    given: list[TextOrTokens],
    sampling: SamplingParams,
) -> list[AsyncGenerator[AnswerDelta, None]]:
    """Return the engine's answers, none of which it has been asked for yet."""
    caller, salt = request.caller, request.caller.cache_salt(request.body.cache_salt or "")
    sources = []
    for prompt in given:
        note_prompt(request.record, len(prompt.token_ids), sampling)
        engine_prompt = EnginePrompt(prompt.token_ids, cache_salt=salt, tenant=caller.tenant)
        sources.append(engine.generate(engine_prompt, sampling, request.body.priority or 0))
    return sources


class CompletionRun:
    """All prompts of a request while they are answered, and what they have come to."""

    def __init__(self, answers: list[PromptAnswer], record: RequestRecord) -> None:
        self.answers = answers
        self._record = record
        self._num_prompt_tokens = sum(len(answer.prompt_token_ids) for answer in answers)
        self._num_tokens = 0

    async def take(self, item: Item[AnswerDelta]) -> list[CompletionChoice]:
        """Return the pieces of choices that one prompt got. Raises ApiError for a sample that ended by a fault."""
        if item.value is None:
            return []
        answer = self.answers[item.source]
        self._record.num_cached_tokens += answer.new_cached_tokens(item.value)
        note_answer(self._record, item.value)
        num_before = answer.num_tokens
        choices = await answer.take(item.value)
        self._num_tokens += answer.num_tokens - num_before
        return choices

    def usage(self) -> Usage:
        """Return the counts so far."""
        return usage_of(self._num_prompt_tokens, self._num_tokens, self._record.num_cached_tokens)


async def _whole(
    source: AsyncGenerator[Item[AnswerDelta], None], run: CompletionRun, style: CompletionStyle
) -> Completion:
    pieces: dict[int, dict[int, list[CompletionChoice]]] = {}
    whole: dict[int, CompletionChoice] = {}
    async with aclosing(source) as items:
        async for item in items:
            of_prompt = pieces.setdefault(item.source, {})
            for piece in await run.take(item):
                of_prompt.setdefault(piece.index, []).append(piece)
            if item.value is not None:
                continue
            # What has ended is written now: thousands of choices at the end would hold up everybody else.
            for index, found in pieces.pop(item.source).items():
                choice = joined(found)
                await run.answers[item.source].complete(choice)
                whole[index] = written(choice)
                await asyncio.sleep(0)
    return style.completion([whole[index] for index in sorted(whole)], run.usage())


async def _chunks(
    source: AsyncGenerator[Item[AnswerDelta], None], run: CompletionRun, style: CompletionStyle
) -> AsyncGenerator[bytes, None]:
    async with aclosing(source) as items:
        async for item in items:
            frames = b""
            for choice in await run.take(item):
                frames += event(_encode(style.chunk([choice], run.usage() if style.usage_in_chunks else None)))
            if frames:
                yield frames
    if style.usage_at_end:
        yield event(_encode(style.completion([], run.usage())))
    yield event(b"[DONE]")
