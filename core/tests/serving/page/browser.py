"""A headless Chromium, spoken to over a pipe in the DevTools protocol: no port, no other library."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 60.0
_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
# Requests of the browser itself are turned off: the test asserts that the page makes none to others.
_OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--mute-audio",
    "--remote-debugging-pipe",
]


class Browser:
    """One tab. `told` are the events that came: requests, messages of the console, violations of the policy."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out = to_browser
        self._in = from_browser
        self._rest = b""
        self._next_id = 0
        self._session: str | None = None
        self.told: list[dict[str, Any]] = []

    def open(self, url: str) -> None:
        """Open a tab and listen to it before it loads anything."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._next_id:
            self.told.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def value(self, script: str) -> Any:
        """Return what a script gives in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (script, result)
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until a condition holds in the page."""
        script = (
            f"new Promise((done) => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look() }})"
        )
        assert self.value(script) is True

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def resize(self, width: int, height: int, scheme: str) -> None:
        """Give the page another size and colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """Write what the page looks like."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _receive(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + WAIT_S
        while b"\0" not in self._rest:
            ready = select.select([self._in], [], [], max(0.0, deadline_s - time.monotonic()))[0]
            assert ready, "the browser did not answer"
            piece = os.read(self._in, 2**20)
            assert piece, "the browser ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start a browser with its files in `folder`, and end it."""
    assert CHROMIUM is not None, "there is no browser"
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # It reads commands from descriptor 3 and writes answers to 4.
    moves = [(os.POSIX_SPAWN_DUP2, high_copy(theirs_in), 3), (os.POSIX_SPAWN_DUP2, high_copy(theirs_out), 4)]
    silence = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (1, 2)]
    process_id = os.posix_spawn(
        CHROMIUM,
        [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}"],
        {**os.environ, "HOME": str(folder)},
        file_actions=[*silence, *moves],
    )
    for number in (theirs_in, theirs_out, *(source for _, source, _ in moves)):
        os.close(number)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.close(ours_out)
        os.close(ours_in)
        os.kill(process_id, signal.SIGTERM)
        os.waitpid(process_id, 0)


def high_copy(number: int) -> int:
    """Return a copy of a descriptor that is in nobody's way."""
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
