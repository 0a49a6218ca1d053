"""All APIs of one engine, put together: what `zif serve` serves once its engine has started."""

import contextlib
from collections.abc import AsyncIterator

from zif.errors import RequestError
from zif.serving.answers import EngineClient
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.chat.service import ChatService
from zif.serving.http.registry import Route
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes
from zif.serving.responses.api import ResponsesApi
from zif.serving.workers.pool import GrammarVocabulary, WorkerPool


@contextlib.asynccontextmanager
async def open_apis(engine: EngineClient, settings: ServeSettings) -> AsyncIterator[list[Route]]:
    """Give the routes of every API over an engine that is ready; what they need is closed at the end.

    Raises `EngineUnavailableError` when the workers for templates and grammars do not start, `ConfigError` when
    `answer_format` names no format.
    """
    info = engine.info
    pool = WorkerPool(GrammarVocabulary(info.folder, info.vocab_size, info.eos_token_ids))
    chats = ChatService(engine, pool.render, settings.answer_format, pool.check_grammar)
    try:
        await pool.start()
        with contextlib.suppress(RequestError):  # no tokenizer: token ids go in and out, and texts are refused
            await chats.load()
        yield [*openai_routes(chats), *AnthropicApi(chats).routes(), *ResponsesApi(chats).routes()]
    finally:
        chats.close()
        await pool.close()
