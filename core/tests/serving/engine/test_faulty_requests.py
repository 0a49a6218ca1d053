"""Requests that the device cannot compute, through the server: they alone are answered 500, and nothing restarts."""

import asyncio

from serving.engine.engines import NONSENSE, POISON, run
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
