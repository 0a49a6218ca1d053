"""Rules of a Lark grammar under construction, in the dialect of llguidance: literals, tokens, and free text.

Tokens that a tokenizer lists beside its vocabulary are no text for a grammar: they match by their id alone
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md, special tokens). So a marker of a model family is
its token where the model has one, and text where it has not.
"""

import json
import re
from collections.abc import Callable

from zif.contract.structured import MAX_GRAMMAR_CHARACTERS
from zif.errors import RequestError

_TOKEN_LIKE = re.compile(r"(<[^<>\s]+>|\[[A-Z_/]+\])")
"""How markers are spelled: `<tool_call>`, `<|channel|>`, `[ARGS]`."""

ANY_TEXT = r"/(.|\n)*/"
UNBRACED_TEXT = r"/[ \t\r\n;]*([^{; \t\r\n](.|\n)*)?/"
"""Text that does not begin as a JSON object, nor go on after one."""


class LarkRules:
    """Collects rules. `token_id` returns the id of a token as the vocabulary spells it, None for what is no token.

    `free_text` is the regular expression of the text between markers.
    """

    def __init__(self, token_id: Callable[[str], int | None], free_text: str = ANY_TEXT) -> None:
        self._token_id = token_id
        self._lines: list[str] = []
        self._num_left = MAX_GRAMMAR_CHARACTERS
        self._reached: dict[str, str] = {}
        self.add("TEXT", free_text)

    @property
    def text(self) -> str:
        """Return the grammar."""
        return "\n".join(self._lines)

    def add(self, name: str, body: str) -> str:
        """Add a rule; return its name. Raises RequestError once the grammar is longer than one may be."""
        line = f"{name}: {body}"
        self._num_left -= len(line) + 1
        if self._num_left < 0:
            raise RequestError(
                f"tools: their calls need too long a grammar, of more than {MAX_GRAMMAR_CHARACTERS} characters; make"
                " fewer tools strict, or simplify their schemas"
            )
        self._lines.append(line)
        return name

    def short(self, body: str, max_characters: int) -> str:
        """Return an expression that may stand more than once: `body` where it is short, else a rule of it."""
        return body if len(body) <= max_characters else self.add(f"part{len(self._lines)}", body)

    def literal(self, text: str) -> str:
        """Return the expression of a fixed text, with the model's own tokens for the markers in it."""
        found, plain = [], ""
        for piece in _TOKEN_LIKE.split(text):
            token_id = self._token_id(piece) if _TOKEN_LIKE.fullmatch(piece) else None
            if token_id is None:
                plain += piece
                continue
            found += [json.dumps(plain), f"<[{token_id}]>"] if plain else [f"<[{token_id}]>"]
            plain = ""
        return " ".join([*found, json.dumps(plain)] if plain else found)

    def up_to(self, marker: str) -> str:
        """Return a rule of free text that ends with the first `marker`, be it the token or the same text."""
        name = self._reached.get(marker)
        if name is None:
            name = self._reached[marker] = f"upto{len(self._reached)}"
            token_id = self._token_id(marker)
            spelled = self.add(f"{name}_spelled[lazy]", f"TEXT {json.dumps(marker)}").removesuffix("[lazy]")
            self.add(name, spelled if token_id is None else f"{spelled} | TEXT <[{token_id}]>")
        return name
