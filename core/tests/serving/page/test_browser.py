"""The page in a real browser: it streams, stops, counts, fits phones, and asks nobody but its server."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn

from serving.page.browser import CHROMIUM, Browser, open_browser
from serving.telemetry.scripted_engine import ScriptedEngine, stats
from zif.serving.http.app import build_app
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Request, Response, Stream, event, json_response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.http.settings import ServeSettings
from zif.serving.page import page_routes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

PICTURES = os.environ.get("ZIF_TEST_PICTURES")
"""Where to put pictures of the page; nowhere when it is not set."""

FOCUS_CSS = "document.activeElement.id"


class Body(msgspec.Struct):
    model: str
    stream: bool
    stream_options: dict[str, Any]
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


class Script:
    """Answers as OpenAI's API does: what is asked for decides what comes."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.left = threading.Event()

    def routes(self) -> list[Route]:
        post = {"method": "POST", "scope": AuthScope.INFERENCE, "request_type": Body}
        return [
            Route("/v1/models", "GET", AuthScope.INFERENCE, self.models),
            Route("/v1/chat/completions", handler=self.answer, **post),
            Route("/v1/completions", handler=self.answer, **post),
        ]

    async def models(self, request: Request[None], context: ServerContext) -> Response:
        return json_response({"data": [{"id": "tiny"}]})

    async def answer(self, request: Request[Body], context: ServerContext) -> Stream:
        self.bodies.append(request.body)
        asked = request.body.prompt or request.body.messages[-1]["content"]
        if asked == "fail":
            raise ApiError(FailureKind.INVALID, "the prompt is <b>wrong</b>")
        return Stream(self._frames(asked, is_chat=request.body.prompt is None))

    async def _frames(self, asked: str, is_chat: bool) -> AsyncGenerator[bytes, None]:
        try:
            if asked == "endless":
                while True:
                    yield frame("more ", is_chat)
                    await asyncio.sleep(0.005)
            if is_chat:
                yield event(json.dumps({"choices": [{"delta": {"reasoning_content": "thinking"}}]}).encode())
            for piece in ("Grüße ", "<script>document.title = 'broken'</script> ", "an alle.\n", "Zeile 2"):
                yield frame(piece, is_chat)
                await asyncio.sleep(0.01)
            yield event(json.dumps({"choices": [], "usage": {"completion_tokens": 42}}).encode())
            yield event(b"[DONE]")
        finally:
            self.left.set()


def frame(text: str, is_chat: bool) -> bytes:
    choice = {"delta": {"content": text}} if is_chat else {"text": text}
    return event(json.dumps({"choices": [choice]}, ensure_ascii=False).encode())


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def url(script: Script) -> Iterator[str]:
    engine = ScriptedEngine(stats=stats(num_running=3, num_waiting=2, kv_usage=0.375))
    app = build_app(engine, ServeSettings(), [*page_routes(), *script.routes()])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.open(url)
        browser.resize(1200, 800, "light")
        yield browser


@pytest.fixture
def page(browser: Browser) -> Browser:
    """The page with an empty conversation and the focus in the message."""
    browser.value("document.querySelector('input[value=chat]').click()")
    browser.value("document.getElementById('clear').click()")
    return browser


def ask(page: Browser, text: str) -> None:
    page.value("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter", 13, "\r")


def text_of(page: Browser, selector: str) -> str:
    return page.value(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent).join('|')")


def picture(page: Browser, name: str) -> None:
    if PICTURES is not None:
        page.picture(Path(PICTURES) / f"{name}.png")


def test_it_connects_and_shows_live_numbers(page: Browser) -> None:
    page.until("document.getElementById('model').textContent === 'tiny'")
    page.until("document.getElementById('usage').textContent === '37.5 %'")
    assert (text_of(page, "#running"), text_of(page, "#waiting")) == ("3", "2")
    assert page.value("document.getElementById('usage-meter').value") == 0.375


def test_a_chat_streams_and_its_history_goes_along(page: Browser, script: Script) -> None:
    ask(page, "first")
    page.until("document.getElementById('tokens').textContent === '42'")
    page.until("!document.getElementById('send').disabled")
    assert text_of(page, ".assistant .text") == ("Grüße <script>document.title = 'broken'</script> an alle.\nZeile 2")
    assert text_of(page, ".assistant .reasoning") == "thinking"
    assert page.value("document.title") == "zif"
    assert float(text_of(page, "#rate")) > 0
    assert text_of(page, "#first").endswith(" ms")
    ask(page, "second")
    page.until("document.querySelectorAll('.assistant').length === 2 && !document.getElementById('send').disabled")
    roles = [message["role"] for message in script.bodies[-1].messages]
    assert roles == ["user", "assistant", "user"]
    assert script.bodies[-1].max_tokens == 256
    assert script.bodies[-1].temperature is None
    picture(page, "page_desktop_light")


def test_options_go_along(page: Browser, script: Script) -> None:
    for name, value in (("temperature", "0.5"), ("seed", "7"), ("system", "be short")):
        page.value(f"document.getElementById({name!r}).value = {value!r}")
    ask(page, "hello")
    page.until("document.querySelectorAll('.assistant').length === 1 && !document.getElementById('send').disabled")
    for name in ("temperature", "seed", "system"):
        page.value(f"document.getElementById({name!r}).value = ''")
    body = script.bodies[-1]
    assert (body.temperature, body.seed, body.top_p) == (0.5, 7, None)
    assert body.messages[0] == {"role": "system", "content": "be short"}


def test_completion_mode(page: Browser, script: Script) -> None:
    page.value("document.querySelector('input[value=completion]').click()")
    ask(page, "Once upon")
    page.until("!document.getElementById('send').disabled && document.querySelectorAll('.assistant').length === 1")
    assert script.bodies[-1].prompt == "Once upon"
    assert text_of(page, ".assistant .text").endswith("Zeile 2")
    assert page.value("getComputedStyle(document.querySelector('.chat-only')).display") == "none"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_stream_and_keeps_what_came(page: Browser, script: Script, how: str) -> None:
    script.left.clear()
    ask(page, "endless")
    page.until("document.querySelector('.assistant .text')?.textContent.length > 20")
    if how == "button":
        page.value("document.getElementById('stop').click()")
    else:
        page.press("Escape", 27)
    page.until("!document.getElementById('send').disabled")
    assert text_of(page, ".assistant .text").startswith("more more ")
    assert text_of(page, "#problem") == ""
    assert script.left.wait(10), "the server was not told that nobody listens"


def test_errors_are_shown_as_text(page: Browser) -> None:
    ask(page, "fail")
    page.until("!document.getElementById('problem').hidden")
    assert text_of(page, "#problem") == "the prompt is <b>wrong</b>"
    assert page.value("document.querySelectorAll('#problem b').length") == 0


def test_everything_can_be_reached_by_keyboard(page: Browser) -> None:
    page.value("document.body.focus(); document.activeElement.blur()")
    reached = []
    for _ in range(14):
        page.press("Tab", 9, "\t")
        reached.append(page.value("document.activeElement.id || document.activeElement.tagName"))
    wanted = {"key", "log", "prompt", "send", "clear", "temperature", "top_p", "max_tokens", "seed", "system"}
    assert wanted <= set(reached), reached


def test_the_key_is_kept_for_the_session_only(page: Browser) -> None:
    page.value("document.getElementById('key').value = 'secret'")
    page.value("document.getElementById('key').dispatchEvent(new Event('change'))")
    assert page.value("sessionStorage.getItem('zif-api-key')") == "secret"
    assert page.value("localStorage.length") == 0
    assert page.value("document.cookie") == ""
    page.value("document.getElementById('key').value = ''")
    page.value("document.getElementById('key').dispatchEvent(new Event('change'))")
    assert page.value("sessionStorage.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1200, 800)])
def test_it_fits_and_can_be_read(page: Browser, width: int, height: int, scheme: str) -> None:
    page.resize(width, height, scheme)
    ask(page, "hello")
    page.until("document.querySelectorAll('.assistant').length === 1 && !document.getElementById('send').disabled")
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    for selector in ("body", ".user", ".assistant", "#send", "dt"):
        assert page.value(CONTRAST % selector) >= 4.5, f"{selector} cannot be read well (WCAG 2.2, 1.4.3)"
    picture(page, f"page_{'phone' if width < 600 else 'desktop'}_{scheme}")
    page.resize(1200, 800, "light")


def test_it_asked_nobody_else_and_broke_no_rule(page: Browser, url: str) -> None:
    page.value("1")
    asked = [told["params"]["request"]["url"] for told in page.told if told["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [address for address in asked if not address.startswith((url, "data:,"))] == []
    entries = [told["params"]["entry"]["text"] for told in page.told if told["method"] == "Log.entryAdded"]
    assert [text for text in entries if "Content Security Policy" in text or "Trusted" in text] == []
    assert [told for told in page.told if told["method"] == "Runtime.exceptionThrown"] == []


CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector("%s");
  const pair = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
})()
"""
