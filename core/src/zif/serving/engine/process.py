"""The main program of an engine process: `python -m zif.serving.engine.process`, started by `EngineChild` only.

What to open comes as one line on standard input. The parent's death ends it at every point. It ignores SIGINT, which
terminals send to everyone, and drains on SIGTERM.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import msgspec

from zif.errors import ZifError
from zif.serving.engine.admission import Admission, capacity_of
from zif.serving.engine.channel import EngineEnd, remove_folder
from zif.serving.engine.lifetime import PARENT_DIED, end_with_parent, end_with_pipe, read_line
from zif.serving.engine.messages import (
    MAX_LAUNCH_BYTES,
    Failed,
    Hello,
    Launch,
    MessageError,
    Ready,
    Welcome,
    shortened,
)
from zif.serving.engine.phases import PhaseReports
from zif.serving.telemetry.line_writer import LineWriter, unlocked_stderr
from zif.settings import EngineSettings

WELCOME_S = 60.0
"""The client may be busy with its own start."""
LINGER_S = 2.0
COLLECT_AFTER_OBJECTS = 20_000
"""New objects between two collections; requests make few cycles, and thousands of objects a step."""
FAILED = 70
"""The exit status of an engine that said why it cannot go on."""

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until drained. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = read_line(sys.stdin.fileno(), MAX_LAUNCH_BYTES)
    if not line:
        return PARENT_DIED
    launch = msgspec.json.decode(line, type=Launch)
    folder = Path(launch.folder)
    end_with_pipe(sys.stdin.fileno(), lambda: remove_folder(folder))
    # A reader of the log who stands still must not hold a step up: the engine would be taken for hung, and killed.
    with contextlib.closing(LineWriter(unlocked_stderr())) as lines:
        logging.basicConfig(level=launch.log_level, handlers=[lines])
        logging.captureWarnings(True)
        return work(launch, folder)


def work(launch: Launch, folder: Path) -> int:
    """Meet the client in its folder, and serve it until drained. Returns the exit status."""
    end = EngineEnd(folder)
    try:
        greet(end)
        end_with_parent(launch.parent_pid)
        with contextlib.ExitStack() as stack:
            try:
                serve(launch, end, stack)
            except Exception as error:
                # Errors raised on purpose say all there is to say, and the client prints them.
                if not isinstance(error, ZifError):
                    logger.exception("the engine cannot go on")
                # Said before the model is closed: a device that is lost may take its time.
                end.send(Failed(shortened(f"{type(error).__name__}: {error}")))
                return FAILED
    finally:
        end.close(LINGER_S)
    return 0


def greet(end: EngineEnd) -> None:
    """Wait until the client has seen this process. Raises `MessageError` when it says something else, or nothing."""
    end.send(Hello(os.getpid()))
    if not end.wait(WELCOME_S):
        raise MessageError(f"the client said nothing in {WELCOME_S} s")
    messages = end.receive(max_messages=1)
    if not messages or not isinstance(messages[0], Welcome):
        raise MessageError(f"the client's first message is {messages!r} and must be Welcome")


def serve(launch: Launch, end: EngineEnd, stack: contextlib.ExitStack) -> None:
    """Open the model on `stack` and run the loop until it is drained. Raises what opening and steps raise."""
    with PhaseReports(end) as on_phase:
        from zif.engine.llm import LLM
        from zif.serving.engine.block_news import BlockNews, from_launch
        from zif.serving.engine.loop import EngineLoop
        from zif.serving.engine.startup import model_info

        settings = EngineSettings.from_values(launch.settings)
        news = None if launch.kv_events is None else BlockNews(from_launch(launch.kv_events))
        if news is not None:
            stack.callback(news.close)
        journal = None if news is None else news.journal
        llm = stack.enter_context(LLM.from_settings(settings, on_phase, journal))
        on_phase("reading the vocabulary", 0, 1)
        llm.engine.load_grammars()
        on_phase("reading the vocabulary", 1, 1)
        info = model_info(llm, settings, launch.name)
    capacity = capacity_of(info, launch.max_queued, launch.max_queued_tokens)
    loop = EngineLoop(llm, end, Admission(capacity), launch.report_s, news)

    def on_terminate(signum: int, frame: FrameType | None) -> None:
        loop.want_drain()

    signal.signal(signal.SIGTERM, on_terminate)
    settle_memory()
    end.send(Ready(info))
    loop.run()


def settle_memory() -> None:
    """Leave what opening made out of garbage collection, so that no step waits while all modules are walked."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)


if __name__ == "__main__":
    sys.exit(main())
