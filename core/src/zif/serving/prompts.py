"""The model's tokenizer and chat template on the HTTP side, so that the engine's process sees token ids only.

Short texts are encoded at once; long ones in a thread, where the tokenizer runs without Python's lock. Templates are
rendered by whatever `renderer` the server was given: a killable worker, or a thread of its own (`render_in_thread`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from zif.engine.vocabulary import check_encodable
from zif.errors import ConfigError, ModelError, RequestError
from zif.text.chat import ChatOptions, ChatTemplates, load_chat_templates, render_chat
from zif.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

R = TypeVar("R")

INLINE_CHARACTERS = 4096
"""Encoding this much takes about a millisecond: less than a hop to a thread under load, far less than a stall."""

MAX_DECODED_TOKENS = 2**20
NUM_THREADS = 2
MIN_LONGEST_TOKEN = 64
"""A tokenizer may turn a long word into one unknown token: no text is refused for fewer characters a token."""

Renderer = Callable[[ChatTemplates, Sequence[Mapping[str, Any]], ChatOptions], Awaitable[str]]
"""Renders messages as `zif.text.chat.render_chat` does, within limits of time and memory. Raises RequestError."""


async def render_in_thread(
    templates: ChatTemplates, messages: Sequence[Mapping[str, Any]], options: ChatOptions
) -> str:
    """Render in a thread. Nothing ends a template that loops: for models whose template is trusted."""
    return await asyncio.to_thread(render_chat, templates, messages, options)


class Prompts:
    """Texts to token ids and back, and messages to texts, for one model. Close it to end its threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        max_model_len: int,
        renderer: Renderer = render_in_thread,
    ) -> None:
        self.tokenizer = tokenizer
        self.templates = templates
        self._renderer = renderer
        longest = max((len(token) for token in tokenizer.vocab()), default=1)
        self._max_characters = max(longest, MIN_LONGEST_TOKEN) * max_model_len
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="zif-text")

    @classmethod
    def load(cls, folder: Path, max_model_len: int, renderer: Renderer = render_in_thread) -> "Prompts":
        """Read tokenizer and templates of a model folder. Raises RequestError when there is no usable tokenizer."""
        try:
            return cls(load_tokenizer(folder), load_chat_templates(folder), max_model_len, renderer)
        except (ModelError, ConfigError) as error:
            _log.error("no tokenizer or chat template for requests: %s", error)
            raise RequestError("the model has no tokenizer that can be read here; the server's log says why") from error

    async def encode(self, text: str, *, add_special_tokens: bool = True, name: str = "prompt") -> list[int]:
        """Return the tokens of a text. Raises RequestError for one that no context holds, or that has no UTF-8 form.

        `name` is the request's field that the error names.
        """
        self._check(text, name)
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await self._in_thread(self.tokenizer.encode, text, add_special_tokens)

    async def encode_pair(self, first: str, second: str) -> list[int]:
        """Return the tokens of two texts as the tokenizer puts a pair together. Raises as `encode` does."""
        self._check(first, "the first text of a pair")
        self._check(second, "the second text of a pair")
        if len(first) + len(second) <= INLINE_CHARACTERS:
            return self.tokenizer.encode_pair(first, second)
        return await self._in_thread(self.tokenizer.encode_pair, first, second)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; ids without a token give nothing. At most `MAX_DECODED_TOKENS`."""
        if len(token_ids) > MAX_DECODED_TOKENS:
            raise RequestError(f"tokens has {len(token_ids)} entries; at most {MAX_DECODED_TOKENS} are decoded at once")
        if len(token_ids) <= INLINE_CHARACTERS // 4:
            return self.tokenizer.decode(token_ids, skip_special_tokens)
        return await self._in_thread(self.tokenizer.decode, token_ids, skip_special_tokens)

    async def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """Render messages with the model's own template."""
        return await self._renderer(self.templates, messages, options)

    def token_spelling(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, None for an id without a token."""
        return self.tokenizer.token_text(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself; bytes that make no character are U+FFFD."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def close(self) -> None:
        """End the threads; what they work on is finished first."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _check(self, text: str, name: str) -> None:
        """Raise RequestError for a text that cannot be a prompt."""
        if len(text) > self._max_characters:
            raise RequestError(
                f"{name} has {len(text)} characters, more than a context of {self._max_model_len} tokens can hold"
                f" (at most {self._max_characters}); shorten it"
            )
        check_encodable(name, text)

    async def _in_thread(self, function: Callable[..., R], *args: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
