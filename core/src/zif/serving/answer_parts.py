"""An answer's parts in order: text, reasoning, tool calls, each from its begin to its end.

APIs whose answers are lists of blocks or items write these events down; the chat API, which has one field for each
kind, has no use for them. The parts, and the merged text of each, do not depend on how the answer was cut into deltas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from zif.parsing.events import ParseEvent, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd


class PartKind(Enum):
    """What a part is."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


@dataclass(slots=True)
class Part:
    """One part. `name` is the tool's; `whole` is False for a call until its end was read, for others always True."""

    index: int
    kind: PartKind
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    whole: bool = True

    @property
    def text(self) -> str:
        """Return the text, or the JSON of a call's arguments, so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class PartBegun:
    """A part begins; the one before has ended."""

    part: Part


@dataclass(frozen=True, slots=True)
class PartGrown:
    """A part got more text, which `part` has already."""

    part: Part
    text: str


@dataclass(frozen=True, slots=True)
class PartEnded:
    """A part is complete."""

    part: Part


PartEvent = PartBegun | PartGrown | PartEnded


class AnswerParts:
    """Tracks the parts of one answer. `parts` are those begun so far.

    Blank text between parts, such as the empty line that models write after thinking, makes no part of its own, and
    neither does blank reasoning. An answer that is nothing but blank keeps it as text.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._current: Part | None = None
        self._held_kind = PartKind.TEXT
        self._held: list[str] = []

    def take(self, events: Sequence[ParseEvent]) -> list[PartEvent]:
        """Take what the parser found; return what that means for the parts."""
        found: list[PartEvent] = []
        for event in events:
            match event:
                case TextPiece(text):
                    self._take_text(PartKind.TEXT, text, found)
                case ReasoningPiece(text):
                    self._take_text(PartKind.REASONING, text, found)
                case ToolCallBegin(name=name):
                    self._begin(PartKind.CALL, found, name)
                case ToolCallArguments(text=text):
                    self._grow(text, found)
                case ToolCallEnd():
                    self._complete()
                    self._end(found)
        return found

    def finish(self) -> list[PartEvent]:
        """End what is open: the answer is over. A call that is open was cut off."""
        found: list[PartEvent] = []
        if not self.parts and self._held:
            text = "".join(self._held)
            self._begin(PartKind.TEXT, found)
            self._grow(text, found)
        self._end(found)
        return found

    def _take_text(self, kind: PartKind, text: str, found: list[PartEvent]) -> None:
        if self._current is not None and self._current.kind is kind:
            self._held = []
            self._grow(text, found)
            return
        if self._held_kind is not kind:
            self._held_kind = kind
            self._held = []
        self._held.append(text)
        if text.strip():
            text = "".join(self._held)
            self._begin(kind, found)
            self._grow(text, found)

    def _begin(self, kind: PartKind, found: list[PartEvent], name: str = "") -> None:
        self._end(found)
        self._held = []
        self._current = Part(len(self.parts), kind, name, whole=kind is not PartKind.CALL)
        self.parts.append(self._current)
        found.append(PartBegun(self._current))

    def _grow(self, text: str, found: list[PartEvent]) -> None:
        assert self._current is not None, "arguments come between a call's begin and its end"
        if text:
            self._current.pieces.append(text)
            found.append(PartGrown(self._current, text))

    def _complete(self) -> None:
        assert self._current is not None, "a call ends once"
        self._current.whole = True

    def _end(self, found: list[PartEvent]) -> None:
        if self._current is not None:
            found.append(PartEnded(self._current))
            self._current = None
