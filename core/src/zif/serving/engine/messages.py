"""What the two processes say to each other: typed structs, encoded as msgpack arrays.

    client -> engine     Welcome, Submit, Abort, ResetPrefixCache, Drain
    engine -> client     Hello, Starting, Ready, Deltas, Refused, Overloaded, Unavailable, Done, Stats, Compiling,
                         Draining, Failed

Every Submit gets exactly one end: a finished AnswerDelta, Refused, Overloaded or Unavailable. `id` is a random number
that the client makes; callers of HTTP neither choose nor see it. A message that does not decode ends the connection.
"""

from typing import Annotated, Any

import msgspec

from zif.contract import SamplingParams
from zif.serving.answers import AnswerDelta, EnginePrompt, EngineStats, ModelInfo

MAX_MESSAGE_BYTES = 64 * 2**20
"""More than a prompt of 10 million tokens, or the answers of a step. A peer that sends more is disconnected."""

MAX_LAUNCH_BYTES = 2**16
MAX_TEXT = 2000

MessageId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The connection stands and its folder is gone."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Answer a prompt."""

    id: MessageId
    prompt: EnginePrompt
    sampling: SamplingParams
    priority: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End a request early. Nothing happens when it has ended."""

    id: MessageId


class ResetPrefixCache(msgspec.Struct, frozen=True, array_like=True, tag="reset"):
    """Forget every computed prefix, then say Done."""

    id: MessageId


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Take no more requests, end those there are (`abort`) or finish them, then exit."""

    abort: bool


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message of an engine process."""

    pid: int


class Starting(msgspec.Struct, frozen=True, array_like=True, tag="starting"):
    """How the start goes: `done` of `total` units of a phase. Repeated while nothing changes."""

    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine takes requests."""

    info: ModelInfo


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """What requests got since the last message."""

    batch: list[tuple[int, AnswerDelta]]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """A request is wrong; others go on."""

    id: int
    message: str


class Overloaded(msgspec.Struct, frozen=True, array_like=True, tag="overloaded"):
    """The queue is full; nothing was queued."""

    id: int
    message: str
    retry_after_s: float


class Unavailable(msgspec.Struct, frozen=True, array_like=True, tag="unavailable"):
    """A request came while the engine drains."""

    id: int
    message: str


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """What a message asked for is done."""

    id: int


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """The engine's counts, sent from its loop: a hung step sends none."""

    stats: EngineStats


class Compiling(msgspec.Struct, frozen=True, array_like=True, tag="compiling"):
    """The step under way is within `compiler`: long, and not hung. Repeated while that lasts."""

    compiler: str


class Draining(msgspec.Struct, frozen=True, array_like=True, tag="draining"):
    """The engine takes no more requests and exits when those it has are finished."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The last message of an engine that cannot go on: every request is lost."""

    message: str


ToEngine = Welcome | Submit | Abort | ResetPrefixCache | Drain
FromEngine = (
    Hello
    | Starting
    | Ready
    | Deltas
    | Refused
    | Overloaded
    | Unavailable
    | Done
    | Stats
    | Compiling
    | Draining
    | Failed
)  # fmt: skip


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine process is told on its standard input, as one line of JSON, before anything else.

    `folder` is where the client's socket is or will be; `settings` are those of `EngineSettings`, `kv_events` those of
    `KVEventSettings`.
    """

    folder: str
    parent_pid: int
    name: str
    settings: dict[str, Any]
    max_queued: int
    max_queued_tokens: int
    report_s: float
    log_level: int
    kv_events: dict[str, Any] | None = None


class MessageError(Exception):
    """A peer sent what is no message, or one is too large to send."""


class Codec:
    """Encode messages, and decode those of one direction."""

    def __init__(self, received: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(received)

    def encode(self, message: ToEngine | FromEngine) -> bytes:
        """Return a message's bytes. Raises `MessageError` when they are more than the peer takes."""
        data = self._encoder.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            kind = type(message).__name__
            raise MessageError(f"{kind} has {len(data)} bytes and the limit is {MAX_MESSAGE_BYTES}; ask for less")
        return data

    def decode(self, data: bytes) -> Any:
        """Return the message of some bytes. Raises `MessageError` on anything else."""
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise MessageError(f"{len(data)} bytes are no message of this direction: {error}") from error


def shortened(text: str) -> str:
    """Return a text that fits into a message about a fault."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
