"""The two plots of the report page, as SVG text: head-room by gate, and the slowest tests."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _LEFT, _RIGHT, _ROW = 1000, 170, 110, 38
_SPREAD = 23
"""Dots of a row stand on this many lines, so that crowds show as crowds."""

_GATE_NAMES = {
    "G0": "structure",
    "G1": "exact",
    "G2": "rounding steps",
    "G3": "ratio",
    "G4": "quantized",
    "G5": "scaling",
    "G6": "specials",
    "G7": "model",
}
_MIN_DECADE, _MAX_DECADE = -1.0, 4.0
_NUM_SLOWEST = 15

Tests = Sequence[Mapping[str, Any]]


def headroom_plot(tests: Tests) -> str:
    """Draw one dot for each measurement, by gate, over limit / error; nothing when nothing was measured."""
    by_gate: dict[str, list[tuple[float, str]]] = {}
    for test in tests:
        for measured in test["measurements"]:
            label = f"{test['id']} {measured['what']}".strip()
            by_gate.setdefault(measured["gate"], []).append((_headroom(measured), label))
    if not by_gate:
        return ""
    height = _ROW * len(by_gate) + 46
    parts = [_scale(height - 30)]
    for row, (gate, dots) in enumerate(sorted(by_gate.items())):
        y = 18 + _ROW * row
        parts.append(f'<text class="label" x="8" y="{y + 4}">{_text(_gate_label(gate))} ({len(dots)})</text>')
        parts += [_dot(headroom, label, y, index) for index, (headroom, label) in enumerate(dots)]
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="head-room per gate">{"".join(parts)}</svg>'


def duration_plot(tests: Tests) -> str:
    """Draw the slowest tests as bars."""
    slowest = sorted(tests, key=lambda test: -test["duration_s"])[:_NUM_SLOWEST]
    longest = max((test["duration_s"] for test in slowest), default=0.0)
    if longest <= 0:
        return ""
    bars = "".join(_bar(test, row, longest) for row, test in enumerate(slowest))
    return f'<svg viewBox="0 0 {_WIDTH} {24 * len(slowest) + 4}" role="img" aria-label="slowest tests">{bars}</svg>'


def _gate_label(gate: str) -> str:
    return f"{gate} {_GATE_NAMES.get(gate, '')}".strip()


def _headroom(measured: Mapping[str, Any]) -> float:
    error, limit = measured["error"], measured["limit"]
    if error == 0:
        return math.inf
    ratio = limit / error
    return ratio if math.isfinite(ratio) else 0.0


def _x(headroom: float) -> float:
    """Place a ratio on the logarithmic axis; exact results stand in a column of their own at the right."""
    if math.isinf(headroom):
        return _WIDTH - 40
    decade = math.log10(headroom) if headroom > 0 else _MIN_DECADE
    share = (min(max(decade, _MIN_DECADE), _MAX_DECADE) - _MIN_DECADE) / (_MAX_DECADE - _MIN_DECADE)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _dot(headroom: float, label: str, y: float, index: int) -> str:
    shifted = y + (index * 7) % _SPREAD - _SPREAD // 2
    kind = "dot over" if headroom < 1 else "dot"
    spoken = "exact" if math.isinf(headroom) else f"{headroom:.3g}x"
    title = f"<title>{_text(label)}: {spoken}</title>"
    return f'<circle class="{kind}" cx="{_x(headroom):.1f}" cy="{shifted}" r="3.5">{title}</circle>'


def _scale(bottom: float) -> str:
    marks = []
    for decade in range(int(_MIN_DECADE), int(_MAX_DECADE) + 1):
        x, kind = _x(10.0**decade), "limit" if decade == 0 else "grid"
        marks.append(f'<line class="{kind}" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{bottom}"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_decade_label(decade)}</text>')
    marks.append(f'<text x="{_WIDTH - 40}" y="{bottom + 18}" text-anchor="middle">exact</text>')
    return "".join(marks)


def _decade_label(decade: int) -> str:
    return f"≥ {10.0**decade:g}x" if decade == _MAX_DECADE else f"{10.0**decade:g}x"


def _bar(test: Mapping[str, Any], row: int, longest: float) -> str:
    y, width = 24 * row, max(1.0, 380 * test["duration_s"] / longest)
    name = test["id"] if len(test["id"]) <= 72 else f"{test['id'][:71]}…"
    return (
        f'<text class="label" x="0" y="{y + 15}">{_text(name)}</text>'
        f'<rect class="time" x="520" y="{y + 4}" width="{width:.1f}" height="15" rx="3"/>'
        f'<text x="{528 + width:.1f}" y="{y + 16}">{test["duration_s"]:.2f} s</text>'
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)
