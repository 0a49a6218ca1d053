"""`report.html`: the result as one page that asks for nothing from outside, in light and in dark.

Everything that comes from a plugin or a test is escaped here, once, in `_text`.
"""

import html
from collections.abc import Mapping
from importlib import resources
from typing import Any

from zif_conformance.bundle.matrix import headline, is_simulated, subject_counts
from zif_conformance.bundle.plots import duration_plot, headroom_plot
from zif_conformance.outcomes import Verdict, reason_line

_WORDS = tuple(verdict.value for verdict in Verdict)
_HEADROOM_NOTE = "How far each result stayed from its gate: limit / error. Right is better; left of 1x a test fails."
_BAD = (Verdict.CRASHED, Verdict.FAILED, Verdict.WAIVED, Verdict.NOT_RUN)
_MAX_BAD = 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_FILTER = """
const rows = [...document.querySelectorAll("#tests tbody tr")];
const word = document.getElementById("word"), text = document.getElementById("text");
function show() {
  for (const row of rows) {
    const wordFits = !word.value || row.dataset.outcome === word.value;
    row.hidden = !(wordFits && row.dataset.id.includes(text.value.toLowerCase()));
  }
}
word.addEventListener("change", show);
text.addEventListener("input", show);
"""


def report_page(result: Mapping[str, Any]) -> str:
    """Return the page."""
    style = resources.files("zif_conformance").joinpath("data", "report.css").read_text(encoding="utf-8")
    sections = (
        _tiles(result),
        _errors(result),
        _bad(result),
        _matrix(result),
        _claims(result),
        _section("Head-room per gate", headroom_plot(result["tests"]), _HEADROOM_NOTE),
        _section("Slowest tests", duration_plot(result["tests"]), ""),
        _tests(result),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(headline(result))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(result)}\n{''.join(sections)}"
        f"<footer>zif-conformance {_text(result['suite_version'])}, started {_text(result['started'])}</footer>\n"
        f"</main>\n<script>{_FILTER}</script>\n</body>\n</html>\n"
    )


def _header(result: Mapping[str, Any]) -> str:
    platform, device, profile = result["platform"], result["device"] or {}, result["profile"]
    verdict = result["verdict"] or ("partial run" if result["status"] == "partial" else "no verdict")
    name = f" · {profile['name']} {profile['version']}" if profile else f" · {', '.join(result['levels'])}"
    score = "" if result["score"] is None else f" · {result['score']:.1%} of the must-pass tests that apply"
    simulated = "simulated: no hardware was tested" if is_simulated(device) else None
    facts = " · ".join(
        filter(None, [platform.get("distribution"), device.get("name"), device.get("architecture"), simulated])
    )
    return (
        f"<header><h1>{_text(platform['name'])}{_text(name)}</h1>"
        f'<span class="badge {verdict.replace(" ", "-")}">{_text(verdict)}</span>'
        f'<p class="facts">{_text(facts)}{_text(score)} · {_duration(result["duration_s"])}'
        f"{_text(': ' + result['partial_reason'] if result['partial_reason'] else '')}</p></header>"
    )


def _tiles(result: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile {_class(word)}"><b>{result["counts"][word]}</b><span>{word}</span></div>' for word in _WORDS
    )
    return f'<section><div class="tiles">{tiles}</div></section>\n'


def _errors(result: Mapping[str, Any]) -> str:
    if not result["errors"]:
        return ""
    items = "".join(f"<li>{_text(error)}</li>" for error in result["errors"])
    return _section("Errors of the run", f'<ul class="errors">{items}</ul>', "")


def _bad(result: Mapping[str, Any]) -> str:
    """List what did not pass with its reason, worst word first."""
    found = [test for word in _BAD for test in result["tests"] if test["outcome"] == word]
    rows = "".join(
        f'<tr><td class="word {_class(test["outcome"])}">{_text(test["outcome"])}</td>'
        f"<td><code>{_text(test['id'])}</code><div>{_text(reason_line(test['detail'])[:300])}</div></td></tr>"
        for test in found[:_MAX_BAD]
    )
    note = f"{len(found) - _MAX_BAD} more are in the list of tests below." if len(found) > _MAX_BAD else ""
    return _section("What did not pass", f'<table class="bad"><tbody>{rows}</tbody></table>' if found else "", note)


def _matrix(result: Mapping[str, Any]) -> str:
    head = "".join(f'<th class="n">{word}</th>' for word in _WORDS)
    rows = "".join(_matrix_row(name, counts) for name, counts in subject_counts(result))
    return _section(
        "Matrix", f"<table><thead><tr><th>tests</th><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>", ""
    )


def _matrix_row(name: str, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    bar = "".join(
        f'<i class="{_class(word)}" style="width:{100 * counts[word] / total:.2f}%"></i>'
        for word in _WORDS
        if counts[word]
    )
    cells = "".join(f'<td class="n{"" if counts[word] else " zero"}">{counts[word]}</td>' for word in _WORDS)
    return f'<tr><td><code>{_text(name)}</code></td><td><div class="bar">{bar}</div></td>{cells}</tr>'


def _claims(result: Mapping[str, Any]) -> str:
    kinds: dict[str, list[str]] = {}
    for claim in sorted(result["claims"], key=lambda claim: _natural(claim["claim"])):
        kind, _, value = claim["claim"].partition(":")
        title = f"{claim['outcome']}, {len(claim['tests'])} tests"
        chip = f'<span class="chip {_class(claim["outcome"])}" title="{title}">{_text(value or kind)}</span>'
        kinds.setdefault(_plural(kind, value), []).append(chip)
    body = "".join(
        f'<div class="kind">{_text(kind)}</div><div class="chips">{"".join(chips)}</div>'
        for kind, chips in kinds.items()
    )
    note = (
        "Green: a test that exercises the claim passed. Grey: only levels that were not run exercise it. Red: unproven."
    )
    return _section("Claims", body, note) if body else ""


def _tests(result: Mapping[str, Any]) -> str:
    options = "".join(f'<option value="{word}">{word}</option>' for word in _WORDS)
    filters = (
        '<div class="filters"><input id="text" type="search" placeholder="part of a test id" aria-label="test id">'
        f'<select id="word" aria-label="outcome"><option value="">all outcomes</option>{options}</select></div>'
    )
    rows = "".join(map(_test_row, result["tests"]))
    head = '<tr><th>test</th><th>gate</th><th>clauses</th><th>outcome</th><th class="n">seconds</th></tr>'
    return _section("Tests", f'{filters}<table id="tests"><thead>{head}</thead><tbody>{rows}</tbody></table>', "")


def _test_row(test: Mapping[str, Any]) -> str:
    detail = f"<details><summary>why</summary><pre>{_text(test['detail'])}</pre></details>" if test["detail"] else ""
    gate = "" if test["gate"] == "none" else test["gate"]
    return (
        f'<tr data-outcome="{_text(test["outcome"])}" data-id="{_text(test["id"].lower())}">'
        f"<td><code>{_text(test['id'])}</code>{detail}</td><td>{_text(gate)}</td>"
        f"<td>{_text(', '.join(test['clauses']))}</td>"
        f'<td class="word {_class(test["outcome"])}">{_text(test["outcome"])}</td>'
        f'<td class="n">{test["duration_s"]:.2f}</td></tr>\n'
    )


def _section(title: str, body: str, note: str) -> str:
    if not body:
        return ""
    below = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{body}{below}</section>\n"


def _plural(kind: str, value: str) -> str:
    return f"{kind.replace('_', ' ')}s" if value else "flags"


def _natural(claim: str) -> tuple[str, int, str]:
    """Order numbers by size: 8 before 16."""
    kind, _, value = claim.partition(":")
    return kind, int(value) if value.isdigit() else 0, value


def _class(word: str) -> str:
    return word.replace(" ", "-")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
