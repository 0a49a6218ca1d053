"""Random requests made from a server's OpenAPI document: valid ones, ones with one wrong value, and broken bytes.

    python core/tests/serving/http/fuzz.py --requests 100000 --seed 1        # against a real engine, null platform

What must hold: no answer but 2xx, 4xx and 501, every error has a message, and whoever leaves is forgotten.
"""

import argparse
import asyncio
import contextlib
import json
import random
import resource
import sys
from collections import Counter
from pathlib import Path

_EXTREMES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.0, 1e308, 5e-324, 0.5, "", " ", "\x00",
    "a" * 5000, "\U0001f600" * 50, "../../etc/passwd", "{{ 7*7 }}", "(a+)+$", [], {}, [[]], [None], [0] * 300,
    {"a": {"b": {"c": []}}}, {"type": "object"}, {"type": "text", "text": "x"}, {"role": "user", "content": "x"},
    "auto", "none", "<|user|>",
]  # fmt: skip
_TEXTS = ["hello", "Return a list of", "a b c", "é", "{", '{"x": 1}', "def f(x):\n    return x\n", "<|assistant|>"]
_MAX_DEPTH = 6


class Generator:
    """Makes requests of a document. The same seed makes the same ones."""

    def __init__(self, document, seed, models=("embedded",)):
        self._schemas = document["components"]["schemas"]
        self._random = random.Random(seed)
        self._models = models
        self._operations = [
            (path, method.upper(), operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]

    def request(self):
        """Return (path, method, body), the body None where there is none."""
        path, method, operation = self._random.choice(self._operations)
        path = path.partition("{")[0] + ("".join(self._random.choices("abc/é%.", k=4)) if "{" in path else "")
        if "requestBody" not in operation:
            return path, method, None
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        value = self.value(schema, 0)
        if "model" in value:
            value["model"] = self._models[0]
        kind = self._random.random()
        if kind < 0.5:
            value = self._spoiled(value)
        body = json.dumps(value, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")
        return path, method, self._broken(body) if kind > 0.95 else body

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
        share = 0.25 if depth else 0.15
        made = {
            name: self.value(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in required or (depth < _MAX_DEPTH and self._random.random() < share)
        }
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) and depth < _MAX_DEPTH:
            made |= {key: self.value(extra, depth + 1) for key in ("1", "x") if self._random.random() < share}
        return made

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

    def leaves(self):
        """Say after how many turns of the loop the client of a request leaves; None: it stays."""
        return self._random.randrange(30) if self._random.random() < 0.1 else None


async def fuzz(app, generator, num_requests):
    """Send requests one by one and return how many got which status. Raises `AssertionError` with the request."""
    from serving.http.calls import Call

    statuses = Counter()
    for _ in range(num_requests):
        path, method, body = generator.request()
        request = Call(path, body, method=method)
        task = asyncio.create_task(app(request.scope, request.receive, request.send))
        after = generator.leaves()
        if after is not None:
            for _ in range(after):
                await asyncio.sleep(0)
            request.leave()
        try:
            async with asyncio.timeout(30):
                await task
        except TimeoutError:
            raise AssertionError(f"no answer: {method} {path} {body!r}") from None
        answer = request.answer
        statuses[answer.status] += 1
        said = f"{method} {path} {body!r} gave {answer.status} {answer.body[:500]!r}"
        assert answer.status < 500 or answer.status == 501 or path in ("/readyz", "/health"), said
        if answer.status >= 400:
            assert b'"message":"' in answer.body, said
        assert b"internal_error" not in answer.body, said
    return statuses


async def _main(options):
    from serving.fakes import CHECKPOINT
    from zif.serving.engine.client import ProcessEngine
    from zif.serving.http.app import build_app
    from zif.serving.http.assembly import open_apis
    from zif.serving.http.openapi import openapi_document
    from zif.serving.http.settings import ServeSettings
    from zif.settings import EngineSettings

    engine = ProcessEngine(EngineSettings(str(CHECKPOINT), platform="null"))
    await engine.start()
    with contextlib.suppress(KeyboardInterrupt):
        await engine.wait_ready()
        pid = engine.pid
        async with open_apis(engine, ServeSettings()) as routes:
            app = build_app(engine, ServeSettings(), routes)
            generator = Generator(openapi_document(app.context.registry), options.seed, (engine.info.name,))
            step = max(1, options.requests // 20)
            for done in range(0, options.requests, step):
                statuses = await fuzz(app, generator, min(step, options.requests - done))
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                print(f"{done + step} requests, {memory} MiB at most:", dict(sorted(statuses.items())), flush=True)
        assert engine.pid == pid, "the engine was started again"
    await engine.close()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    asyncio.run(_main(parser.parse_args()))
