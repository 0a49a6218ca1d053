"""The engine's loop over a scripted channel: admission, refusals, merging under backpressure, drain."""

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.engine.pooling import POOLED_SAMPLING, Pooler, PoolingParams
from zif.serving.answers import EnginePrompt
from zif.serving.engine.admission import Admission, Capacity
from zif.serving.engine.loop import EngineLoop
from zif.serving.engine.messages import (
    Abort,
    Deltas,
    Done,
    Drain,
    Draining,
    MessageError,
    Overloaded,
    Refused,
    ResetPrefixCache,
    Stats,
    Submit,
    Unavailable,
)

CAPACITY = Capacity(max_running=4, max_running_tokens=1000, max_queued=4, max_queued_tokens=1000)


class ScriptedEnd:
    """A channel whose client is the test. `room` messages are taken before it is full."""

    def __init__(self):
        self.inbox = deque()
        self.sent = []
        self.room = 10**9
        self.max_batch = 10**9

    def wait(self, timeout_s):
        return bool(self.inbox)

    def receive(self, max_messages=4096):
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def can_send(self):
        return self.room > 0

    def send(self, message):
        if isinstance(message, Deltas) and len(message.batch) > self.max_batch:
            raise MessageError("too large")
        if not self.room:
            return False
        self.room -= 1
        self.sent.append(message)
        return True

    def said(self, kind):
        return [message for message in self.sent if isinstance(message, kind)]


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, platform="null", max_model_len=128, max_num_seqs=4, kv_bytes=1 << 20) as llm:
        yield llm


@pytest.fixture
def end():
    return ScriptedEnd()


@pytest.fixture
def loop(llm, end):
    yield EngineLoop(llm, end, Admission(CAPACITY), 0.5)
    while llm.engine.has_work():
        assert llm.engine.step() == [], "an answer goes on that nobody waits for"
    llm.engine.check_integrity()
    assert llm.engine.kv_usage() == 0.0


def submit(request_id, *token_ids, priority=0, salt="", **options):
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "seed": 1, **options})
    return Submit(request_id, EnginePrompt(list(token_ids) or [5, 6, 7], cache_salt=salt), sampling, priority)


def run_dry(loop, llm):
    """Turn until nothing is left to do."""
    for _ in range(200):
        loop.turn()
        if not llm.engine.has_work() and not loop._wants_to_send():
            return
    raise AssertionError("the loop does not come to rest")


def answers(end):
    """Return text and tokens by request id and sample."""
    found = {}
    for message in end.said(Deltas):
        for request_id, delta in message.batch:
            for sample in delta.samples:
                text, token_ids, _ = found.get((request_id, sample.index), ("", [], None))
                found[request_id, sample.index] = (
                    text + sample.text,
                    token_ids + sample.token_ids,
                    sample.finish_reason,
                )
    return found


def expected(llm, message):
    prompt = {"prompt_token_ids": message.prompt.token_ids}
    output = llm.generate(prompt, message.sampling, use_tqdm=False)[0]
    return {one.index: (one.text, one.token_ids, one.finish_reason) for one in output.outputs}


def test_answers_are_those_of_the_engine(loop, end, llm):
    messages = [submit(1), submit(2, 9, 8, n=3), submit(3, 40, 41, stop=" well")]
    end.inbox.extend(messages)
    run_dry(loop, llm)
    for message in messages:
        for index, answer in expected(llm, message).items():
            assert answers(end)[message.id, index] == answer


def test_each_step_sends_what_is_new_only(loop, end, llm):
    end.inbox.append(submit(1, max_tokens=20))
    run_dry(loop, llm)
    deltas = [delta for message in end.said(Deltas) for _, delta in message.batch]
    assert len(deltas) == 20
    assert all(len(delta.samples[0].token_ids) == 1 for delta in deltas)
    assert [delta.finished for delta in deltas] == [False] * 19 + [True]
    assert [delta.queue_s is not None for delta in deltas] == [True] + [False] * 19


def test_log_probabilities_are_those_of_the_engine_and_the_prompts_come_once(end):
    options = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16, "kv_bytes": 1 << 22}
    message = submit(1, *range(50, 80), max_tokens=4, temperature=0.0, logprobs=2, prompt_logprobs=1)
    with LLM(MODEL, platform="cpu", **options) as llm:
        loop = EngineLoop(llm, end, Admission(CAPACITY), 0.5)
        end.inbox.append(message)
        run_dry(loop, llm)
        whole = llm.generate({"prompt_token_ids": list(range(50, 80))}, message.sampling, use_tqdm=False)[0]
    deltas = [delta for m in end.said(Deltas) for _, delta in m.batch]
    (prompt_logprobs,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    said = [position for delta in deltas for sample in delta.samples for position in sample.logprobs]
    assert len(said) == 4
    for position, one in zip(said, whole.outputs[0].logprobs, strict=True):
        assert [entry.token_id for entry in position] == list(one)
        assert [entry.logprob for entry in position] == pytest.approx([entry.logprob for entry in one.values()])
        assert [entry.rank for entry in position] == [entry.rank for entry in one.values()]
    assert prompt_logprobs[0] is None
    assert len(prompt_logprobs) == 30
    for position, one in zip(prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
        assert [entry.token_id for entry in position] == list(one)


def test_a_client_that_does_not_read_gets_it_merged(loop, end, llm):
    message = submit(1, max_tokens=30)
    end.inbox.append(message)
    end.room = 2
    for _ in range(40):
        loop.turn()
    assert len(end.said(Deltas)) <= 2
    assert not llm.engine.has_work(), "nobody waits for a reader"
    end.room = 10**9
    run_dry(loop, llm)
    assert len(end.said(Deltas)) <= 3
    assert answers(end)[1, 0] == expected(llm, message)[0]


def test_a_wrong_request_is_refused_alone(loop, end, llm):
    wrong = [
        submit(1, 10**6),
        submit(2, *range(200)),
        submit(3, priority=1),
        submit(4, salt="\ud800"),
        submit(5, logit_bias={10**6: 1.0}),
    ]
    end.inbox.extend([*wrong, submit(9)])
    run_dry(loop, llm)
    assert [refused.id for refused in end.said(Refused)] == [1, 2, 3, 4, 5]
    assert all(len(refused.message) > 20 for refused in end.said(Refused))
    assert answers(end)[9, 0][2] == "length"


def test_a_prompt_that_cannot_be_pooled_fails_alone(loop, end, llm, monkeypatch):
    begin = Pooler.begin

    def unfit(vector):
        raise ValueError("matmul: mismatch in its core dimension 0")

    def begun(self, params, num_tokens):
        prompt = begin(self, params, num_tokens)
        if params.dimensions == 3:
            prompt.vector = unfit.__get__(prompt)
        elif params.dimensions == 4:
            prompt.take = lambda data, start, num_tokens: None
        return prompt

    monkeypatch.setattr(Pooler, "begin", begun)
    for dimensions in (2, 3, 4):
        prompt = EnginePrompt([5, 6, 7], pooling=PoolingParams(dimensions=dimensions))
        end.inbox.append(Submit(dimensions, prompt, POOLED_SAMPLING, 0))
    run_dry(loop, llm)
    said = {request_id: delta for message in end.said(Deltas) for request_id, delta in message.batch if delta.finished}
    ends = {request_id: delta.samples[-1] for request_id, delta in said.items()}
    assert [(len(said[i].pooled or b""), ends[i].finish_reason) for i in (2, 3, 4)] == [
        (8, "stop"),
        (0, "error"),
        (0, "error"),
    ]
    assert "the log of the engine has the cause" in ends[3].error
    assert "hidden states of 0 tokens came" in ends[4].error


def test_more_than_the_queue_holds_is_turned_away(loop, end, llm):
    end.inbox.extend(submit(request_id) for request_id in range(20))
    loop.turn()
    turned_away = [message.id for message in end.said(Overloaded)]
    assert turned_away == list(range(8, 20))
    assert all(message.retry_after_s >= 1 for message in end.said(Overloaded))
    run_dry(loop, llm)
    end.inbox.append(submit(99))
    run_dry(loop, llm)
    assert answers(end)[99, 0][2] == "length"


def test_an_abort_is_answered_with_the_end(loop, end, llm):
    end.inbox.append(submit(1, max_tokens=100, n=2))
    for _ in range(5):
        loop.turn()
    end.inbox.extend([Abort(1), Abort(1), Abort(77)])
    run_dry(loop, llm)
    assert {answer[2] for answer in answers(end).values()} == {"abort"}
    assert [delta.finished for m in end.said(Deltas) for _, delta in m.batch].count(True) == 1


def test_an_abort_before_the_first_step_frees_the_place(loop, end, llm):
    end.inbox.extend([submit(1), Abort(1)])
    run_dry(loop, llm)
    assert answers(end)[1, 0] == ("", [], "abort")


def test_drain_finishes_what_runs_and_takes_no_more(loop, end, llm):
    end.inbox.extend([submit(1), Drain(abort=False), submit(2)])
    loop.run()
    assert len(end.said(Draining)) == 1
    assert [message.id for message in end.said(Unavailable)] == [2]
    assert answers(end)[1, 0][2] == "length"


def test_drain_with_abort_ends_what_runs(loop, end):
    end.inbox.extend([submit(1, max_tokens=100), Drain(abort=True)])
    loop.run()
    assert answers(end)[1, 0][2] == "abort"


def test_a_signal_drains_too(loop, end):
    end.inbox.append(submit(1))
    loop.turn()
    loop.want_drain()
    loop.run()
    assert answers(end)[1, 0][2] == "length"


def test_the_prefix_cache_is_forgotten_on_request(loop, end, llm):
    prompt = range(100, 160)
    end.inbox.append(submit(1, *prompt))
    run_dry(loop, llm)
    end.inbox.append(submit(2, *prompt))
    run_dry(loop, llm)
    end.inbox.append(ResetPrefixCache(7))
    run_dry(loop, llm)
    end.inbox.append(submit(3, *prompt))
    run_dry(loop, llm)
    cached = {request_id: delta.num_cached_tokens for m in end.said(Deltas) for request_id, delta in m.batch}
    assert [done.id for done in end.said(Done)] == [7]
    assert (cached[1], cached[2], cached[3]) == (0, 48, 0)


def test_a_message_that_is_too_large_goes_in_parts(loop, end, llm):
    end.max_batch = 1
    messages = [submit(request_id, 10 + request_id) for request_id in range(4)]
    end.inbox.extend(messages)
    run_dry(loop, llm)
    for message in messages:
        assert answers(end)[message.id, 0] == expected(llm, message)[0]


def test_an_answer_that_is_too_large_ends_its_request_alone(loop, end, llm, monkeypatch):
    send = end.send

    def refuse_first(message):
        if isinstance(message, Deltas) and any(request_id == 1 for request_id, _ in message.batch):
            raise MessageError("1 byte too large")
        return send(message)

    monkeypatch.setattr(end, "send", refuse_first)
    end.inbox.extend([submit(1, max_tokens=100), submit(2)])
    run_dry(loop, llm)
    assert [refused.id for refused in end.said(Refused)] == [1]
    assert answers(end)[2, 0][2] == "length"


def test_the_same_id_twice_is_the_clients_fault(loop, end, llm):
    end.inbox.extend([submit(1), submit(1)])
    with pytest.raises(MessageError, match="twice"):
        loop.turn()
    end.inbox.append(Drain(abort=True))
    loop.run()


def test_counts_are_reported_and_the_last_ones_say_idle(loop, end, llm):
    end.inbox.append(submit(1))
    run_dry(loop, llm)
    last = end.said(Stats)[-1].stats
    assert (last.num_running, last.num_waiting, last.kv_usage) == (0, 0, 0.0)
    assert last.num_steps > 0


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 3), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("room"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("turn"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def play(moves, loop, end):
    """Make the moves; return what was submitted."""
    submitted = []
    for move, first, second in moves:
        if move == "submit":
            submitted.append(submit(len(submitted), len(submitted) % 7 + 1, 5, 6, n=first, max_tokens=second))
            end.inbox.append(submitted[-1])
        elif move == "abort":
            end.inbox.append(Abort(first))
        elif move == "room":
            end.room = first
        elif move == "reset":
            end.inbox.append(ResetPrefixCache(10**6))
        for _ in range(first if move == "turn" else 0):
            loop.turn()
    return submitted


@given(MOVES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_every_request_has_one_end_and_nothing_is_lost(llm, moves):
    end = ScriptedEnd()
    loop = EngineLoop(llm, end, Admission(CAPACITY), 0.5)
    submitted = play(moves, loop, end)
    end.room = 10**9
    run_dry(loop, llm)
    ends = [message.id for message in end.said(Refused) + end.said(Overloaded)]
    ends += [request_id for m in end.said(Deltas) for request_id, delta in m.batch if delta.finished]
    assert sorted(ends) == [message.id for message in submitted]
    for message in submitted:
        for sample in range(message.sampling.n):
            answer = answers(end).get((message.id, sample), ("", [], "never began"))
            assert answer[2] in ("length", "abort", "never began")
            assert len(answer[1]) <= message.sampling.max_tokens
    llm.engine.check_integrity()
    assert llm.engine.kv_usage() == 0.0
    assert loop._admission.num_samples == 0


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_who_asks_is_charged_where_the_engine_charges(end, policy, monkeypatch):
    """A server with keys names the tenant of every prompt, whatever the policy is."""
    with LLM(MODEL, platform="null", max_model_len=128, kv_bytes=1 << 20, scheduling_policy=policy) as llm:
        loop = EngineLoop(llm, end, Admission(CAPACITY), 0.5)
        end.inbox.append(Submit(1, EnginePrompt([5, 6, 7], tenant="acme"), SamplingParams(max_tokens=4), 0))
        check, charged = llm.engine.check, []
        monkeypatch.setattr(llm.engine, "check", lambda given, options: charged.append(given) or check(given, options))
        run_dry(loop, llm)
    assert [given.get("tenant") for given in charged] == ["acme" if policy == "fair" else None]
    assert not end.said(Refused)
    assert end.said(Deltas)
