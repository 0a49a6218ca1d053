"""Log lines from a thread: a log that nobody reads stops nobody."""

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from zif.serving.telemetry import line_writer
from zif.serving.telemetry.line_writer import LineWriter


class Stuck(io.StringIO):
    """A stream whose reader stands still until `go`. `tried` says that somebody waits in it."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.tried = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.tried.set()
        self.go.wait(30)
        return super().write(text)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.Logger("zif.test")
    yield logger
    for handler in logger.handlers:
        handler.close()


def test_lines_come_in_order_and_whole(logger: logging.Logger) -> None:
    stream = io.StringIO()
    writer = LineWriter(stream)
    logger.addHandler(writer)
    for number in range(500):
        logger.info("line %d", number)
    writer.close()
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == [f"line {n}" for n in range(500)]


def test_a_reader_that_stands_still_stops_nobody(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "MAX_WAITING_LINES", 8)
    stream = Stuck()
    writer = LineWriter(stream)
    logger.addHandler(writer)
    logger.info("first")
    assert stream.tried.wait(10)
    for number in range(100):
        logger.info("line %d", number)
    stream.go.set()
    writer.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    messages = [line["message"] for line in lines]
    assert messages[:2] == ["first", "line 0"]
    assert messages.count("log lines were lost") == 1
    assert sum(line.get("lost", 0) for line in lines) == 101 - (len(lines) - 1)


def test_the_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "CLOSE_S", 0.05)
    stream = Stuck()
    writer = LineWriter(stream)
    writer.handle(logging.LogRecord("zif", logging.INFO, "", 0, "stuck", (), None))
    assert stream.tried.wait(10)
    writer.close()
    writer.close()
    assert stream.getvalue() == ""
    stream.go.set()


def test_a_stream_that_broke_is_no_fault(logger: logging.Logger) -> None:
    stream = io.StringIO()
    writer = LineWriter(stream)
    logger.addHandler(writer)
    stream.close()
    logger.info("nobody hears this")
    writer.close()
