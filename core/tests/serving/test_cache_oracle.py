"""Nobody can find out what another key has asked, whichever API and option the probe goes through.

Over a real engine, whose prefix cache all keys share. Of a prompt that another key has asked, nothing may be found
computed: that is what an answer's usage would say, and what would make it come sooner.
"""

import random

import pytest

from serving.engine.engines import run
from serving.http.calls import call
from zif.serving.http.app import build_app
from zif.serving.http.assembly import open_apis
from zif.serving.http.auth import parse_keys
from zif.serving.http.settings import ServeSettings

KEYS = ["victim-key-1 tenant=a", "victim-key-2 tenant=a", "prober-key"]
NUM_PROBES = 2
CACHED = ("cached_tokens", "cache_read_input_tokens")
WORDS = ["return", "list", "error", "plugin", "open", "read", "block", "table", "step", "value", "none", "import"]


def text(seed):
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(60))


def completions(prompt, **more):
    return "/v1/completions", {"prompt": prompt, "max_tokens": 1, "seed": 1, **more}


def chat(prompt, **more):
    messages = [{"role": "user", "content": prompt}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 1, "seed": 1, **more}


def responses(prompt, **more):
    return "/v1/responses", {"input": prompt, "max_output_tokens": 1, **more}


def messages(prompt, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 1, **more}
    return "/v1/messages", body


def salted(prompt):
    return completions(prompt, cache_salt="guessed")


def several(prompt):
    return completions(prompt, n=2)


APIS = (completions, chat, responses, messages, salted, several)


def numbers(value):
    """Return every number of an answer by its path."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {(): value} if isinstance(value, int | float) else {}
    return {(key, *path): number for key, inner in pairs for path, number in numbers(inner).items()}


def cached(answer):
    """Return the numbers of an answer that say how much of the prompt was found computed."""
    return {path: number for path, number in numbers(answer).items() if path[-1] in CACHED}


@pytest.mark.slow
def test_another_keys_prompts_look_like_prompts_that_nobody_has_asked():
    async def probe(engine):
        settings = ServeSettings(served_model_name="m")
        async with open_apis(engine, settings) as routes:
            app = build_app(engine, settings, routes, parse_keys(KEYS))

            async def ask(key, api, prompt):
                path, body = api(prompt)
                answer = await call(app, path, body, headers={"x-api-key": key})
                assert answer.status == 200, answer.body
                return answer.json()

            for api in APIS:
                for number in range(NUM_PROBES):
                    asked, fresh = text(f"{api.__name__} {number}"), text(f"fresh {api.__name__} {number}")
                    await ask("victim-key-1", api, asked)
                    probes = [cached(await ask("prober-key", api, prompt)) for prompt in (asked, fresh)]
                    assert probes[0] == probes[1]
                    assert probes[0], "the answer does not say what was found computed"
                    assert not any(probes[0].values()), f"{api.__name__}: another key's prompt is found computed"
                    again = cached(await ask("victim-key-2", api, asked))
                    assert any(again.values()), f"{api.__name__}: nothing is ever found, so nothing was tried"

    run(probe)
