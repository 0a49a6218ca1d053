"""The page's files: what they may load, how they are served, and how the script reads a stream."""

import asyncio
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import zif.serving.page
from zif.serving.http.exchange import AuthScope, Caller, Headers, Request, RequestRecord, Response
from zif.serving.page import page_routes

FOLDER = Path(zif.serving.page.__file__).parent
NODE = shutil.which("node")


def fetched(path: str, known: str | None = None) -> Response:
    route = next(route for route in page_routes() if route.path == path)
    pairs = [] if known is None else [(b"if-none-match", known.encode())]
    request = Request(None, Headers(pairs), Caller(), RequestRecord("id"), path, {})
    return asyncio.run(route.handler(request, None))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed((FOLDER / "page.html").read_text())
    return parser.tags


@pytest.mark.parametrize(
    ("path", "content_type"),
    [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")],
)
def test_files_are_served_with_type_tag_and_policy(path: str, content_type: str) -> None:
    answer = fetched(path)
    assert answer.content_type == f"{content_type}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_a_browser_that_has_the_file_gets_no_body() -> None:
    tag = fetched("/page.js").headers["etag"]
    for known in (tag, f'"other", {tag}', f"W/{tag}"):
        answer = fetched("/page.js", known)
        assert (answer.status, answer.body) == (304, b"")
    for known in ('"other"', tag.strip('"'), "*x"):
        assert fetched("/page.js", known).status == 200


def test_tags_tell_files_apart() -> None:
    assert len({fetched(route.path).headers["etag"] for route in page_routes()}) == 3


def test_the_page_is_public_and_in_no_document() -> None:
    assert {(route.scope, route.hidden) for route in page_routes()} == {(AuthScope.PUBLIC, True)}


def test_nothing_leads_outside() -> None:
    for path in FOLDER.glob("page.*"):
        assert not re.search(r"(?i)\b(https?:|wss?:|//[a-z0-9-]+\.)|@import|url\(", path.read_text()), path.name


def test_nothing_stands_inline(tags) -> None:
    for tag, attributes in tags:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "script":
            assert attributes["src"] == "/page.js"
    assert not [tag for tag, _ in tags if tag in ("style", "iframe", "object", "embed", "base")]


def test_text_from_the_network_never_becomes_markup() -> None:
    script = (FOLDER / "page.js").read_text()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage|cookie"
    assert re.findall(forbidden, script) == []


def test_every_field_has_a_label(tags) -> None:
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    fields = [attributes for tag, attributes in tags if tag in ("input", "textarea", "meter")]
    assert fields
    assert [given for given in fields if given.get("type") != "radio" and given.get("id") not in labelled] == []


def test_the_script_asks_for_ids_that_are_there(tags) -> None:
    ids = {attributes.get("id") for _, attributes in tags}
    asked = set(re.findall(r'(?:find|show)\("([a-z_-]+)"', (FOLDER / "page.js").read_text()))
    assert asked
    assert asked <= ids


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("page.*")) < 64 * 1024


def in_node(folder: Path, script: str) -> object:
    """Run a script beside the page's and return what it prints."""
    if NODE is None:
        pytest.skip("node is not installed")
    shutil.copy(FOLDER / "page.js", folder / "page.mjs")
    (folder / "test.mjs").write_text(f'import * as page from "./page.mjs";\n{script}')
    done = subprocess.run([NODE, folder / "test.mjs"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_reader_of_events_gives_the_same_wherever_the_stream_is_cut(tmp_path: Path) -> None:
    stream = (
        ": keep-alive\n\nevent: first\r\ndata: one\r\ndata:two\r\n\r\ndata\n\nid: 7\ndata: Grüße 👋\n\r\n"
        "event: nothing\n\ndata:  spaced\r\rdata: [DONE]\n\ndata: unfinished\n"
    )
    script = f"""
        const stream = {json.dumps(stream)};
        const whole = JSON.stringify(new page.EventReader().push(stream));
        let same = true;
        for (let i = 0; i <= stream.length; i++) {{
          for (let j = i; j <= stream.length; j += 3) {{
            const reader = new page.EventReader();
            const pieces = [stream.slice(0, i), stream.slice(i, j), stream.slice(j)];
            same &&= JSON.stringify(pieces.flatMap((piece) => reader.push(piece))) === whole;
          }}
        }}
        console.log(JSON.stringify([same, JSON.parse(whole)]));
    """
    same, events = in_node(tmp_path, script)
    assert same
    assert [(event["name"], event["data"]) for event in events] == [
        ("first", "one\ntwo"), ("message", ""), ("message", "Grüße 👋"), ("message", " spaced"), ("message", "[DONE]"),
    ]  # fmt: skip


def test_an_event_without_end_is_refused(tmp_path: Path) -> None:
    script = """
        const reader = new page.EventReader();
        let refused = false;
        try { for (let i = 0; i < 6; i++) reader.push("x".repeat(1024 * 1024)); } catch { refused = true; }
        console.log(JSON.stringify(refused));
    """
    assert in_node(tmp_path, script) is True


def test_pieces_requests_and_rates(tmp_path: Path) -> None:
    script = """
        const call = { choices: [{ delta: { tool_calls: [{ function: { name: "f", arguments: "{" } }] } }] };
        let message = "";
        try { page.pieceOf('{"error":{"message":"no room"}}'); } catch (error) { message = error.message; }
        const options = { temperature: "", top_p: "0.5", max_tokens: "8", seed: "0", system: "short" };
        const said = [{ role: "user", content: "hi" }];
        console.log(JSON.stringify([
          page.pieceOf('{"choices":[{"delta":{"content":"a","reasoning_content":"b"},"finish_reason":"length"}]}'),
          page.pieceOf('{"choices":[{"text":"c"}]}'),
          page.pieceOf('{"choices":[],"usage":{"completion_tokens":3}}').numTokens,
          page.pieceOf(JSON.stringify(call)).calls,
          message,
          page.requestOf("chat", "m", said, options),
          page.requestOf("completion", "m", said, options),
          [page.rateOf(11, 0, 500), page.rateOf(1, 0, 500), page.rateOf(5, 7, 7)],
        ]));
    """
    chat, completion, num_tokens, call, message, asked, continued, rates = in_node(tmp_path, script)
    assert (chat["text"], chat["reasoning"], chat["finish"]) == ("a", "b", "length")
    assert (completion["text"], num_tokens, call, message) == ("c", 3, "\nf {", "no room")
    shared = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
    shared |= {"top_p": 0.5, "max_tokens": 8, "seed": 0}
    system = {"role": "system", "content": "short"}
    assert asked == {
        "path": "/v1/chat/completions",
        "body": {**shared, "messages": [system, {"role": "user", "content": "hi"}]},
    }
    assert continued == {"path": "/v1/completions", "body": {**shared, "prompt": "hi"}}
    assert rates == [20, None, None]
