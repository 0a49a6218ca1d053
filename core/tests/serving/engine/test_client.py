"""An engine in a real process: answers, refusals, slow and leaving readers, drain, what it publishes."""

import asyncio
import contextlib
import os
import signal

import pytest

from serving.engine.engines import HANG, PATIENCE_S, SETTINGS, SLOW, answer, options, run, sampling, until
from support.embedded_model import MODEL
from zif import LLM
from zif.errors import RequestError
from zif.serving.answers import EnginePrompt, EngineState, EngineUnavailableError, OverloadedError
from zif.serving.engine.client import ProcessEngine
from zif.serving.engine.limits import EngineLimits, ProcessOptions
from zif.serving.telemetry.kv_events import KVEventSettings
from zif.settings import EngineSettings


@pytest.fixture(scope="module")
def run_shared():
    """Run bodies that leave the engine as it was against one engine for all."""
    with asyncio.Runner() as runner:
        engine = ProcessEngine(SETTINGS, options())

        async def bounded(body):
            async with asyncio.timeout(PATIENCE_S):
                await body(engine)
                assert engine.num_outstanding == 0

        async def open_engine():
            await engine.start()
            await engine.wait_ready()

        runner.run(open_engine())
        yield lambda body: runner.run(bounded(body))
        runner.run(engine.close())


def test_answers_are_those_of_the_engine_in_this_process(run_shared):
    with LLM(MODEL, platform="null", max_model_len=256, kv_bytes=1 << 22) as llm:
        whole = llm.generate([{"prompt_token_ids": [i, 6, 7]} for i in range(40)], sampling(), use_tqdm=False)

    async def body(engine):
        assert engine.info.max_model_len == 256
        assert engine.info.platform == "null"
        answers = await asyncio.gather(*[answer(engine, i, 6, 7) for i in range(40)])
        assert answers == [(o.outputs[0].text, o.outputs[0].token_ids, "length") for o in whole]
        await until(lambda: engine.stats is not None and engine.stats.num_generated_tokens >= 200)
        assert engine.problem() is None
        await engine.reset_prefix_cache()

    run_shared(body)


def test_a_wrong_request_is_refused_and_others_go_on(run_shared):
    async def body(engine):
        with pytest.raises(RequestError, match="token ids are 0 to"):
            await answer(engine, 10**6)
        with pytest.raises(RequestError, match="the context is 256"):
            await answer(engine, *range(300))
        with pytest.raises(RequestError, match="n=4096 exceeds"):
            await answer(engine, 5, n=4096)
        assert (await answer(engine, 5))[2] == "length"

    run_shared(body)


def test_a_reader_that_leaves_frees_its_place(run_shared):
    async def body(engine):
        for _ in range(8):
            stream = engine.generate(EnginePrompt([5, 6]), sampling(max_tokens=200, n=2))
            await anext(stream)
            await stream.aclose()
        task = asyncio.create_task(answer(engine, 9, max_tokens=240))
        await until(lambda: engine.num_outstanding)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: engine.num_outstanding == 0)
        await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
        assert engine.stats.kv_usage == 0.0

    run_shared(body)


def test_a_slow_reader_gets_everything(run_shared):
    async def body(engine):
        expected = await answer(engine, 5, max_tokens=200)
        stream = engine.generate(EnginePrompt([5]), sampling(max_tokens=200))
        deltas = [await anext(stream)]
        await until(lambda: engine.num_outstanding == 0)
        deltas += [delta async for delta in stream]
        assert len(deltas) <= 3
        assert "".join(s.text for d in deltas for s in d.samples) == expected[0]

    run_shared(body)


def test_too_many_are_turned_away_at_once():
    async def body(engine):
        hanging = [asyncio.create_task(answer(engine, SLOW, 7, i, max_tokens=20)) for i in range(6)]
        await until(lambda: engine.num_outstanding == 6)
        with pytest.raises(OverloadedError, match="the limit is 6") as raised:
            await answer(engine, 5)
        assert raised.value.retry_after_s >= 1
        assert {end for _, _, end in await asyncio.gather(*hanging)} == {"length"}
        assert (await answer(engine, 5))[2] == "length"

    run(body, options(max_queued=2))


def test_drain_finishes_what_runs():
    async def body(engine):
        running = asyncio.create_task(answer(engine, 5, max_tokens=200))
        await until(lambda: engine.num_outstanding)
        drained = asyncio.create_task(engine.drain())
        await until(lambda: engine.state is not EngineState.READY)
        with pytest.raises(EngineUnavailableError):
            await answer(engine, 6)
        assert (await running)[2] == "length"
        await drained
        assert "drained" in engine.problem()

    run(body)


def test_a_terminated_engine_drains_too():
    async def body(engine):
        running = asyncio.create_task(answer(engine, SLOW, max_tokens=200))
        await until(lambda: engine.num_outstanding)
        os.kill(engine.pid, signal.SIGTERM)
        assert (await running)[2] == "length"
        await until(lambda: engine.state is EngineState.FAILED)

    run(body)


def test_the_terminals_interrupt_is_not_for_the_engine(run_shared):
    async def body(engine):
        os.kill(engine.pid, signal.SIGINT)
        assert (await answer(engine, 5))[2] == "length"
        assert os.getpgid(engine.pid) != os.getpgid(0)

    run_shared(body)


@pytest.mark.slow
def test_a_computing_engine_answers_as_in_this_process():
    settings = EngineSettings(model=str(MODEL), platform="cpu", max_model_len=256, kv_bytes=1 << 24)
    greedy = {"temperature": 0.0, "max_tokens": 20}
    with LLM(MODEL, platform="cpu", max_model_len=256, kv_bytes=1 << 24) as llm:
        whole = llm.generate({"prompt_token_ids": [50, 60, 70]}, sampling(**greedy), use_tqdm=False)[0].outputs[0]

    async def body(engine):
        assert await answer(engine, 50, 60, 70, **greedy) == (whole.text, whole.token_ids, "length")

    run(body, ProcessOptions(), settings)


def test_a_drain_that_takes_too_long_is_cut_short():
    async def body(engine):
        hung = asyncio.create_task(answer(engine, HANG))
        await until(lambda: engine.num_outstanding)
        await engine.drain(timeout_s=0.1)
        with pytest.raises(EngineUnavailableError):
            await hung

    run(body, options(close_s=0.1))


def test_changes_of_the_prefix_cache_are_published(tmp_path):
    import zmq

    address = f"ipc://{tmp_path}/e"
    process_options = ProcessOptions(kv_events=KVEventSettings(address), limits=EngineLimits(report_s=0.1))
    received = []

    async def body(engine):
        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.set(zmq.SUBSCRIBE, b"")
        socket.connect(address)

        def hears():
            while socket.poll(1):
                received.append(socket.recv_multipart())
            return bool(received)

        try:
            async with asyncio.timeout(PATIENCE_S):
                token = 0
                # Until the subscription has arrived, what is published is published to nobody.
                while not hears():
                    token += 1
                    await answer(engine, *[token] * 40)
        finally:
            socket.close(linger=0)
            context.term()

    run(body, process_options)
    assert len(received[0]) == 3
    assert not (tmp_path / "e").exists()
