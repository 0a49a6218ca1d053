"""Random requests made from a server's OpenAPI document: valid ones, ones with one wrong value, and broken bytes.

    python core/tests/serving/http/fuzz.py --requests 100000 --seed 1        # against a real engine, null platform
    python core/tests/serving/http/fuzz.py --seed 1 --only 4711              # that request by itself, and its answer

Request `n` of a seed is the same however many are under way at once. One in eight clients leaves: within its body,
after some turns of the event loop, or after some pieces of its answer. What must hold: no answer of 500 or more, every
error has a message, who leaves is forgotten, the engine is never started again, at the end nothing runs, no KV block
is in use, and no process has grown by more than `GROWTH_MIB` since its caches were full.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from serving.http.calls import Call

AT_ONCE = 32
GROWTH_MIB = 32
NUM_WARM = 5_000
"""Requests before memory is first read: caches fill, and the allocator keeps what the longest answers took."""

MAX_MODEL_LEN = 256
"""Short, as what a request takes is how long its answers are."""

LIMIT_S = 60
SETTLE_S = 10

_EXTREMES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**40, 0.0, -0.0, 1e308, 5e-324, 0.5, "", " ", "\x00",
    "a" * 5000, "\U0001f600" * 50, "\ud800", "../../etc/passwd", "{{ 7*7 }}", "(a+)+$", [], {}, [[]], [None], [0] * 300,
    {"a": {"b": {"c": []}}}, {"type": "object"}, {"type": "text", "text": "x"}, {"role": "user", "content": "x"},
    "auto", "none", "<|user|>",
]  # fmt: skip
_TEXTS = ["hello", "Return a list of", "a b c", "é", "{", '{"x": 1}', "def f(x):\n    return x\n", "<|assistant|>"]
_FUNCTION = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
}
_STRICT_PARAMETERS = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}, "y": {"enum": ["a"]}, "z": {"anyOf": [{"type": "string"}]}},
    "required": ["x"],
    "$defs": {"n": {"type": "integer"}},
}
_STRICT = {"name": "f", "strict": True, "parameters": _STRICT_PARAMETERS}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_EXAMPLES = {
    "messages": [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": [{"type": "text", "text": "s"}]}, {"role": "user", "content": "a", "name": "n"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
        ],
    ],
    "tools": [
        [{"type": "function", "function": _FUNCTION}],
        [{"type": "function", "function": _STRICT}],
        [{"name": "f", "input_schema": _FUNCTION["parameters"]}],
        [{"type": "function", **_STRICT}],
    ],
    "tool_choice": ["auto", "required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": _FUNCTION["parameters"]}},
    ],
    "input": [
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        [
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": "c"},
        ],
    ],
    "documents": [[{"title": "t", "text": "x"}]],
}
"""For fields whose schema does not say what is within."""

_JSON = "application/json"
_MAX_DEPTH = 6
_SHARES = {"stream": 0.5, "tools": 0.3, "max_tokens": 0.5}
"""How many of the requests have a field, where that is not the share of all fields."""


@dataclass(slots=True)
class Made:
    """A request, and when its client leaves. None: it stays; `leaves_body`: after so many bytes of its body."""

    path: str
    method: str
    body: bytes | None
    leaves_body: int | None = None
    leaves_turn: int | None = None
    leaves_piece: int | None = None


class Generator:
    """Makes requests of a document. The same seed and number make the same one."""

    def __init__(self, document, seed, models=("embedded",)):
        self._schemas = document["components"]["schemas"]
        self._seed = seed
        self._random = random.Random()
        self._models = models
        self._operations = [
            (path, method.upper(), operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]
        self._generating = [made for made in self._operations if "stream" in self._schema_of(made[2])["properties"]]

    def request(self, number):
        """Return a request."""
        self._random.seed(f"{self._seed}:{number}")
        point = self._random.randrange(16)
        generates = point in (1, 2) or self._random.random() < 0.5
        path, method, operation = self._random.choice(self._generating if generates else self._operations)
        path = path.partition("{")[0] + ("".join(self._random.choices("abc/é%.", k=4)) if "{" in path else "")
        made = Made(path, method, None)
        if "requestBody" in operation:
            made.body = self._body(self._schema_of(operation), point not in (1, 2))
        if point == 0 and made.body:
            made.leaves_body = self._random.randrange(len(made.body))
        elif point == 1:
            made.leaves_turn = int(2 ** self._random.uniform(0, 9))
        elif point == 2:
            made.leaves_piece = self._random.randrange(4)
        return made

    def _schema_of(self, operation):
        """Return the schema of an operation's body."""
        content = operation.get("requestBody", {"content": {_JSON: {"schema": {"properties": {}}}}})["content"]
        schema = content[_JSON]["schema"]
        return self._schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def _body(self, schema, may_be_wrong):
        value = self.value(schema, 0)
        if "model" in value:
            value["model"] = self._models[0]
        kind = self._random.random()
        if kind < 0.5 and may_be_wrong:
            value = self._spoiled(value)
        body = json.dumps(value, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")
        return self._broken(body) if kind > 0.95 and may_be_wrong else body

    def value(self, schema, depth):
        """Return a value that fits a schema, as far as schemas say."""
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self.value(self._random.choice(schema[word]), depth)
        if "const" in schema or "enum" in schema:
            return schema["const"] if "const" in schema else self._random.choice(schema["enum"])
        make = {"object": self._object, "array": self._array, "integer": self._integer, "number": self._number}
        kind = schema.get("type")
        if kind in make:
            return make[kind](schema, depth)
        if kind == "boolean":
            return self._random.random() < 0.5
        return self._random.choice(_TEXTS)[: schema.get("maxLength", 100)] if kind == "string" else None

    def _object(self, schema, depth):
        required = schema.get("required", [])
        share = 0.25 if depth else 0.12
        made = {
            name: self._field(name, inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in required or (depth < _MAX_DEPTH and self._random.random() < _SHARES.get(name, share))
        }
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) and depth < _MAX_DEPTH:
            made |= {key: self.value(extra, depth + 1) for key in ("1", "x") if self._random.random() < share}
        return made

    def _field(self, name, schema, depth):
        """Return a value of a field: an example where the schema does not say what is within."""
        if name in _EXAMPLES and _is_loose(schema) and self._random.random() < 0.9:
            return self._random.choice(_EXAMPLES[name])
        return self.value(schema, depth)

    def _array(self, schema, depth):
        length = self._random.randint(schema.get("minItems", 0), max(schema.get("minItems", 0), 2))
        return [self.value(schema.get("items", {}), depth + 1) for _ in range(max(length, int(depth < 2)))]

    def _integer(self, schema, depth):
        low, high = schema.get("minimum", 0), schema.get("maximum", 2**31)
        return self._random.choice([low, min(high, low + 1), min(high, 4), high, self._random.randint(low, high)])

    def _number(self, schema, depth):
        low, high = schema.get("minimum", 0.0), schema.get("maximum", 2.0)
        return self._random.choice([low, high, self._random.uniform(low, high)])

    def _spoiled(self, value):
        """Replace one value somewhere within."""
        if isinstance(value, dict) and value and self._random.random() < 0.85:
            key = self._random.choice(list(value))
            return value | {key: self._spoiled(value[key])}
        if isinstance(value, list) and value and self._random.random() < 0.7:
            index = self._random.randrange(len(value))
            return [*value[:index], self._spoiled(value[index]), *value[index + 1 :]]
        return self._random.choice(_EXTREMES)

    def _broken(self, body):
        position = self._random.randrange(len(body) + 1)
        choice = self._random.randrange(3)
        if choice == 0:
            return body[:position]
        if choice == 1:
            return body[:position] + bytes([self._random.randrange(256)]) + body[position + 1 :]
        return body[:position] + b"[" * 200 + body[position:]


def _is_loose(schema):
    """Say whether a schema has objects of which it tells nothing."""
    if "anyOf" in schema:
        return any(_is_loose(inner) for inner in schema["anyOf"])
    if schema.get("type") == "array":
        return _is_loose(schema.get("items", {"type": "any"}))
    return schema.get("type") == "object" and schema.get("additionalProperties") is not False


class Client(Call):
    """Who sends a request, and may leave before its end."""

    def __init__(self, made):
        super().__init__(made.path, made.body, method=made.method)
        self._made = made

    async def receive(self):
        cut = self._made.leaves_body
        if cut is not None and self.parts:
            self.parts = []
            self.leave()
            return {"type": "http.request", "body": self._made.body[:cut], "more_body": True}
        return await super().receive()

    async def send(self, message):
        await super().send(message)
        if self._made.leaves_piece is not None and len(self.answer.chunks) >= self._made.leaves_piece:
            self.leave()

    async def run(self, app):
        """Send the request and return its answer, which has status 0 where nobody waited for one."""
        task = asyncio.create_task(app(self.scope, self.receive, self.send))
        if self._made.leaves_turn is not None:
            for _ in range(self._made.leaves_turn):
                await asyncio.sleep(0)
            self.leave()
        try:
            async with asyncio.timeout(LIMIT_S):
                await task
        except TimeoutError:
            raise AssertionError("no answer") from None
        return self.answer


async def fuzz(app, generator, numbers, at_once=AT_ONCE):
    """Send requests, `at_once` at a time; return how many got which status. Raises `AssertionError` with the number."""
    statuses = Counter()
    waiting = iter(numbers)

    async def send_some():
        for number in waiting:
            made = generator.request(number)
            try:
                answer = await Client(made).run(app)
                _check(answer)
            except AssertionError as error:
                raise AssertionError(f"request {number}, {made!r}: {error}") from error
            statuses[answer.status] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(send_some())
    return statuses


def _check(answer):
    said = f"{answer.status} {answer.body[:500]!r}"
    assert answer.status < 500, said
    assert b"internal_error" not in answer.body, said
    if answer.status >= 400:
        assert b'"message":"' in answer.body, said


@dataclass
class Departures:
    """An observer of the server: at which point of a request its client was seen to have left."""

    points: Counter = field(default_factory=Counter)

    def observe(self, record):
        """Count a request whose client left."""
        if not record.aborted:
            return
        if record.responded_s is not None:
            self.points["in its stream"] += 1
        elif record.first_token_s is not None:
            self.points["before its answer was whole"] += 1
        elif record.num_prompt_tokens:
            self.points["before its first token"] += 1
        else:
            self.points["before it had a prompt"] += 1

    def check(self):
        """Raise `AssertionError` unless clients left at all points."""
        assert len(self.points) == 4, f"clients left only {dict(self.points)}"


def resident_mib(pid):
    """Return the memory that a process holds (proc(5), statm)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def settled(engine):
    """Wait until an engine has nothing. Raises `AssertionError` with its counts when something stays."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        stats, num_open = engine.stats, engine.num_outstanding
        if stats is not None and not (num_open or stats.num_running or stats.num_waiting or stats.kv_usage):
            return
        assert time.monotonic() < deadline_s, f"something is left: {num_open} requests are open, {stats}"
        await asyncio.sleep(0.05)


async def _fuzz_engine(app, engine, generator, options):
    """Send all requests of a run, look at the processes, and print what was seen."""
    departures, pids = Departures(), {"server": os.getpid(), "engine": engine.pid}
    app.observers.append(departures.observe)
    begin_s, statuses, memory, step = time.monotonic(), Counter(), {}, max(1, options.requests // 20)
    for first in range(0, options.requests, step):
        statuses += await fuzz(app, generator, range(first, min(first + step, options.requests)), options.at_once)
        await settled(engine)
        assert engine.pid == pids["engine"], "the engine was started again"
        assert app.status.num_in_flight == 0, "requests are in flight that nobody made"
        held = {name: resident_mib(pid) for name, pid in pids.items()}
        if first >= NUM_WARM and not memory:
            memory = held
        done = min(first + step, options.requests)
        shown = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in held.items())
        print(
            f"{done} requests in {time.monotonic() - begin_s:.0f} s; {shown}; {dict(sorted(statuses.items()))}",
            flush=True,
        )
    for name, mib in memory.items():
        assert held[name] <= mib + GROWTH_MIB, f"{name} grew from {mib:.0f} to {held[name]:.0f} MiB"
    print(f"clients left: {dict(departures.points)}")
    departures.check()
    print("no answer of 500 or more; the engine ran through; nothing is left in it, no KV block in use")


async def _main(options):
    from serving.fakes import CHECKPOINT
    from zif.serving.engine.client import ProcessEngine
    from zif.serving.http import sse
    from zif.serving.http.app import build_app
    from zif.serving.http.assembly import open_apis
    from zif.serving.http.openapi import openapi_document
    from zif.serving.http.settings import ServeSettings
    from zif.settings import EngineSettings

    # A server looks after 50 ms for clients that leave; most of these answers are there before.
    sse.WATCH_AFTER_S = 0.0
    async with ProcessEngine(EngineSettings(str(CHECKPOINT), platform="null", max_model_len=MAX_MODEL_LEN)) as engine:
        await engine.wait_ready()
        settings = ServeSettings(answer_format=options.answer_format)
        async with open_apis(engine, settings) as routes:
            app = build_app(engine, settings, routes)
            generator = Generator(openapi_document(app.context.registry), options.seed, (engine.info.name,))
            if options.only is None:
                await _fuzz_engine(app, engine, generator, options)
                return
            made = generator.request(options.only)
            answer = await Client(made).run(app)
            print(made, answer.status, answer.headers, answer.body.decode("utf-8", "replace"), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answer-format", help="how the model is taken to write calls, as `zif serve` takes it")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="send that request and print its answer")
    asyncio.run(_main(parser.parse_args()))
