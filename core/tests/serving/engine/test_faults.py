"""An engine in a real process that crashes, hangs, does not start, or is stopped: what its client tells and does."""

import asyncio
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from serving.engine.engines import (
    COMPILE,
    EXIT,
    HANG,
    PATIENCE_S,
    RAISE,
    SETTINGS,
    SLOW,
    answer,
    options,
    run,
    sampling,
    until,
)
from zif.serving.answers import EnginePrompt, EngineState, EngineUnavailableError, OverloadedError
from zif.serving.engine.client import ProcessEngine
from zif.settings import EngineSettings


@pytest.fixture
def own_tmp(monkeypatch):
    """Return a folder of temporary files that no other test uses; its path is short, as a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="zt") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_leaving_a_dead_engine_is_no_error():
    async def body(engine):
        stream = engine.generate(EnginePrompt([5]), sampling(max_tokens=200))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        await stream.aclose()
        await until(lambda: engine.num_outstanding == 0)

    run(body)


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


def test_a_process_that_nobody_can_watch_over_is_not_left(own_tmp, monkeypatch):
    async def body():
        started = []
        popen = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
        monkeypatch.setattr(threading.Thread, "start", _no_thread)
        async with ProcessEngine(SETTINGS, options()) as engine:
            with pytest.raises(EngineUnavailableError, match="no more threads"):
                await engine.wait_ready()
        assert [process.returncode for process in started] == [-signal.SIGKILL]

    asyncio.run(body())
    assert list(own_tmp.iterdir()) == []


def _no_thread(thread):
    raise RuntimeError("no more threads")


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


def test_an_engine_that_stays_hung_is_killed_and_returns():
    async def body(engine):
        first = engine.pid
        begin_s = asyncio.get_running_loop().time()
        with pytest.raises(EngineUnavailableError, match="it was hung") as raised:
            await answer(engine, HANG)
        assert raised.value.retry_after_s
        assert asyncio.get_running_loop().time() - begin_s >= 0.6
        assert engine.state is EngineState.RESTARTING
        await engine.wait_ready()
        assert engine.pid != first
        assert (await answer(engine, 5))[2] == "length"
        await until(lambda: engine.stats is not None)
        assert engine.stats.num_restarts == 1

    run(body, options(step_limit_s=0.2, kill_hung_s=0.4, close_s=0.1))


@pytest.mark.slow
def test_a_step_that_compiles_is_not_hung():
    """It takes 5 s, twice what a step may take."""

    async def body(engine):
        problems = []
        running = asyncio.create_task(answer(engine, COMPILE))
        while not running.done():
            problems.append(engine.problem())
            await asyncio.sleep(0.01)
        assert set(problems) == {None}
        assert (await running)[2] == "length"

    run(body, options(step_limit_s=2.5, kill_hung_s=0.1))


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


def test_nothing_is_left_on_disk_once_the_connection_stands(own_tmp):
    async def body(engine):
        assert list(own_tmp.iterdir()) == []
        assert (await answer(engine, 5))[2] == "length"

    run(body)
    assert list(own_tmp.iterdir()) == []
