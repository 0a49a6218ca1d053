"""POST /v1/chat/completions, and what its prompt is: /v1/chat/completions/render."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from zif.serving.chat.service import ChatAnswer, ChatService, ChatTurn
from zif.serving.http.exchange import AuthScope, Request, Response, Stream, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.chat_answer import ChatCompletion
from zif.serving.openai.chat_request import CHAT_NO_EFFECT, ChatRequest, turn_of
from zif.serving.openai.chat_writer import ChatStyle, ChunkWriter, WholeSample, completion_of
from zif.serving.openai.fields import invalid
from zif.serving.openai.logprobs import TokenNames
from zif.serving.openai.models import served_model
from zif.serving.openai.token_requests import RenderedPrompt, sampling_json
from zif.serving.openai.usage import origin_of

_EFFORT_VARIABLES = ("reasoning_effort", "enable_thinking", "thinking")
"""By these names templates learn how much to think."""


class ChatApi:
    """Chats of one model in the form of the chat API."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "/v1/chat/completions",
                "POST",
                AuthScope.INFERENCE,
                self.create,
                ChatRequest,
                no_effect=CHAT_NO_EFFECT,
                asks_engine=True,
                summary="Answer a chat",
                answer_type=ChatCompletion,
            ),
            Route(
                "/v1/chat/completions/render",
                "POST",
                AuthScope.INFERENCE,
                self.render,
                ChatRequest,
                no_effect=CHAT_NO_EFFECT,
                summary="Return the tokens of a chat's prompt",
                answer_type=RenderedPrompt,
            ),
        ]

    async def create(self, request: Request[ChatRequest], context: ServerContext) -> Response | Stream:
        """Answer a chat, whole or as a stream."""
        body = request.body
        model = served_model(body.model, context)
        turn = await self._turn(body, context)
        prompts = await self._service.prompts()
        names = TokenNames(prompts.token_spelling, bool(body.return_tokens_as_token_ids))
        style = ChatStyle.of(body, origin_of("chatcmpl", request.id, model, context.engine.info), names)
        request.record.model, request.record.streamed = model, bool(body.stream)
        answer = await self._service.start(turn, request.caller, request.record)
        if body.stream:
            return Stream(_chunks(answer, turn.sampling.n, style))
        return json_response(await _whole(answer, turn.sampling.n, style))

    async def render(self, request: Request[ChatRequest], context: ServerContext) -> Response:
        """Return the prompt that a chat becomes."""
        model = served_model(request.body.model, context)
        request.record.model = model
        turn = await self._turn(request.body, context)
        prompt = await self._service.render(turn)
        rendered = RenderedPrompt(
            request_id=f"chatcmpl-{request.id}",
            model=model,
            token_ids=prompt.token_ids,
            sampling_params=sampling_json(turn.sampling),
            max_model_len=context.engine.info.max_model_len,
            prompt=prompt.text,
        )
        return json_response(rendered)

    async def _turn(self, body: ChatRequest, context: ServerContext) -> ChatTurn:
        turn = turn_of(body, context.engine.info.default_sampling)
        if body.reasoning_effort not in (None, "none"):
            source = (await self._service.prompts()).templates.choose(bool(turn.tools))
            if not any(name in source for name in _EFFORT_VARIABLES):
                raise invalid(
                    "'reasoning_effort' is not supported: the model's chat template has no such control; leave it out",
                    "reasoning_effort",
                    "unsupported_parameter",
                )
        return turn


async def _whole(answer: ChatAnswer, num_samples: int, style: ChatStyle) -> object:
    samples = [WholeSample(style) for _ in range(num_samples)]
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            samples[delta.index].take(delta)
    return await completion_of(answer, samples, style)


async def _chunks(answer: ChatAnswer, num_samples: int, style: ChatStyle) -> AsyncGenerator[bytes, None]:
    writer = ChunkWriter(answer, style)
    head = writer.first(num_samples)
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            # Nothing is sent before the engine has answered: until then an error can still become a status.
            if frame := head + writer.chunk(delta):
                head = b""
                yield frame
    yield writer.last()
