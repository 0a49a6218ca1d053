"""The report of `http_peers.py` in Markdown: medians of rounds, and the bounds that zif's server is held to."""

from collections.abc import Mapping
from typing import Any

from cpu import machine
from cpu.figures import median_of, ratio
from cpu.markdown import UNKNOWN, flat, number, table

LEAST_REQUESTS_PER_S = 1_000
MOST_STALL_MS = 50
HELD = "zif-null"
"""The server that the bounds are about."""


def report(data: Mapping[str, Any]) -> str:
    """Return the whole report."""
    parts = ["# Servers on the same short streams", _preamble(data)]
    for num_connections in _connections(data):
        parts += [f"## {num_connections} connection{'s' * (num_connections != 1)}", _loads(data, num_connections)]
    parts += ["## Start and memory", _starts(data)]
    parts += ["## Bounds", _bounds(data)]
    if data["notes"]:
        notes = (f"- **{_title(data, name)}**: {flat(text)}" for name, text in data["notes"].items())
        parts += ["## What did not run", "\n".join(notes)]
    parts += ["## Versions and commands", _versions(data)]
    return "\n\n".join(parts) + "\n"


def _preamble(data: Mapping[str, Any]) -> str:
    num_rounds = 1 + max((run["round"] for run in data["runs"]), default=0)
    rounds = "1 round" if num_rounds == 1 else f"medians of {num_rounds} interleaved rounds, of the stall the longest"
    memory = f"{data['machine']['memory_bytes'] / 2**30:.0f} GiB"
    is_busy = data["load_before"] > data["machine"]["cores"] / 2
    warning = "**The machine was busy: only processor times and memory mean something.** " if is_busy else ""
    return (
        f"{warning}{data['date']}; {machine.title(data['machine'])}, {memory}, "
        f"load average before {data['load_before']:g}. Streams of {data['max_tokens']} tokens after "
        f"{data['prompt_tokens']} over kept connections on a Unix socket, greedy, float32, a model of one layer "
        f"with random weights; {data['seconds']:g} s each, {rounds}. The client "
        "runs on the same cores. First event: the first token's, not the answer's headers, which vLLM sends before "
        "it has one. Stall: how long `/health` took meanwhile, asked every 20 ms. Processor time is of all processes "
        f"of a server. {_answers(data)}\n\n    {data['command']}"
    )


def _answers(data: Mapping[str, Any]) -> str:
    """Say whether both that compute gave the same answer, which shows that they did the same work."""
    texts = {run["server"]: run["text"] for run in data["runs"] if run["server"] != HELD}
    if len(texts) < 2:
        return ""
    return f"zif and vLLM gave {'the same answer' if len(set(texts.values())) == 1 else 'different answers'}."


def _loads(data: Mapping[str, Any], num_connections: int) -> str:
    rows = []
    for name, about in data["servers"].items():
        loads = _loads_of(data, name, num_connections)
        if loads:
            shown = {key: median_of(loads, key) for key in loads[0]}
            rate, cpu = shown["requests_per_s"], shown["cpu_ms_per_request"]
            rows.append([about["title"], number(rate, "", 0), number(cpu, " ms", 2), *_latencies(shown, loads)])
    head = ["", "requests/s", "CPU per request", "first event p50", "p99", "end p50", "p99", "stall p50", "longest"]
    return table(head, rows) + _compared(data, num_connections)


def _latencies(shown: Mapping[str, float | None], loads: list[dict[str, Any]]) -> list[str]:
    keys = ("first_event_ms_p50", "first_event_ms_p99", "end_ms_p50", "end_ms_p99", "probe_ms_p50")
    cells = [number(shown[key], " ms") for key in keys]
    return [*cells, number(max(entry["longest_probe_ms"] for entry in loads), " ms")]


def _compared(data: Mapping[str, Any], num_connections: int) -> str:
    """Say how many times as many requests zif answers, and what each costs, where both were measured."""
    ours, theirs = (_loads_of(data, name, num_connections) for name in ("zif-cpu", "vllm"))
    faster = ratio(median_of(ours, "requests_per_s"), median_of(theirs, "requests_per_s"))
    cheaper = ratio(median_of(theirs, "cpu_ms_per_request"), median_of(ours, "cpu_ms_per_request"))
    if faster is None or cheaper is None:
        return ""
    return f"\n\nzif answers {faster:.1f} times as many as vLLM, each for 1/{cheaper:.1f} of the processor time."


def _starts(data: Mapping[str, Any]) -> str:
    rows = []
    for name, about in data["servers"].items():
        runs = [run for run in data["runs"] if run["server"] == name]
        if runs:
            cells = [number(median_of(runs, key), " s") for key in ("ready_s", "first_token_s")]
            held = [median_of(runs, key) for key in ("start_bytes", "loaded_bytes")]
            cells += [number(None if value is None else value / 2**20, " MiB", 0) for value in held]
            rows.append([about["title"], *cells, str(runs[-1]["num_processes"])])
    head = ["", "ready", "first token", "memory then", "memory after the load", "processes"]
    return table(head, rows) + "\n\nMemory that is resident, with pages that processes share counted once."


def _bounds(data: Mapping[str, Any]) -> str:
    most = max(_connections(data), default=0)
    loads = _loads_of(data, HELD, most)
    rate = median_of(loads, "requests_per_s")
    stall = max((entry["longest_probe_ms"] for entry in loads), default=None)
    rows = [
        _bound("streams a second", f"at least {LEAST_REQUESTS_PER_S:,}", rate, rate and rate >= LEAST_REQUESTS_PER_S),
        _bound("stall", f"under {MOST_STALL_MS} ms", stall, stall and stall < MOST_STALL_MS),
    ]
    return table([f"{_title(data, HELD)}, {most} connections", "bound", "measured", ""], rows)


def _bound(text: str, bound: str, value: float | None, is_met: bool | float | None) -> list[str]:
    verdict = "not measured" if value is None else "reached" if is_met else "**missed**"
    return [text, bound, number(value), verdict]


def _versions(data: Mapping[str, Any]) -> str:
    rows = []
    for about in data["servers"].values():
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        rows.append([about["title"], versions or UNKNOWN, f"`{about['command']}`"])
    return table(["", "versions", "command"], rows) + f"\n\nzif is of commit {data['commit']}."


def _connections(data: Mapping[str, Any]) -> list[int]:
    return sorted({int(num) for run in data["runs"] for num in run["loads"]})


def _loads_of(data: Mapping[str, Any], name: str, num_connections: int) -> list[dict[str, Any]]:
    return [run["loads"][str(num_connections)] for run in data["runs"] if run["server"] == name]


def _title(data: Mapping[str, Any], name: str) -> str:
    return str(data["servers"][name]["title"])
