"""POST /v1/completions, and what its prompts are: /v1/completions/render."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from zif.contract import SamplingParams
from zif.serving.answers import AnswerDelta, EngineClient, EnginePrompt
from zif.serving.chat_service import ChatService, note_answer, note_prompt
from zif.serving.http.exchange import AuthScope, Request, RequestRecord, Response, Stream, event, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.completion_answer import Completion, CompletionChoice
from zif.serving.openai.completion_request import (
    COMPLETION_NO_EFFECT,
    CompletionRequest,
    TextOrTokens,
    check_completion,
    completion_sampling,
    prompts_of,
)
from zif.serving.openai.completion_writer import CompletionStyle, PromptAnswer, joined
from zif.serving.openai.logprobs import TokenNames
from zif.serving.openai.models import served_model
from zif.serving.openai.samples import Item, merged
from zif.serving.openai.token_requests import RenderedPrompt, sampling_json
from zif.serving.openai.usage import Usage, origin_of, usage_of

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
                summary="Complete text",
            ),
            Route(
                "/v1/completions/render",
                "POST",
                AuthScope.INFERENCE,
                self.render,
                CompletionRequest,
                no_effect=COMPLETION_NO_EFFECT,
                summary="Return the tokens of prompts",
            ),
        ]

    async def create(self, request: Request[CompletionRequest], context: ServerContext) -> Response | Stream:
        """Complete one or several prompts, whole or as a stream."""
        body, engine = request.body, context.engine
        model = served_model(body.model, context)
        check_completion(body)
        sampling = completion_sampling(body, engine.info.default_sampling)
        prompts = await self._service.prompts()
        given = await prompts_of(body, prompts)
        await self._service.check(max(len(prompt.token_ids) for prompt in given), sampling, "prompt")
        names = TokenNames(prompts.token_spelling, bool(body.return_tokens_as_token_ids))
        style = CompletionStyle.of(body, origin_of("cmpl", request.id, model, engine.info), names)
        answers = []
        for index, prompt in enumerate(given):
            echoed = await self._echoed(prompt) if body.echo else None
            first = prompts.token_text(prompt.token_ids[0]) if echoed is not None and prompt.token_ids else ""
            answers.append(PromptAnswer(index * sampling.n, prompt.token_ids, echoed, first, style))
        request.record.model, request.record.streamed = model, bool(body.stream)
        source = merged(_asked(engine, request, given, sampling), PROMPTS_AT_ONCE)
        if body.stream:
            return Stream(_chunks(source, answers, style, request.record))
        return json_response(await _whole(source, answers, style, request.record))

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

    async def _echoed(self, prompt: TextOrTokens) -> str:
        """Return a prompt's text as it is repeated: as it came, or as its tokens read."""
        if prompt.text is not None:
            return prompt.text
        prompts = await self._service.prompts()
        return await prompts.decode(prompt.token_ids)


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


async def _whole(
    source: AsyncGenerator[Item[AnswerDelta], None],
    answers: list[PromptAnswer],
    style: CompletionStyle,
    record: RequestRecord,
) -> Completion:
    pieces: dict[int, list[CompletionChoice]] = {}
    async with aclosing(source) as items:
        async for item in items:
            if item.value is not None:
                for choice in _taken(answers[item.source], item.value, record):
                    pieces.setdefault(choice.index, []).append(choice)
    choices = [joined(pieces[index]) for index in sorted(pieces)]
    for answer in answers:
        answer.complete(choices)
    return style.completion(choices, _usage(answers))


async def _chunks(
    source: AsyncGenerator[Item[AnswerDelta], None],
    answers: list[PromptAnswer],
    style: CompletionStyle,
    record: RequestRecord,
) -> AsyncGenerator[bytes, None]:
    async with aclosing(source) as items:
        async for item in items:
            if item.value is None:
                continue
            frames = b""
            for choice in _taken(answers[item.source], item.value, record):
                frames += event(_encode(style.chunk([choice], _usage(answers) if style.usage_in_chunks else None)))
            if frames:
                yield frames
    if style.usage_at_end:
        yield event(_encode(style.completion([], _usage(answers))))
    yield event(b"[DONE]")


def _taken(answer: PromptAnswer, delta: AnswerDelta, record: RequestRecord) -> list[CompletionChoice]:
    record.num_cached_tokens += answer.new_cached_tokens(delta)
    note_answer(record, delta)
    return answer.take(delta)


def _usage(answers: list[PromptAnswer]) -> Usage:
    return usage_of(
        sum(len(answer.prompt_token_ids) for answer in answers),
        sum(answer.num_tokens for answer in answers),
        sum(answer.num_cached_tokens for answer in answers),
    )
