"""POST /tokenize and /detokenize."""

from zif.contract import SamplingParams
from zif.serving.chat.service import ChatService
from zif.serving.chat.turn import ChatTurn
from zif.serving.http.exchange import AuthScope, Request, Response, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.openai.fields import Refusal, invalid, refuse
from zif.serving.openai.messages import checked_messages, checked_tools
from zif.serving.openai.models import served_model
from zif.serving.openai.token_requests import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)

TOKENIZE_REFUSED = {"chat_template": Refusal("templates come with the model, not with requests")}


class TokensApi:
    """Texts to tokens and back."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "/tokenize",
                "POST",
                AuthScope.INFERENCE,
                self.tokenize,
                TokenizeRequest,
                summary="Return the tokens of a prompt or a chat",
                answer_type=TokenizeAnswer,
            ),
            Route(
                "/detokenize",
                "POST",
                AuthScope.INFERENCE,
                self.detokenize,
                DetokenizeRequest,
                summary="Return the text of tokens",
                answer_type=DetokenizeAnswer,
            ),
        ]

    async def tokenize(self, request: Request[TokenizeRequest], context: ServerContext) -> Response:
        """Return the tokens of a prompt or of a chat."""
        body = request.body
        request.record.model = served_model(body.model, context)
        refuse(body, TOKENIZE_REFUSED)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either 'prompt' or 'messages'", "prompt")
        prompts = await self._service.prompts()
        if body.prompt is not None:
            _check_prompt_only(body)
            token_ids = await prompts.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            token_ids = (await self._service.render(_turn(body))).token_ids
        strings = [prompts.token_spelling(token_id) for token_id in token_ids] if body.return_token_strs else None
        return json_response(TokenizeAnswer(len(token_ids), context.engine.info.max_model_len, token_ids, strings))

    async def detokenize(self, request: Request[DetokenizeRequest], context: ServerContext) -> Response:
        """Return the text of token ids. Raises ApiError for an id that the model does not have."""
        body = request.body
        request.record.model = served_model(body.model, context)
        vocab_size = context.engine.info.vocab_size
        if any(token_id >= vocab_size for token_id in body.tokens):
            raise invalid(f"'tokens' holds {max(body.tokens)}; the model's ids are 0 to {vocab_size - 1}", "tokens")
        prompts = await self._service.prompts()
        text = await prompts.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
        return json_response(DetokenizeAnswer(text))


def _turn(body: TokenizeRequest) -> ChatTurn:
    if body.add_special_tokens:
        raise invalid(
            "'add_special_tokens' has no meaning with messages: the template writes them", "add_special_tokens"
        )
    continued = bool(body.continue_final_message)
    return ChatTurn(
        messages=checked_messages(body.messages or ()),
        sampling=SamplingParams(),
        tools=checked_tools(body.tools or ()),
        variables=body.chat_template_kwargs or {},
        add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continued,
    )


def _check_prompt_only(body: TokenizeRequest) -> None:
    for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise invalid(f"{name!r} belongs to messages, and the request has a prompt; leave it out", name)
