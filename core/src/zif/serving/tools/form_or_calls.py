"""Answers that are text of a form, or calls instead: told apart by their first event."""

from zif.parsing.events import ParseEvent, TextPiece, ToolCallBegin
from zif.parsing.parser import Parser


class FormOrCalls:
    """The parser of such an answer. Takes over `parser`, that of the model's family.

    What the parser first takes for anything but a call makes the whole answer text, markers within it too: a text of
    a form may hold any characters. Text is held back only while it may still become a call.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser: Parser | None = parser
        self._is_calls = False
        self._held: list[str] = []

    def feed(self, text: str) -> list[ParseEvent]:
        """Take more text; return what is certain now."""
        if self._parser is None:
            return [TextPiece(text)] if text else []
        events = self._parser.feed(text)
        return events if self._is_calls else self._decide(text, events)

    def finish(self) -> list[ParseEvent]:
        """Return what was held back; no text follows."""
        if self._parser is None:
            return []
        events = self._parser.finish()
        if self._is_calls:
            return events
        decided = self._decide("", events)
        held = "".join(self._held)
        return decided or ([TextPiece(held)] if held else [])

    def _decide(self, text: str, events: list[ParseEvent]) -> list[ParseEvent]:
        self._held.append(text)
        if not events:
            return []
        held, self._held = "".join(self._held), []
        self._is_calls = isinstance(events[0], ToolCallBegin)
        if self._is_calls:
            return events
        self._parser = None
        return [TextPiece(held)]
