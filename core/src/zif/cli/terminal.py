"""What commands write for people besides their results: warnings, start-up progress and summaries, all on stderr."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zif.contract import ModelDescription
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


def held_as(model: "ModelDescription") -> str:
    """Say in what weights are held: the model dtype, and the schemes of those that are codes."""
    return ", ".join((model.dtype, *(f"weights {scheme}" for scheme in model.weight_schemes)))


class StartProgress:
    """Shows how an engine starts: a line that renews itself on a terminal, a line now and then elsewhere."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        """Show it with `write`, by default on standard error at once."""
        self._write = write or _write_error
        self._live = sys.stderr is not None and sys.stderr.isatty()
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
        self._write(f"{begin}{text}\n" if lasting else f"{begin}{text}")


def _write_error(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Tally:
    """What a run gave, counted as it comes, so that millions of answers need not be kept."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float | None = None
    errors: dict[str, None] = field(default_factory=dict)
    interrupted: bool = False

    def add(self, output: "RequestOutput") -> None:
        """Count an answer."""
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_output_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        wait = output.metrics.time_to_first_token_s if output.metrics else None
        if wait is not None:
            self.first_token_s = wait if self.first_token_s is None else min(wait, self.first_token_s)
        self.errors |= dict.fromkeys(sample.error for sample in output.outputs if sample.error)
        self.interrupted |= any(sample.finish_reason in (None, "abort") for sample in output.outputs)

    def summary(self, seconds: float) -> str:
        """Return the line that ends a run: tokens in and out, time, rate, and when the first token came."""
        first = "" if self.first_token_s is None else f", first token after {self.first_token_s:.3f} s"
        return (
            f"{self.num_prompt_tokens} prompt tokens, {self.num_output_tokens} output tokens, {seconds:.2f} s, "
            f"{self.num_output_tokens / seconds:.1f} tokens/s{first}"
        )
