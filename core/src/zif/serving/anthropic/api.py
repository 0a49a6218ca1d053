"""The routes of the Messages API: /v1/messages and /v1/messages/count_tokens."""

from zif.serving.answer_events import event_frames, read_whole
from zif.serving.anthropic.answers import PING, MessageAnswer, MessageWriter, TokenCount
from zif.serving.anthropic.chats import chat_of
from zif.serving.anthropic.errors import AnthropicErrors
from zif.serving.anthropic.requests import NO_EFFECT, NO_EFFECT_CREATE, CountTokens, CreateMessage
from zif.serving.chat.service import ChatService
from zif.serving.http.exchange import AuthScope, Request, Response, Stream, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.models import served_model


class AnthropicApi:
    """The Messages API on the chats of one model. The headers `anthropic-version` and `anthropic-beta` are accepted:
    one version is spoken, and fields of betas are refused or served by name."""

    def __init__(self, chats: ChatService) -> None:
        self._chats = chats

    def routes(self) -> list[Route]:
        """Return the routes."""
        errors = AnthropicErrors()
        return [
            Route(
                "/v1/messages", "POST", AuthScope.INFERENCE, self.create, CreateMessage,
                errors=errors, no_effect=NO_EFFECT_CREATE, asks_engine=True,
                summary="Answer a chat with the next message", answer_type=MessageAnswer,
            ),
            Route(
                "/v1/messages/count_tokens", "POST", AuthScope.INFERENCE, self.count, CountTokens,
                errors=errors, no_effect=NO_EFFECT, summary="Count the tokens that a chat's prompt has",
                answer_type=TokenCount,
            ),
        ]  # fmt: skip

    async def create(self, request: Request[CreateMessage], context: ServerContext) -> Response | Stream:
        """Answer a chat, whole or as a stream."""
        body = request.body
        model = request.record.model = served_model(body.model, context)
        turn = chat_of(body, context.engine.info.default_sampling)
        answer = await self._chats.start(turn, request.caller, request.record)
        omit_thinking = body.thinking is not None and body.thinking.display == "omitted"
        writer = MessageWriter(model, answer, body.max_tokens, omit_thinking)
        headers = {"request-id": request.id}
        if body.stream:
            return Stream(event_frames(answer, writer), keep_alive=PING, headers=headers)
        await read_whole(answer, writer)
        assert writer.ended, "an engine's answer ends with a reason"
        return json_response(writer.message(), headers=headers)

    async def count(self, request: Request[CountTokens], context: ServerContext) -> Response:
        """Count the tokens of the prompt that a chat becomes."""
        request.record.model = served_model(request.body.model, context)
        prompt = await self._chats.render(chat_of(request.body, context.engine.info.default_sampling))
        return json_response({"input_tokens": len(prompt.token_ids)}, headers={"request-id": request.id})
