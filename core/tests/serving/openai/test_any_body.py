"""Whatever JSON comes: an answer or a refusal, never a fault of ours, and nothing of this machine in the refusal."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.openai.served import HELLO, TIME, WEATHER, said, serve
from zif.serving.openai.chat_request import ChatRequest
from zif.serving.openai.completion_request import CompletionRequest
from zif.serving.openai.token_requests import DetokenizeRequest, TokenizeRequest

INTERNALS = re.compile(r"0x[0-9a-f]{6,}|/work/|/root/|site-packages|Traceback|object at")

NUMBERS = st.integers() | st.integers(-3, 130) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6) | st.sampled_from(["user", "text", "auto", "function"])
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "parameters", "tool_calls", "id", "mode"]
)
ANY = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES | ANY, "content": st.text(max_size=12) | ANY},
    optional={"tool_calls": ANY, "tool_call_id": ANY, "name": ANY, "refusal": ANY, "reasoning_content": ANY},
)
TOOL = st.sampled_from([WEATHER, TIME]) | ANY
PROBABLE = {
    "messages": st.lists(MESSAGE, max_size=3) | st.just(HELLO) | ANY,
    "tools": st.lists(TOOL, max_size=3),
    "tool_choice": st.sampled_from(["none", "auto", "required"]) | ANY,
    "prompt": st.text(max_size=20) | st.lists(st.text(max_size=4) | st.integers(0, 4000), max_size=4) | ANY,
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}) | ANY,
    "n": st.integers(0, 4) | ANY,
    "model": st.just("embedded") | ANY,
    "tokens": st.lists(st.integers(-2, 4000)) | ANY,
}


def bodies(request_type, required):
    known = {name: PROBABLE.get(name, ANY) for name in request_type.__struct_encode_fields__}
    needed = {name: known.pop(name) for name in required}
    # A few fields at a time: with all of them wrong, only the first is ever looked at.
    some = st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries(needed | {name: known[name] for name in names}))


@pytest.fixture(scope="module")
def served():
    return serve(said("a", "b"))


def check(served, path, body):
    answer = served.post(path, body)
    assert answer.status in (200, 400, 404), answer.body
    if answer.status != 200:
        error = json.loads(answer.body)["error"]
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert not INTERNALS.search(error["message"])
    assert all(submission.ended.is_set() for submission in served.engine.submitted)
    served.engine.submitted.clear()


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(bodies(ChatRequest, ["messages"]))
def test_chats(served, body):
    check(served, "/v1/chat/completions", body)


@FUZZ
@given(bodies(ChatRequest, ["messages"]))
def test_rendered_chats(served, body):
    check(served, "/v1/chat/completions/render", body)


@FUZZ
@given(bodies(CompletionRequest, ["prompt"]))
def test_completions(served, body):
    check(served, "/v1/completions", body)


@FUZZ
@given(bodies(TokenizeRequest, []) | bodies(TokenizeRequest, ["messages"]))
def test_tokens(served, body):
    check(served, "/tokenize", body)


@FUZZ
@given(bodies(DetokenizeRequest, ["tokens"]))
def test_texts(served, body):
    check(served, "/detokenize", body)
