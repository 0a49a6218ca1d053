"""A trace's replay as one HTML page or one SVG drawing: no script, no font, nothing loaded from anywhere."""

from html import escape
from pathlib import Path

from zif.errors import ConfigError
from zif.simulation.planner import TraceReport, UsageSample

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 900, 220, 60, 30, 60
_OWNED, _CACHED, _WAITING = "#1f6f8b", "#b8d8d8", "#c1440e"


def check_plot_path(path: Path) -> None:
    """Raise `ConfigError` when the suffix names no form that can be drawn."""
    if path.suffix not in (".html", ".svg"):
        raise ConfigError(
            f"plot file {str(path)!r} has suffix {path.suffix!r}; zif draws .html and .svg and ships no rasterizer "
            "for .png: write .svg and convert it"
        )


def write_plot(report: TraceReport, path: Path) -> None:
    """Write a plot; the suffix decides the form. Raises `ConfigError` on another suffix or an unwritable file."""
    check_plot_path(path)
    text = page(report) if path.suffix == ".html" else drawing(report)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plot file {str(path)!r} cannot be written: {error}; choose another place") from error


def page(report: TraceReport) -> str:
    """Return the drawing with the numbers beside it as one HTML page."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in summary(report))
    style = "body{font:14px sans-serif;margin:2em}td{padding:2px 12px 2px 0}td+td{text-align:right}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>zif simulate</title><style>{style}</style>'
        f"</head><body><h1>zif simulate</h1><table>{rows}</table>{drawing(report)}</body></html>\n"
    )


def summary(report: TraceReport) -> list[tuple[str, str]]:
    """Return the figures of a report for people, in order."""
    return [
        ("requests", f"{report.num_requests} ({report.num_refused} refused, {report.num_unfinished} unfinished)"),
        ("steps", f"{report.num_steps} in {report.duration_s:.2f} s of modelled time"),
        ("prefix hit rate", f"{report.hit_rate:.1%} ({report.cached_tokens} of {report.prompt_tokens} prompt tokens)"),
        ("queue time", f"p50 {report.queue_p50_s:.3f} s, p99 {report.queue_p99_s:.3f} s"),
        ("time to first token", f"p50 {report.first_token_p50_s:.3f} s, p99 {report.first_token_p99_s:.3f} s"),
        ("preemptions", f"{report.num_preemptions}"),
        ("output", f"{report.output_tokens} tokens, {report.output_tokens_per_s:.1f} tokens/s"),
        ("KV memory in use, peak", f"{report.peak_owned_share:.1%}"),
    ]


def drawing(report: TraceReport) -> str:
    """Return the drawing: KV memory above, requests below, over time."""
    samples = report.usage
    end_s = max((sample.time_s for sample in samples), default=1.0) or 1.0
    most = max((max(s.num_running, s.num_waiting) for s in samples), default=1) or 1
    below = _TOP + _HEIGHT + _GAP
    parts = [
        _area(samples, [s.owned_share + s.cached_share for s in samples], _CACHED),
        _area(samples, [s.owned_share for s in samples], _OWNED),
        _line(samples, [s.num_running / most for s in samples], below, _OWNED),
        _line(samples, [s.num_waiting / most for s in samples], below, _WAITING),
        _frame(_TOP, "100 %", "KV memory: in use (dark), cached prefixes (light)", end_s),
        _frame(below, str(most), "requests: running (blue), waiting (red)", end_s),
    ]
    width, height = _LEFT + _WIDTH + 20, below + _HEIGHT + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


def _frame(top: int, most: str, title: str, end_s: float) -> str:
    bottom = top + _HEIGHT
    return (
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#888"/>'
        f'<text x="{_LEFT}" y="{top - 8}">{escape(title)}</text>'
        f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end">{escape(most)}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{bottom + 16}">0 s</text>'
        f'<text x="{_LEFT + _WIDTH}" y="{bottom + 16}" text-anchor="end">{end_s:.1f} s</text>'
    )


def _area(samples: tuple[UsageSample, ...], shares: list[float], color: str) -> str:
    bottom = _TOP + _HEIGHT
    points = _points(samples, shares, _TOP)
    last = f"{_x(samples, len(samples) - 1):.1f}" if samples else f"{_LEFT}"
    return f'<polygon fill="{color}" points="{_LEFT},{bottom} {points} {last},{bottom}"/>'


def _line(samples: tuple[UsageSample, ...], shares: list[float], top: int, color: str) -> str:
    return f'<polyline fill="none" stroke="{color}" points="{_points(samples, shares, top)}"/>'


def _points(samples: tuple[UsageSample, ...], shares: list[float], top: int) -> str:
    return " ".join(
        f"{_x(samples, index):.1f},{top + _HEIGHT * (1 - min(1.0, share)):.1f}" for index, share in enumerate(shares)
    )


def _x(samples: tuple[UsageSample, ...], index: int) -> float:
    return _LEFT + _WIDTH * samples[index].time_s / (samples[-1].time_s or 1.0)
