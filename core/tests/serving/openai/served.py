"""An OpenAI client against the ASGI application in this process, over an engine that is a script."""

import asyncio
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import openai
from msgspec.structs import replace

from serving.fakes import CHECKPOINT, MODEL_INFO, FakeEngine, Script
from serving.http.calls import call
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes

TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}</tools>"
    'Answer with <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>{% endif %}'
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}"
    "{# reasoning goes between <think> and </think> #}"
)
"""In the way of Hermes and Qwen: calls are tagged JSON, and thinking is begun by the prompt."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "Hello"}]

CALL = ['<tool_call>\n{"name": "get_', 'weather", "argum', 'ents": {"city": "Pa', 'ris"}}\n</tool', "_call>"]
"""What `write_model`'s model says to call `WEATHER`, in tokens that end within words and marks."""


@dataclass
class Served:
    """An application with its engine, and what clients of it get."""

    engine: FakeEngine
    settings: ServeSettings = field(default_factory=ServeSettings)

    def __post_init__(self):
        self.service = ChatService(self.engine)
        self.app = build_app(self.engine, self.settings, openai_routes(self.service))

    def ask(self, make):
        """Run `make(client)` with an official client and return its result."""

        async def main():
            transport = httpx2.ASGITransport(app=self.app)
            async with (
                httpx2.AsyncClient(transport=transport) as http,
                openai.AsyncOpenAI(
                    api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0
                ) as client,
            ):
                return await make(client)

        return self._run(main())

    def chat(self, messages=HELLO, **options):
        return self.ask(lambda client: client.chat.completions.create(model="embedded", messages=messages, **options))

    def chat_chunks(self, messages=HELLO, **options):
        """Return the chunks of a streamed chat."""

        async def read(client):
            stream = await client.chat.completions.create(model="embedded", messages=messages, stream=True, **options)
            return [chunk async for chunk in stream]

        return self.ask(read)

    def complete(self, prompt="Hello", **options):
        return self.ask(lambda client: client.completions.create(model="embedded", prompt=prompt, **options))

    def completion_chunks(self, prompt="Hello", **options):
        """Return the chunks of a streamed completion."""

        async def read(client):
            stream = await client.completions.create(model="embedded", prompt=prompt, stream=True, **options)
            return [chunk async for chunk in stream]

        return self.ask(read)

    def post(self, path, body, **options):
        """Return the plain answer to a body."""
        return self._run(call(self.app, path, body, **options))

    def get(self, path):
        return self._run(call(self.app, path))

    def _run(self, coroutine):
        try:
            return asyncio.run(coroutine)
        finally:
            self.service.close()
            self.service = self.service.__class__(self.engine)
            self.app = build_app(self.engine, self.settings, openai_routes(self.service))

    @property
    def sampling(self):
        """What the last request asked of the engine."""
        return self.engine.submitted[-1].sampling

    @property
    def prompt(self):
        """The last prompt that came to the engine."""
        return self.engine.submitted[-1].prompt


def serve(script=None, folder=None, settings=None, **info) -> Served:
    """Serve the embedded model's tokenizer, or that of `folder`, over a script."""
    if folder is not None:
        info["folder"] = str(folder)
    engine = FakeEngine(script, replace(MODEL_INFO, **info))
    return Served(engine, settings or ServeSettings())


def write_model(folder: Path, template: str = TOOLS_TEMPLATE) -> Path:
    """Write a model folder with the embedded tokenizer and another chat template."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def said(*pieces, **script) -> Script:
    """Return the script of an engine that says these pieces, one token each."""
    return Script(pieces=list(pieces), **script)


def no_thinking(**kwargs):
    """Return the options of a request for an answer without thinking."""
    return {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, **kwargs}
