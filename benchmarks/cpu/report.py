"""Tables in Markdown from a file of results, the README's section, and whether what is written is what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu import machine
from cpu.cap import WORDS
from cpu.engines import ENGINES, Engine
from cpu.figures import ratio
from cpu.markdown import UNKNOWN, flat, number, table
from cpu.shapes import model_shape
from cpu.targets import Summary, Target, floor_tokens_per_s, targets
from cpu.workloads import Workload, workloads

BEGIN = "<!-- performance of the CPU platform: written by `python benchmarks/cpu.py`, not by hand -->"
END = "<!-- end of the performance of the CPU platform -->"
SHOWN = ("one", "eight", "many")
SCHEMES = {"bf16": "16-bit weights", "int8": "8-bit weights"}


def report(data: Mapping[str, Any]) -> str:
    """Return the whole report."""
    summary, listed = Summary(data), _listed(data)
    parts = ["# CPU engines on the same traffic", _cap(data), _preamble(data)]
    for scheme, title in SCHEMES.items():
        engines = [engine for engine in listed if engine.scheme == scheme]
        parts += [f"## {title}", "Output tokens per second.", _rates(summary, engines, scheme)]
        parts += [f"How many times as fast as each is zif with {title}:", _ratios(summary, engines, f"zif-{scheme}")]
    parts += ["## Latency under arriving requests", _latencies(summary, listed)]
    parts += ["## Start and memory", _starts(summary, listed)]
    parts += ["## Targets", _targets(summary)]
    if data["notes"]:
        notes = (f"- **{subject}**: {flat(text)}" for subject, text in sorted(data["notes"].items()))
        parts += ["## What did not run", "\n".join(notes)]
    parts += ["## Versions and configurations", _versions(data, listed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def readme_section(data: Mapping[str, Any], plot: str, full: str) -> str:
    """Return what the README shows: the three main workloads, cold start, and where the rest is."""
    summary = Summary(data)
    head = ["", *(_title(data, name) for name in SHOWN), "first token of a cold process"]
    rows = []
    for engine in _listed(data):
        rates = [_cell(summary, engine, name) for name in SHOWN]
        if any(cell != UNKNOWN for cell in rates):
            rows.append([engine.title, *rates, number(summary.start(engine.name, "first_token_s"), " s")])
    reached = sum(_is_met(summary, target) is True for target in targets(model_shape("dense")))
    judged = sum(_is_met(summary, target) is not None for target in targets(model_shape("dense")))
    words = _cap(data) + (
        f"Output tokens per second on {machine.title(data['machine'])}, {_rounds(data)}; a model of the shape of "
        "Qwen3-0.6B with random weights, the same prompts for every engine, greedy. "
        f"{reached} of {judged} targets are reached. "
        f"[{full}]({full}) has all workloads, latencies, floors, targets, versions and what did not run."
    )
    return "\n\n".join([words, table(head, rows), f"![Output tokens per second]({plot})"])


def write_section(readme: Path, section: str) -> None:
    """Put the section between the markers. Raises `ValueError` when they are not there."""
    readme.write_text(_with_section(readme, section))


def is_current(readme: Path, section: str) -> bool:
    """Say whether the file has exactly this section. Raises `ValueError` when it has no markers."""
    return readme.read_text() == _with_section(readme, section)


def _with_section(readme: Path, section: str) -> str:
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the markers; add these two lines where the section belongs:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def _preamble(data: Mapping[str, Any]) -> str:
    floors = Summary(data)
    rates = [
        f"{(floors.floor('read_bytes_per_s') or 0) / 1e9:.1f} GB/s read",
        *(f"{(floors.floor(f'{kind}_per_s') or 0) / 1e9:,.0f} G{unit}/s {kind}"
          for kind, unit in (("fp32", "FLOP"), ("bf16", "FLOP"), ("int8", "OP"))),
    ]  # fmt: skip
    sets = " ".join(data["machine"]["instruction_sets"])
    quick = "**Shortened traffic: these figures only show that it runs.** " if data["quick"] else ""
    memory = f"{data['machine']['memory_bytes'] / 2**30:.0f} GiB"
    return (
        f"{_warning(data)}{quick}{data['date']}; {machine.title(data['machine'])}, {memory}; {sets}. "
        f"Medians over {_rounds(data)}; each engine runs in a process of its own, the order turns from round to round. "
        f"Floors, the best of the same rounds, products with torch: {', '.join(rates)}.\n\n"
        + "\n".join(f"    {command}" for command in data["commands"])
    )


def _cap(data: Mapping[str, Any]) -> str:
    """Say under which cap the engines and the floors were measured, if there was one."""
    if not data.get("isa"):
        return ""
    return (
        f"**Capped at `{data['isa']}`: every engine computed as on a processor with {WORDS[data['isa']]}. The floors "
        "are measured so too.** "
    )


def _warning(data: Mapping[str, Any]) -> str:
    """Say that zif ran without its kernels, if it did."""
    for name, about in data["versions"].items():
        kernels = str(about["configuration"].get("kernels", ""))
        if kernels.startswith("torch"):
            return f"**{name} ran without its kernels ({flat(kernels)[:300]}).** "
    return ""


def _rates(summary: Summary, engines: Sequence[Engine], scheme: str) -> str:
    known = {name: w for name, w in workloads(summary.data["quick"]).items() if _is_known(summary, engines, name)}
    head = ["", *(f"{name}: {_title(summary.data, name)}" for name in known)]
    floors = [_floor_cell(summary, w, scheme) for w in known.values()]
    rows = [[engine.title, *(_cell(summary, engine, name) for name in known)] for engine in engines]
    shares = [
        number(ratio(summary.figure(f"zif-{scheme}", name), _floor(summary, w, scheme)), "", 2)
        for name, w in known.items()
    ]
    return table(head, [*rows, ["floor", *floors], ["zif over floor", *shares]])


def _ratios(summary: Summary, engines: Sequence[Engine], ours: str) -> str:
    peers = [engine for engine in engines if not engine.name.startswith("zif")]
    names = [name for name in workloads() if summary.figure(ours, name)]
    if not names or not peers:
        return ""
    rows = [
        [peer.title, *(number(summary.times_faster(ours, peer.name, name), "", 2) for name in names)] for peer in peers
    ]
    return table(["", *names], rows)


def _latencies(summary: Summary, engines: Sequence[Engine]) -> str:
    keys = ("first_token_p50_s", "first_token_p99_s", "gap_p50_s", "gap_p99_s", "tokens_per_s", "cores_used")
    head = ["mixed", "first token p50", "p99", "between tokens p50", "p99", "tokens/s", "cores used"]
    rows = []
    for engine in engines:
        values = [summary.figure(engine.name, "mixed", key) for key in keys]
        if any(value is not None for value in values):
            cells = [number(value, " s", 2) for value in values[:2]]
            cells += [number(value and value * 1e3, " ms", 0) for value in values[2:4]]
            rows.append([engine.title, *cells, number(values[4]), number(values[5])])
    return table(head, rows) if rows else "Not measured."


def _starts(summary: Summary, engines: Sequence[Engine]) -> str:
    rows = []
    for engine in engines:
        cells = [number(summary.start(engine.name, key), " s", 1) for key in ("load_s", "ready_s", "first_token_s")]
        peak, idle = summary.start(engine.name, "peak_bytes"), summary.start(engine.name, "idle_cores")
        cells += [number(peak and peak / 2**30, " GiB"), number(None if idle is None else idle * 100, " %", 2)]
        if any(cell != UNKNOWN for cell in cells):
            rows.append([engine.title, *cells])
    head = ["", "loading", "process ready", "first token of 128 in", "peak memory, mapped files included"]
    return table([*head, "idle, of a core"], rows)


def _targets(summary: Summary) -> str:
    rows = []
    for target in targets(model_shape("dense")):
        value, met = target.measured(summary), _is_met(summary, target)
        sign = "at most" if target.at_most else "at least"
        verdict = {True: "reached", False: "**missed**", None: "not measured"}[met]
        rows.append([target.text, f"{sign} {target.bound:g}{target.unit}", number(value, target.unit, 2), verdict])
    return table(["target", "bound", "measured", ""], rows)


def _versions(data: Mapping[str, Any], engines: Sequence[Engine]) -> str:
    rows = []
    for engine in engines:
        about = data["versions"].get(engine.name)
        if about:
            versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
            rows.append([engine.title, versions, flat(str(about["configuration"]))[:700]])
    sources = sorted({run["sources"] for run in data["runs"] if run["engine"].startswith("zif") and "sources" in run})
    words = f"zif is of commit {data['commit']}, its sources have the digest {', '.join(sources) or 'unknown'}."
    return table(["", "versions", "configuration"], rows) + f"\n\n{words}"


def _is_met(summary: Summary, target: Target) -> bool | None:
    value = target.measured(summary)
    return None if value is None else target.is_met(value)


def _is_known(summary: Summary, engines: Sequence[Engine], workload: str) -> bool:
    return any(summary.figure(engine.name, workload) is not None for engine in engines)


def _floor(summary: Summary, workload: Workload, scheme: str) -> float | None:
    # Requests that arrive over time wait for no floor, and shared beginnings are computed once.
    if workload.name in ("mixed", "prefix"):
        return None
    return floor_tokens_per_s(summary, model_shape(workload.model), workload, scheme)


def _floor_cell(summary: Summary, workload: Workload, scheme: str) -> str:
    return number(_floor(summary, workload, scheme))


def _cell(summary: Summary, engine: Engine, workload: str) -> str:
    text = number(summary.figure(engine.name, workload))
    rounds = summary.num_rounds(engine.name, workload)
    most = max((summary.num_rounds(other.name, workload) for other in ENGINES), default=0)
    return f"{text} (1 round)" if rounds == 1 < most else text


def _listed(data: Mapping[str, Any]) -> list[Engine]:
    """Return the engines that the results speak of."""
    named = {run["engine"] for run in data["runs"]} | {subject.partition(",")[0] for subject in data["notes"]}
    return [engine for engine in ENGINES if engine.name in named]


def _title(data: Mapping[str, Any], name: str) -> str:
    return workloads(data["quick"])[name].title


def _rounds(data: Mapping[str, Any]) -> str:
    count = 1 + max((run["round"] for run in data["runs"] if run["workloads"]), default=0)
    return "1 round" if count == 1 else f"{count} interleaved rounds"
