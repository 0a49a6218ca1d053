"""A served model whose template has everything that chats can hold, and the official clients on it, in one process.

The model is the embedded one with another chat template: tools, earlier calls and results, reasoning, in Hermes' form.
"""

import contextlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import anthropic
import httpx2
import openai

from serving.fakes import CHECKPOINT, MODEL_INFO, FakeEngine
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.responses.api import ResponsesApi
from zif.text.tokenizer import load_tokenizer

MODEL = "embedded"
TEMPLATE = """
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- if reasoning_effort %}<effort>{{ reasoning_effort }}</effort>{% endif %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.name %}{{ message.name }}: {% endif %}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"""

THOUGHTS = "<think>\nLook it up.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def write_model(folder: Path) -> Path:
    """Write the model's tokenizer and template into `folder`."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


class Served:
    """A server in this process, with the engine behind it and clients in front of it."""

    def __init__(self, folder: Path, script=None, keys=None, **settings):
        self.engine = FakeEngine(script, info=replace_info(folder))
        self.tokenizer = load_tokenizer(folder)
        self.chats = ChatService(self.engine, format_name="hermes")
        self.anthropic_api = AnthropicApi(self.chats)
        self.responses_api = ResponsesApi(self.chats)
        routes = [*self.anthropic_api.routes(), *self.responses_api.routes()]
        self.records = []
        self.app = build_app(self.engine, ServeSettings(**settings), routes, keys, [self.records.append])

    def prompt(self, index=-1) -> str:
        """Return the text of what the engine was asked."""
        return self.tokenizer.decode(self.engine.submitted[index].prompt.token_ids, skip_special_tokens=False)

    @contextlib.asynccontextmanager
    async def anthropic(self):
        async with self._http() as http:
            yield anthropic.AsyncAnthropic(api_key="k", base_url="http://localhost", http_client=http, max_retries=0)

    @contextlib.asynccontextmanager
    async def openai(self):
        async with self._http() as http:
            yield openai.AsyncOpenAI(api_key="k", base_url="http://localhost/v1", http_client=http, max_retries=0)

    @contextlib.asynccontextmanager
    async def _http(self):
        try:
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.app)) as http:
                yield http
        finally:
            self.chats.close()


def replace_info(folder: Path):
    """Return the model's description, with its files in `folder`."""
    values = {name: getattr(MODEL_INFO, name) for name in MODEL_INFO.__struct_fields__}
    return type(MODEL_INFO)(**{**values, "folder": str(folder)})


def sampling_of(served: Served):
    """Return the sampling options of the last request."""
    return replace(served.engine.submitted[-1].sampling)


def events_of(body: bytes) -> list[tuple[str, dict]]:
    """Return the name and the JSON of each server-sent event, comments and the final mark left out."""
    events = []
    for frame in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
        if "data" in lines and lines["data"] != "[DONE]":
            events.append((lines.get("event", ""), json.loads(lines["data"])))
    return events


def cut_at(text: str, places) -> list[str]:
    """Cut a text at places, given in any order."""
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]
