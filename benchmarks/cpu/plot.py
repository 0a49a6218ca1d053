"""A plain picture of the three main workloads: one group of bars for each, in SVG, without any library."""

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from cpu.engines import ENGINES, Engine
from cpu.targets import Summary
from cpu.workloads import workloads

WIDTH, LABEL, BAR, GAP, HEAD = 760, 250, 15, 4, 34
COLORS = {"bf16": ("#1f6feb", "#a9b4c2"), "int8": ("#bf4b8a", "#d8b9c9")}
"""Of zif and of the others, by the weights."""


def svg(data: Mapping[str, Any], names: tuple[str, ...] = ("one", "eight", "many")) -> str:
    """Return the picture of the medians."""
    summary = Summary(data)
    titles = workloads(data["quick"])
    parts, top = [], 6
    capped = f", capped at {data['isa']}" if data.get("isa") else ""
    for name in names:
        rated = [(engine, summary.figure(engine.name, name)) for engine in ENGINES]
        bars = sorted(((e, rate) for e, rate in rated if rate), key=lambda pair: -pair[1])
        if not bars:
            continue
        parts.append(_text(6, top + 18, f"{titles[name].title}, output tokens per second{capped}", "600"))
        top += HEAD - 6
        for engine, rate in bars:
            parts += _bar(engine, rate, bars[0][1], top)
            top += BAR + GAP
        top += 12
    return _document(parts, top)


def _bar(engine: Engine, rate: float, largest: float, top: int) -> list[str]:
    length = max(1.0, (WIDTH - LABEL - 70) * rate / largest)
    ours, theirs = COLORS[engine.scheme]
    color = ours if engine.environment == "zif" else theirs
    return [
        _text(LABEL - 8, top + 12, engine.title, "400", "end"),
        f'<rect x="{LABEL}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
        _text(round(LABEL + length + 6), top + 12, f"{rate:,.1f}", "400"),
    ]


def _text(x: int, y: int, text: str, weight: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">{escape(text)}</text>'


def _document(parts: list[str], height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#1b1f24">'
    )
    background = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"
