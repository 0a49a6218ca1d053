"""What a parser finds in an answer, piece by piece, in order. The same however the answer was cut into deltas."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the text that the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call of the tool `name` begins, the `index`-th of the answer, from 0. Its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call `index`: a piece of one JSON object's text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """Call `index` is whole. A call that the answer's end cut off has none."""

    index: int


ParseEvent = TextPiece | ReasoningPiece | ToolCallBegin | ToolCallArguments | ToolCallEnd
