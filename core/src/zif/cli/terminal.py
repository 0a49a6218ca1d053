"""What commands write for people besides their results: warnings, start-up progress and summaries, all on stderr."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zif.engine.outputs import RequestOutput

_INTERVAL_S = 5.0


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr)


def note(text: str) -> None:
    """Print a line of information."""
    print(text, file=sys.stderr, flush=True)


def format_table(rows: list[tuple[str, ...]], indent: str = "  ") -> str:
    """Align columns; the last one is left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


class StartProgress:
    """Shows how an engine starts: a line that renews itself on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._phase = ""
        self._phase_begin_s = self._shown_s = time.perf_counter()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Hear that `done` of `total` units of a phase are done."""
        now = time.perf_counter()
        begins, ends = phase != self._phase, done >= total
        if begins:
            self._phase, self._phase_begin_s = phase, now
        if ends:
            self._show(f"{phase}: {now - self._phase_begin_s:.2f} s", lasting=True)
        elif self._live or begins or now - self._shown_s >= _INTERVAL_S:
            self._shown_s = now
            self._show(f"{phase} ... {done / total:.0%}" if done else f"{phase} ...", lasting=not self._live)

    def _show(self, text: str, *, lasting: bool) -> None:
        begin = "\r\x1b[K" if self._live else ""
        print(f"{begin}{text}", end="\n" if lasting else "", file=sys.stderr, flush=True)


def summary(outputs: "Sequence[RequestOutput]", seconds: float) -> str:
    """Return the line that ends a run: tokens in and out, time, rate, and when the first token came."""
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    waits = [output.metrics.time_to_first_token_s for output in outputs if output.metrics]
    first = min((wait for wait in waits if wait is not None), default=None)
    return (
        f"{num_prompt_tokens} prompt tokens, {num_output_tokens} output tokens, {seconds:.2f} s, "
        f"{num_output_tokens / seconds:.1f} tokens/s" + ("" if first is None else f", first token after {first:.3f} s")
    )
