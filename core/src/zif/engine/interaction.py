"""A person in front of a running batch: the bar that shows progress, and Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def progress_bar(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts a finished prompt and its tokens on a bar with tokens per second."""
    from tqdm import tqdm

    num_tokens = 0
    with tqdm(total=total, desc="Processed prompts", unit="prompt", disable=not enabled) as bar:

        def advance(num_new_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += num_new_tokens
            elapsed = bar.format_dict["elapsed"]
            if elapsed:
                bar.set_postfix_str(f"{num_tokens / elapsed:.1f} tokens/s", refresh=False)
            bar.update()

        yield advance


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is torn; the second one raises as ever."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
