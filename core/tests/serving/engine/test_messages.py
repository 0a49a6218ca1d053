"""The messages of the two processes: what goes in comes out, and what is none is refused."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zif import SamplingParams
from zif.serving.answers import AnswerDelta, EnginePrompt, SampleDelta, TokenLogprob
from zif.serving.engine import messages
from zif.serving.engine.messages import (
    Abort,
    Codec,
    Compiling,
    Deltas,
    Drain,
    Failed,
    FromEngine,
    Hello,
    MessageError,
    Overloaded,
    Refused,
    ResetPrefixCache,
    Starting,
    Submit,
    ToEngine,
    Welcome,
)

SAMPLING = SamplingParams(
    n=2, temperature=0.5, logit_bias={3: -1.5}, allowed_token_ids=[1, 2], stop=["a", "b"], seed=-7, logprobs=3
)  # fmt: skip
SUBMIT = Submit(2**63 - 1, EnginePrompt([1, 2, 3], None, "salt", "tenant", 2.5), SAMPLING, -4)
DELTA = AnswerDelta(
    [SampleDelta(1, "text", [7], [[TokenLogprob(7, -0.5, 1, "t")]], "stop", "b", None)], True, 3, 2, [None, []], 0.25
)


@pytest.mark.parametrize("message", [Welcome(), SUBMIT, Abort(5), ResetPrefixCache(6), Drain(abort=True)])
def test_what_a_client_says_arrives(message):
    assert Codec(ToEngine).decode(Codec(FromEngine).encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Hello(1),
        Starting("loading", 1, 2),
        Deltas([(9, DELTA)]),
        Refused(1, "no"),
        Overloaded(1, "full", 1.5),
        Compiling("a"),
    ],
)
def test_what_an_engine_says_arrives(message):
    assert Codec(FromEngine).decode(Codec(ToEngine).encode(message)) == message


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_other_bytes_are_no_message(data):
    for codec in (Codec(ToEngine), Codec(FromEngine)):
        try:
            message = codec.decode(data)
        except MessageError:
            continue
        assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize(
    "content",
    [
        ["submit", 1],
        ["submit", -1, [[1]], {}, 0],
        ["submit", 2**63, [[1]], {}, 0],
        ["submit", 1, [["x"]], {}, 0],
        ["submit", 1, [[1]], {"temperature": -1.0}, 0],
        ["submit", 1, [[1]], {"n": 10**9}, 0],
        ["deltas", []],
        ["unheard", 1],
        {"submit": 1},
        [[[[[[]]]]]],
    ],
)
def test_a_wrong_message_is_refused(content):
    with pytest.raises(MessageError, match="no message of this direction"):
        Codec(ToEngine).decode(msgspec.msgpack.encode(content))


def test_nesting_does_not_reach_the_interpreters_limit():
    with pytest.raises(MessageError):
        Codec(ToEngine).decode(b"\x91" * 100_000)


def test_a_message_that_is_too_large_is_not_sent(monkeypatch):
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(MessageError, match="the limit is 100"):
        Codec(FromEngine).encode(Failed("x" * 200))


def test_long_faults_are_shortened():
    assert len(messages.shortened("x" * 10**6)) < 2100
