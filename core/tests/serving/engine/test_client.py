"""An engine in a real process: answers, refusals, slow and leaving readers, drain, crashes, hangs."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.errors import RequestError
from zif.serving.answers import EnginePrompt, EngineState, EngineUnavailableError, OverloadedError
from zif.serving.engine.client import ProcessEngine
from zif.serving.engine.limits import EngineLimits, ProcessOptions, RestartLimits
from zif.serving.telemetry.kv_events import KVEventSettings
from zif.settings import EngineSettings

HANG, RAISE, EXIT, SLOW = 2000, 2001, 2002, 2003
FAULTY = Path(__file__).with_name("faulty_child.py")
SETTINGS = EngineSettings(model=str(MODEL), platform="null", max_model_len=256, max_num_seqs=4, kv_bytes=1 << 22)
PATIENCE_S = 20.0
"""How long a test waits for what should come at once, on a machine that is busy."""


def options(*faults, **limits):
    command = (sys.executable, "-P", str(FAULTY), *faults)
    restarts = RestartLimits(first_delay_s=0.01, max_restarts=2)
    return ProcessOptions(command=command, restarts=restarts, limits=EngineLimits(**{"report_s": 0.1, **limits}))


def run(body, process_options=None, settings=SETTINGS):
    """Run `body(engine)` against a ready engine, with a bound on everything."""

    async def bounded():
        engine = ProcessEngine(settings, process_options or options())
        async with asyncio.timeout(3 * PATIENCE_S), engine:
            await engine.wait_ready()
            await body(engine)
        assert engine.pid is None
        assert engine.num_outstanding == 0

    asyncio.run(bounded())


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


def sampling(**given):
    return SamplingParams(**{"max_tokens": 5, "ignore_eos": True, "seed": 1, **given})


async def answer(engine, *token_ids, **given):
    """Return text, tokens and end of a prompt's first sample."""
    text, ids, end = "", [], None
    async for delta in engine.generate(EnginePrompt(list(token_ids), "text"), sampling(**given)):
        for sample in delta.samples:
            if sample.index == 0:
                text, ids, end = text + sample.text, ids + sample.token_ids, sample.finish_reason
    return text, ids, end


async def until(condition):
    """Wait until a condition holds; the engine's messages are what changes it."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def own_tmp(monkeypatch):
    """Return a folder of temporary files that no other test uses; its path is short, as a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="zt") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


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


def test_leaving_a_dead_engine_is_no_error():
    async def body(engine):
        stream = engine.generate(EnginePrompt([5]), sampling(max_tokens=200))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        await stream.aclose()
        await until(lambda: engine.num_outstanding == 0)

    run(body)


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


@pytest.mark.parametrize(("fault", "reason"), [(RAISE, "caught fire"), (EXIT, "status 9")])
def test_a_crash_ends_its_requests_and_the_engine_returns(fault, reason):
    async def body(engine):
        first = engine.pid
        with pytest.raises(EngineUnavailableError, match=reason):
            await answer(engine, fault)
        assert engine.state is EngineState.RESTARTING
        assert "started again" in engine.problem()
        with pytest.raises(EngineUnavailableError) as raised:
            await answer(engine, 5)
        assert raised.value.retry_after_s
        await engine.wait_ready()
        assert engine.pid != first
        assert (await answer(engine, 5))[2] == "length"

    run(body)


@pytest.mark.slow
def test_a_crash_loop_is_not_fed():
    async def body(engine):
        for _ in range(3):
            await engine.wait_ready()
            with pytest.raises(EngineUnavailableError):
                await answer(engine, EXIT)
        with pytest.raises(EngineUnavailableError, match="3 crashes"):
            await engine.wait_ready()
        assert engine.state is EngineState.FAILED
        assert "3 crashes" in engine.problem()

    run(body)


def test_a_start_that_fails_says_why_and_is_not_tried_again(own_tmp):
    async def body():
        async with ProcessEngine(SETTINGS, options("start-fails")) as engine:
            with pytest.raises(EngineUnavailableError, match="no such device"):
                await engine.wait_ready()
            assert engine.state is EngineState.FAILED
        wrong = EngineSettings(model="/no/such/folder", platform="null")
        async with ProcessEngine(wrong, options()) as engine:
            with pytest.raises(EngineUnavailableError, match="/no/such/folder"):
                await engine.wait_ready()

    asyncio.run(body())
    assert list(own_tmp.iterdir()) == []


def test_a_start_that_hangs_is_reported_again_and_can_be_closed():
    async def body():
        phases = []
        engine = ProcessEngine(SETTINGS, options("start-hangs"), lambda *phase: phases.append(phase))
        async with engine:
            await until(lambda: phases.count(("loading weights", 1, 3)) >= 2)
            assert "loading weights, 1 of 3" in engine.problem()
            with pytest.raises(EngineUnavailableError) as raised:
                await answer(engine, 5)
            assert raised.value.retry_after_s
        assert engine.pid is None

    asyncio.run(body())


def test_a_hung_step_is_seen():
    async def body(engine):
        hung = asyncio.create_task(answer(engine, HANG))
        await until(lambda: engine.problem() is not None)
        assert "0.5 s" in engine.problem()
        assert engine.state is EngineState.READY
        hung.cancel()

    run(body, options(step_limit_s=0.5, close_s=0.1))


def test_a_stopped_process_is_seen_and_a_continued_one_is_well():
    async def body(engine):
        assert engine.problem() is None
        os.kill(engine.pid, signal.SIGSTOP)
        await until(lambda: engine.problem() is not None)
        assert "said nothing" in engine.problem()
        os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: engine.problem() is None)
        assert (await answer(engine, 5))[2] == "length"

    run(body, options(step_limit_s=0.5))


def test_those_who_leave_a_hung_engine_make_no_room_for_more():
    async def body(engine):
        for _ in range(6):
            task = asyncio.create_task(answer(engine, HANG))
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(OverloadedError):
            await answer(engine, 5)

    run(body, options(max_queued=2, close_s=0.1))


def test_slow_steps_within_the_limit_are_no_problem():
    async def body(engine):
        problems = []
        running = asyncio.create_task(answer(engine, SLOW, max_tokens=50))
        while not running.done():
            problems.append(engine.problem())
            await asyncio.sleep(0.01)
        assert set(problems) == {None}

    run(body, options(step_limit_s=5.0))


def test_nonsense_from_the_engine_ends_it():
    async def body():
        async with asyncio.timeout(PATIENCE_S), ProcessEngine(SETTINGS, options("ready-then-nonsense")) as engine:
            await until(lambda: engine.state is EngineState.FAILED or engine.state is EngineState.RESTARTING)
            assert engine.state is EngineState.RESTARTING

    asyncio.run(body())


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


def test_nothing_is_left_on_disk_once_the_connection_stands(own_tmp):
    async def body(engine):
        assert list(own_tmp.iterdir()) == []
        assert (await answer(engine, 5))[2] == "length"

    run(body)
    assert list(own_tmp.iterdir()) == []
