"""The routes of the Responses API: /v1/responses and /v1/responses/input_tokens.

Nothing is kept: each request brings its whole chat, and there is no response to be asked for later.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from zif.errors import RequestError
from zif.serving.answer_events import event_frames, read_whole
from zif.serving.answers import EngineUnavailableError, OverloadedError
from zif.serving.chat.service import ChatAnswer, ChatService
from zif.serving.http.errors import ApiError, failure_of
from zif.serving.http.exchange import AuthScope, Request, RequestRecord, Response, Stream, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.models import served_model
from zif.serving.responses.answers import InputTokens, ResponseAnswer, ResponseWriter
from zif.serving.responses.chats import chat_of, tools_of
from zif.serving.responses.echo import echo_of
from zif.serving.responses.requests import NO_EFFECT, NO_EFFECT_CREATE, CountInputTokens, CreateResponse


class ResponsesApi:
    """The Responses API on the chats of one model."""

    def __init__(self, chats: ChatService) -> None:
        self._chats = chats

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "/v1/responses",
                "POST",
                AuthScope.INFERENCE,
                self.create,
                CreateResponse,
                no_effect=NO_EFFECT_CREATE,
                asks_engine=True,
                summary="Answer items with the next items",
                answer_type=ResponseAnswer,
            ),
            Route(
                "/v1/responses/input_tokens",
                "POST",
                AuthScope.INFERENCE,
                self.count,
                CountInputTokens,
                no_effect=NO_EFFECT,
                summary="Count the tokens of the prompt that items become",
                answer_type=InputTokens,
            ),
        ]

    async def create(self, request: Request[CreateResponse], context: ServerContext) -> Response | Stream:
        """Answer a chat, whole or as a stream."""
        body = request.body
        model = request.record.model = served_model(body.model, context)
        turn = chat_of(body, context.engine.info.default_sampling)
        answer = await self._chats.start(turn, request.caller, request.record)
        writer = ResponseWriter(answer, echo_of(body, model, turn.sampling, tools_of(body).tools))
        if body.stream:
            return Stream(_frames(answer, writer, request.record))
        await read_whole(answer, writer)
        return json_response(writer.response())

    async def count(self, request: Request[CountInputTokens], context: ServerContext) -> Response:
        """Count the tokens of the prompt that items become."""
        request.record.model = served_model(request.body.model, context)
        prompt = await self._chats.render(chat_of(request.body, context.engine.info.default_sampling))
        return json_response({"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)})


async def _frames(answer: ChatAnswer, writer: ResponseWriter, record: RequestRecord) -> AsyncGenerator[bytes, None]:
    """Write an answer's events. A stream that has begun ends with the response's own failure: clients wait for it."""
    begun = False
    try:
        async with aclosing(event_frames(answer, writer)) as events:
            async for frames in events:
                begun = True
                yield frames
    except (ApiError, RequestError, OverloadedError, EngineUnavailableError) as error:
        if not begun:
            raise
        failure = failure_of(error, record.request_id)
        record.failure = failure.kind.value
        yield writer.fail(failure)
