"""The report page in a headless Chromium: it opens, complains of nothing, asks for nothing, and its list filters.

The browser is spoken to over its debugging pipe, so that no package is needed. Where there is no Chromium the tests are
skipped; `test_bundle.py` reads the page without one.
"""

import datetime
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from zif_conformance.bundle.page import report_page
from zif_conformance.bundle.result import RunFacts, build_result
from zif_conformance.marks import Declaration
from zif_conformance.outcomes import Measurement, TestCase, TestOutcome, Verdict
from zif_conformance.supervisor import Run

_PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "headless_shell")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
_DEADLINE_S = 60.0


class _Page:
    """One open page. `requests` are the addresses that it asked for, `complaints` what it wrote to the console."""

    def __init__(self, send: Callable[[dict[str, Any]], None], receive: Callable[[], dict[str, Any]]) -> None:
        self._send = send
        self._receive = receive
        self._session: dict[str, str] = {}
        self._num_sent = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.as_uri())
        while self._take(self._receive()).get("method") != "Page.loadEventFired":
            pass
        self.evaluate("document.readyState")

    def evaluate(self, script: str) -> Any:
        """Return the value of a script in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the browser and return its result."""
        self._num_sent += 1
        self._send({"id": self._num_sent, "method": method, "params": parameters, **self._session})
        while (message := self._take(self._receive())).get("id") != self._num_sent:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def _take(self, message: dict[str, Any]) -> dict[str, Any]:
        details = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(details["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(details))
        return message


@contextmanager
def _browser(program: str, profile: Path) -> Iterator[_Page]:
    """Start the browser with a profile folder of its own and end it afterwards."""
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    command = [program, *_OPTIONS, f"--user-data-dir={profile}", "--window-size=1200,900"]
    # The browser reads commands from descriptor 3 and answers on 4.
    script = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(commands_out, answers_in),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield _Page(lambda message: _write(commands_in, message), _reader(answers_out))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        os.close(commands_in)
        os.close(answers_out)


def _write(descriptor: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\0")
    while data:
        data = data[os.write(descriptor, data) :]


def _reader(descriptor: int) -> Callable[[], dict[str, Any]]:
    """Return a function that gives one message after the other."""
    pending = bytearray()
    deadline = time.monotonic() + _DEADLINE_S

    def receive() -> dict[str, Any]:
        while b"\0" not in pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser did not answer in time"
            part = os.read(descriptor, 1 << 16)
            assert part, "the browser ended"
            pending.extend(part)
        line, _, rest = bytes(pending).partition(b"\0")
        pending[:] = rest
        message: dict[str, Any] = json.loads(line)
        return message

    return receive


_ATTACK = "<script>alert(1)</script>\"'><img src=http://127.0.0.1:61999/x onerror=alert(1)>"


def _result() -> dict[str, Any]:
    """Return the result of a run in which every word occurs."""
    now = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
    declaration = Declaration("L1", "G3", ("6.1",))
    outcomes = {}
    for i, verdict in enumerate(Verdict):
        measured = (Measurement("G3", 0.1 * i, 1.0, _ATTACK), Measurement("G2", 0.0, 1.0))
        test_id = f"L1.{'odd' if i % 2 else 'even'}.case[{verdict}]"
        detail = "" if verdict is Verdict.PASSED else f"why\nE   {_ATTACK}"
        outcomes[test_id] = TestOutcome(test_id, declaration, verdict, detail, 0.1 * i, (), (), measured)
    cases = tuple(TestCase(name, f"x::{name}", declaration, False) for name in outcomes)
    run = Run(cases, cases, {"platform": {"name": f"toy {_ATTACK}"}}, outcomes)
    return build_result(run, RunFacts("toy", ("L1",), None, now, now))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Page]:
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no Chromium here: none of {', '.join(_PROGRAMS)} is on the path")
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(report_page(_result()), encoding="utf-8")
    with _browser(program, folder / "profile") as opened:
        opened.open(path)
        yield opened


def test_it_opens_without_a_complaint_and_asks_for_nothing(page: _Page) -> None:
    assert page.complaints == []
    assert [request for request in page.requests if not request.endswith("/report.html")] == []
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.querySelectorAll('svg').length") == 2


def test_it_is_laid_out(page: _Page) -> None:
    assert page.evaluate("document.querySelector('h1').getBoundingClientRect().height") > 20
    assert page.evaluate("getComputedStyle(document.body).margin") == "0px"
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth") is True


def test_every_outcome_is_listed_and_the_list_filters(page: _Page) -> None:
    shown = "[...document.querySelectorAll('#tests tbody tr')].filter(row => row.offsetHeight > 0).length"
    assert page.evaluate(shown) == len(Verdict)
    set_word = "word.value = {!r}; word.dispatchEvent(new Event('change'))"
    set_text = "text.value = {!r}; text.dispatchEvent(new Event('input'))"
    page.evaluate(set_word.format("crashed"))
    assert page.evaluate(shown) == 1
    page.evaluate(set_word.format(""))
    page.evaluate(set_text.format("L1.ODD"))
    assert page.evaluate(shown) == len(Verdict) // 2
    page.evaluate(set_text.format(""))
    assert page.evaluate(shown) == len(Verdict)


def test_the_browser_would_tell_of_a_page_that_misbehaves(page: _Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><img src='http://127.0.0.1:61999/x.png'><script>nothing.here()</script>")
    with _browser(str(next(filter(None, map(shutil.which, _PROGRAMS)))), tmp_path / "profile") as opened:
        opened.open(bad)
        assert "http://127.0.0.1:61999/x.png" in opened.requests
        assert any("nothing is not defined" in complaint for complaint in opened.complaints)
