"""What crosses between a pool and its workers: frames on pipes, each a length and one struct as msgpack.

A frame is four bytes of length, big-endian, then the body. The first to a worker is its `WorkerSetup`, answered when it
is ready; then each `Task` is answered by one `Outcome`. Lengths are checked before anything is allocated.
"""

import struct
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from zif.contract import StructuredOutput

S = TypeVar("S", bound=msgspec.Struct)

FRAME_HEADER = struct.Struct(">I")
MAX_TASK_BYTES = 16 << 20
MAX_OUTPUT_BYTES = 8 << 20
MAX_FRAME_BYTES = MAX_TASK_BYTES + 4096
"""A frame of either direction: a task or an outcome with its envelope."""


class TaskName(StrEnum):
    """What a worker can do. There is no other way to name code."""

    CHECK_GRAMMAR = "grammar.check"
    RENDER_TEMPLATE = "template.render"


class WorkerSetup(msgspec.Struct, frozen=True, array_like=True):
    """What a worker is started with.

    `folder` holds the tokenizer that grammars are compiled for; empty where only templates are rendered. It must not
    outlive `parent_pid`.
    """

    parent_pid: int
    time_limit_s: float
    memory_limit_bytes: int
    folder: str = ""
    vocab_size: int = 0
    eos_ids: list[int] = []


class Task(msgspec.Struct, frozen=True, array_like=True):
    """One call. `payload` is what the task takes, as `encoded` writes it."""

    name: TaskName
    payload: bytes


class OutcomeKind(StrEnum):
    """How a task ended: with a result, with a request that is wrong, or with a fault of zif or of the model."""

    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a task. `value` is the msgpack of the result; `reason` says why there is none."""

    kind: OutcomeKind
    value: bytes = b""
    reason: str = ""


class GrammarTask(msgspec.Struct, frozen=True, array_like=True):
    """Compile a form and compute its first mask."""

    form: StructuredOutput


class GrammarCost(msgspec.Struct, frozen=True, array_like=True):
    """What compiling took, in seconds of the worker's processor."""

    compile_s: float


class RenderTask(msgspec.Struct, frozen=True, array_like=True):
    """Render a conversation; the fields are those of `zif.text.chat`'s `ChatTemplates` and `ChatOptions`."""

    sources: dict[str, str]
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


def encoded(payload: msgspec.Struct) -> bytes:
    """Return what a task takes, an array, as msgpack; as JSON, fifty times slower, where it has longer integers."""
    try:
        return msgspec.msgpack.encode(payload)
    except OverflowError:
        return msgspec.json.encode(payload)


def decoded(payload: bytes, kind: type[S]) -> S:
    """Return what `encoded` was given. No array of msgpack begins with the bracket of JSON's."""
    decode = msgspec.json.decode if payload.startswith(b"[") else msgspec.msgpack.decode
    return decode(payload, type=kind)


def frame(value: msgspec.Struct) -> bytes:
    """Return a struct as a frame."""
    body = msgspec.msgpack.encode(value)
    return FRAME_HEADER.pack(len(body)) + body
