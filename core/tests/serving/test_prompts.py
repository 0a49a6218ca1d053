"""Texts to tokens on the HTTP side: bounds, threads, and the chats' neutral service around them."""

import asyncio
import threading

import pytest

from serving.fakes import CHECKPOINT, FakeEngine, Script
from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.parsing.events import ReasoningPiece, TextPiece, ToolCallBegin
from zif.serving.answers import EngineUnavailableError
from zif.serving.chat.formats import ChatFormat
from zif.serving.chat.service import ChatService, ChatTurn
from zif.serving.http.exchange import Caller, RequestRecord
from zif.serving.openai.logprobs import byte_alphabet, bytes_of_spelling
from zif.serving.prompts import INLINE_CHARACTERS, MAX_DECODED_TOKENS, Prompts
from zif.text.chat import ChatOptions, ChatTemplates
from zif.text.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


@pytest.fixture
def prompts():
    loaded = Prompts.load(CHECKPOINT, max_model_len=1024)
    yield loaded
    loaded.close()


def run(coroutine):
    return asyncio.run(coroutine)


class TestEncoding:
    @pytest.mark.parametrize("length", [1, INLINE_CHARACTERS, INLINE_CHARACTERS + 1, 3 * INLINE_CHARACTERS])
    def test_is_that_of_the_tokenizer_however_long(self, prompts, tokenizer, length):
        text = ("Once upon a time, " * length)[:length]
        assert run(prompts.encode(text)) == tokenizer.encode(text)
        assert run(prompts.encode(text, add_special_tokens=False)) == tokenizer.encode(text, False)

    def test_long_text_leaves_the_event_loop_free(self, prompts, monkeypatch):
        started, release = threading.Event(), threading.Event()
        encode = prompts.tokenizer.encode

        def slow(text, add_special_tokens=True):
            started.set()
            assert release.wait(10)
            return encode(text, add_special_tokens)

        monkeypatch.setattr(prompts.tokenizer, "encode", slow)

        async def main():
            task = asyncio.create_task(prompts.encode("word " * INLINE_CHARACTERS))
            await asyncio.to_thread(started.wait, 10)
            waiting = not task.done()
            release.set()
            return waiting, len(await task)

        waiting, count = run(main())
        assert waiting
        assert count > INLINE_CHARACTERS

    def test_what_no_context_holds_is_refused_before_it_is_encoded(self, prompts, monkeypatch):
        monkeypatch.setattr(prompts.tokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
        with pytest.raises(RequestError, match="3000000 characters"):
            run(prompts.encode("a" * 3_000_000))

    def test_what_is_no_text_is_refused(self, prompts):
        with pytest.raises(RequestError, match="input"):
            run(prompts.encode("\udc00", name="input"))

    def test_there_and_back(self, prompts):
        text = "One day, a little girl. " * 400
        assert run(prompts.decode(run(prompts.encode(text, add_special_tokens=False)))) == text

    def test_too_many_tokens_are_refused(self, prompts):
        with pytest.raises(RequestError, match="tokens"):
            run(prompts.decode(range(MAX_DECODED_TOKENS + 1)))


class TestBytes:
    def test_spelled_bytes_are_those_of_the_text(self, tokenizer):
        seen = 0
        for spelling, token_id in tokenizer.vocab().items():
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            if token_id not in tokenizer.special_ids and "\ufffd" not in text:
                assert bytes(bytes_of_spelling(spelling)).decode() == text
                seen += 1
        assert seen > 1000

    def test_the_alphabet_has_every_byte_once(self):
        assert sorted(byte_alphabet().values()) == list(range(256))

    @pytest.mark.parametrize(
        ("spelling", "expected"),
        [("<0xE2>", [0xE2]), ("<0xZZ>", list(b"<0xZZ>")), ("▁the", None), (None, None), ("ab", [97, 98])],
    )
    def test_other_spellings(self, spelling, expected):
        assert bytes_of_spelling(spelling) == expected


def answer(service, turn, caller=None):
    async def main():
        record = RequestRecord("id")
        begun = await service.start(turn, caller or Caller(), record)
        return begun, [delta async for delta in begun.deltas()], record

    try:
        return run(main())
    finally:
        service.close()


class TestService:
    def test_template_is_rendered_by_what_was_given(self):
        seen = []

        async def render(templates: ChatTemplates, messages, options: ChatOptions):
            seen.append((list(messages), options.add_generation_prompt))
            return "<|user|>rendered elsewhere"

        begun, _, _ = answer(
            ChatService(FakeEngine(), render), ChatTurn(messages=HELLO, sampling=SamplingParams(max_tokens=2))
        )
        assert seen == [(HELLO, True)]
        assert begun.prompt.text == "<|user|>rendered elsewhere"

    def test_format_can_be_named(self):
        pieces = ["<think>Hm</th", "ink>Yes"]
        service = ChatService(FakeEngine(Script(pieces=pieces)), format_name="think")
        _, deltas, _ = answer(service, ChatTurn(messages=HELLO, sampling=SamplingParams()))
        events = [event for delta in deltas for event in delta.events]
        text = "".join(event.text for event in events if isinstance(event, TextPiece))
        thought = "".join(event.text for event in events if isinstance(event, ReasoningPiece))
        assert (thought, text) == ("Hm", "Yes")
        assert ChatFormat.of(ChatTemplates(), "think").name == "think"

    def test_counts_tell_reasoning_from_text(self):
        pieces = ["<think>", "a", "b", "</think>", "c", "d"]
        service = ChatService(FakeEngine(Script(pieces=pieces)), format_name="think")
        begun, _, record = answer(service, ChatTurn(messages=HELLO, sampling=SamplingParams(n=2)))
        assert begun.num_completion_tokens == 12
        assert 4 <= begun.num_reasoning_tokens <= 8
        assert record.num_output_tokens == 12

    def test_special_tokens_are_asked_for_by_formats_that_need_them(self):
        engine = FakeEngine(Script(pieces=["x"]))
        answer(ChatService(engine, format_name="harmony"), ChatTurn(messages=HELLO, sampling=SamplingParams()))
        assert not engine.submitted[0].sampling.skip_special_tokens
        engine = FakeEngine(Script(pieces=["x"]))
        answer(ChatService(engine, format_name="plain"), ChatTurn(messages=HELLO, sampling=SamplingParams()))
        assert engine.submitted[0].sampling.skip_special_tokens

    def test_caller_decides_salt_and_tenant(self):
        engine = FakeEngine(Script(pieces=["x"]))
        turn = ChatTurn(messages=HELLO, sampling=SamplingParams(), priority=3, timeout_s=5.0)
        answer(ChatService(engine), turn, Caller("alice", "s"))
        prompt = engine.submitted[0].prompt
        assert (prompt.tenant, prompt.cache_salt, prompt.timeout_s, engine.submitted[0].priority) == (
            "alice",
            "s",
            5.0,
            3,
        )

    def test_an_engine_that_starts_says_so(self):
        engine = FakeEngine()
        engine.model_info = None
        with pytest.raises(EngineUnavailableError):
            answer(ChatService(engine), ChatTurn(messages=HELLO, sampling=SamplingParams()))

    def test_text_of_a_call_is_no_call_without_tools(self):
        call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        service = ChatService(FakeEngine(Script(pieces=[call])), format_name="hermes")
        _, deltas, _ = answer(service, ChatTurn(messages=HELLO, sampling=SamplingParams()))
        assert not any(isinstance(event, ToolCallBegin) for delta in deltas for event in delta.events)
        assert deltas[-1].finish_reason == "stop"
