"""Engines in real processes on the null platform, whose device does what the first token of a prompt says."""

import asyncio
import sys
from pathlib import Path

from support.embedded_model import MODEL
from zif import SamplingParams
from zif.serving.answers import EnginePrompt
from zif.serving.engine.client import ProcessEngine
from zif.serving.engine.limits import EngineLimits, ProcessOptions, RestartLimits
from zif.settings import EngineSettings

HANG, RAISE, EXIT, SLOW, COMPILE, POISON, NONSENSE = range(2000, 2007)
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
