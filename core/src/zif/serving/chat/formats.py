"""How the served model writes reasoning and calls: the format of `zif.parsing` that fits its chat template."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zif.parsing.detection import detect_format
from zif.parsing.events import ParseEvent, TextPiece
from zif.parsing.formats import Format, load_format
from zif.parsing.parser import Parser
from zif.serving.tools.grammar import CallGrammar
from zif.text.chat import ChatTemplates


class PlainText:
    """The parser of answers that have no parts."""

    def feed(self, text: str) -> list[ParseEvent]:
        """Return the text."""
        return [TextPiece(text)] if text else []

    def finish(self) -> list[ParseEvent]:
        """Hold nothing back."""
        return []


class ChatFormat:
    """One model's format. A model whose templates differ with and without tools has that of the one with tools."""

    def __init__(self, form: Format) -> None:
        self._format = form
        self.needs_special_tokens = form.needs_special_tokens

    @classmethod
    def of(cls, templates: ChatTemplates, name: str | None = None) -> "ChatFormat":
        """Return the format called `name`, or the one that fits the templates. Raises ConfigError for another name."""
        if name is None:
            source = templates.sources.get("tool_use") or templates.sources.get("default", "")
            name = detect_format(source, templates.special_tokens.values())
        return cls(load_format(name))

    @property
    def name(self) -> str:
        """Return the format's name."""
        return self._format.name

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Say whether the prompt leaves reasoning open, for the answer to go on with."""
        return self._format.starts_in_reasoning(prompt)

    def parser(self, tools: Sequence[Mapping[str, Any]], in_reasoning: bool) -> Parser:
        """Return a parser of one sample, which may call `tools`."""
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        return Parser(self._format, schemas, in_reasoning)

    def call_grammar(self, token_id: Callable[[str], int | None], eos_ids: Iterable[int]) -> CallGrammar:
        """Return what writes grammars of calls. `token_id` finds tokens by their text, `eos_ids` end an answer."""
        return CallGrammar(self._format, token_id, frozenset(eos_ids))
