"""No data becomes code in the server: unpickled, unmarshalled, evaluated, or given to a shell. Watched while tests run.

`core/tests/serving/test_safe_code.py` reads the source; this looks at what happens, whatever library it goes through.
The tests' process has the hook by `conftest.py`, and every Python process that tests start by `sitecustomize.py`, which
lies beside this file: there, as here, the call raises, and here the test fails even if somebody swallows that.

Pytest, torch and multiprocessing do all of this for good reasons. What counts is who asked: for `exec` the caller, for
the others any caller, up to the import machinery, which unmarshals and runs modules for everybody.
"""

import sys
from pathlib import Path
from types import FrameType

SOURCES = str(Path(__file__).resolve().parents[3] / "src/zif") + "/"
ROOMS = tuple(f"{SOURCES}{room}/" for room in ("serving", "parsing", "structured", "text", "engine", "contract"))
IMPORTS = "<frozen importlib"
WATCHED = {"pickle.find_class", "marshal.loads", "exec", "os.system"}


class Watch:
    """The hook of one process. `found` says what was seen, in words; `rooms` are the folders whose code is watched."""

    def __init__(self, rooms: tuple[str, ...] = ROOMS) -> None:
        self.found: list[str] = []
        self._rooms = rooms

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        """Hear an event of the interpreter; raise on what must not happen."""
        if event not in WATCHED:
            return
        frame: FrameType | None = sys._getframe().f_back
        while frame is not None and not frame.f_code.co_filename.startswith(IMPORTS):
            if frame.f_code.co_filename.startswith(self._rooms):
                self.found.append(f"{event} {arguments!r:.80} at {frame.f_code.co_filename}:{frame.f_lineno}")
                raise RuntimeError(f"data becomes code: {self.found[-1]}")
            frame = None if event == "exec" else frame.f_back


def install() -> Watch:
    """Watch this process until it ends."""
    watch = Watch()
    sys.addaudithook(watch.hear)
    return watch
