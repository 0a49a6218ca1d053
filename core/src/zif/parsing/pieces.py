"""Small parts of the parser: events put together, and names found in headers."""

from collections.abc import Iterable

from zif.parsing.events import ParseEvent, ReasoningPiece, TextPiece, ToolCallArguments
from zif.parsing.formats import Route, State

_NAME_ENDS = " \t\n\r<"


class Pieces:
    """Events in order, with no empty pieces and none that could be joined to the one before."""

    def __init__(self) -> None:
        self._done: list[ParseEvent] = []
        self._texts: list[str] = []
        self._kind: type[TextPiece] | type[ReasoningPiece] | None = None
        self._call: int | None = None

    def add(self, event: ParseEvent) -> None:
        """Add an event after those there are."""
        if not isinstance(event, TextPiece | ReasoningPiece | ToolCallArguments):
            self._close()
            self._done.append(event)
            return
        if not event.text:
            return
        kind = None if isinstance(event, ToolCallArguments) else type(event)
        call = event.index if isinstance(event, ToolCallArguments) else None
        if (kind, call) != (self._kind, self._call):
            self._close()
            self._kind, self._call = kind, call
        self._texts.append(event.text)

    def take(self) -> list[ParseEvent]:
        """Return the events so far and forget them."""
        self._close()
        taken, self._done = self._done, []
        return taken

    def _close(self) -> None:
        text, self._texts = "".join(self._texts), []
        if text and self._kind is not None:
            self._done.append(self._kind(text))
        elif text and self._call is not None:
            self._done.append(ToolCallArguments(self._call, text))
        self._kind, self._call = None, None


def merged(events: Iterable[ParseEvent]) -> list[ParseEvent]:
    """Return events with neighbours of a kind joined: what the answer gives when it comes in one piece."""
    pieces = Pieces()
    for event in events:
        pieces.add(event)
    return pieces.take()


def name_in_text(text: str, state: State) -> str:
    """Return a tool's name out of what stands before the marker: without prefix, up to the suffix."""
    name = text.strip().removeprefix(state.prefix)
    return name if state.suffix is None else name.partition(state.suffix)[0]


def name_in_header(header: str, route: Route) -> str | None:
    """Return the name that a header gives, None where the route asks for none."""
    if route.name_after is None:
        return None
    rest = header.partition(route.name_after)[2]
    end = next((at for at, character in enumerate(rest) if character in _NAME_ENDS), len(rest))
    return rest[:end].removeprefix(route.prefix)
