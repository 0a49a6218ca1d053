"""Requests that the device cannot compute, through the server: they alone are answered 500, and nothing restarts.

Also where nobody reads what the engine writes of them.
"""

import asyncio
import contextlib
import json
import os

from serving.engine.engines import NONSENSE, PATIENCE_S, POISON, answer, run
from serving.http.calls import call
from zif.serving.answers import EngineState
from zif.serving.http.app import build_app
from zif.serving.http.assembly import open_apis
from zif.serving.http.settings import ServeSettings

REASONS = {
    POISON: "computing this request raised ValueError; the log of the engine has the cause",
    NONSENSE: "the model gave NaN logits for this request",
}


def test_they_are_answered_500_with_the_reason_and_the_others_200():
    def body(token_id):
        return {"prompt": [token_id, 7, 7], "max_tokens": 20, "ignore_eos": True, "seed": 1}

    async def ask(engine):
        first = engine.pid
        settings = ServeSettings(served_model_name="m")
        async with open_apis(engine, settings) as routes:
            app = build_app(engine, settings, routes)
            expected = [(await call(app, "/v1/completions", body(5 + i))).json()["choices"] for i in range(4)]
            for fault, reason in REASONS.items():
                asked = [5, 6, fault, 7, 8]
                answers = await asyncio.gather(*(call(app, "/v1/completions", body(token_id)) for token_id in asked))
                failed = answers.pop(2)
                assert [answer.status for answer in answers] == [200] * 4
                assert [answer.json()["choices"] for answer in answers] == expected
                assert failed.status == 500
                assert failed.json()["error"]["message"] == f"the answer failed: {reason}"
        assert engine.state is EngineState.READY
        assert engine.pid == first

    run(ask)


def test_a_log_that_nobody_reads_does_not_hold_the_engine_up():
    log, written = os.pipe()

    def fill():
        os.set_blocking(written, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(written, b"\n" * 1024)
        os.set_blocking(written, True)

    async def ask(engine):
        fill()
        async with asyncio.timeout(PATIENCE_S):
            answers = await asyncio.gather(*(answer(engine, token_id, 7, 7) for token_id in (5, POISON, 6)))
            assert [end for _, _, end in answers] == ["length", "error", "length"]
            assert (await answer(engine, 8))[2] == "length"
        assert engine.problem() is None
        os.read(log, 2**20)

    own = os.dup(2)
    os.dup2(written, 2)
    try:
        run(ask)
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(written)
    with open(log, encoding="utf-8") as lines:
        logged = [json.loads(line) for line in lines if line.strip()]
    assert any("the kernel of /opt/kernels" in line.get("exception", "") for line in logged)
