"""Writes tuning tables anew, from measurements on a device:

    python -m zif.kernels.regenerate --device NAME --into FOLDER

Each study is a kernel with shapes that models use and candidates for its configuration. For each shape every candidate
runs over the same arrays, the fastest becomes a rule, and shapes that no study covers keep the rules of the default
tables. A candidate that the part has no room for is passed over. Nothing here runs in front of a request.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zif.contract import AttentionBatch, AttentionParams
from zif.errors import ConfigError
from zif.kernels import norms
from zif.kernels.attention import PagedAttention
from zif.kernels.launch import DeviceLauncher, Launcher
from zif.kernels.paged_calls import AttentionCall, PagedCache, paged_attention
from zif.kernels.tuning import LaunchConfig, Tuning

Work = Callable[[Launcher], object]
Timer = Callable[[Callable[[], object]], float]

_ROUNDS = 9
_PROGRAMS = 4
"""Programs for each multiprocessor that splitting the keys aims at."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Work of one shape, and the quantities for which its fastest configuration then serves."""

    when: Mapping[str, tuple[int, int]]
    work: Work


@dataclass(frozen=True, slots=True)
class Study:
    """One kernel of one family: `family` names the table's file."""

    family: str
    kernel: str
    shapes: Sequence[Shape]
    candidates: Sequence[LaunchConfig]


class _OneForced(Tuning):
    """The default tables, but for one kernel."""

    def __init__(self, kernel: str, config: LaunchConfig) -> None:
        self._forced, self._with, self._others = kernel, config, Tuning.read()

    def config(self, kernel: str, **quantities: int) -> LaunchConfig:
        return self._with if kernel == self._forced else self._others.config(kernel, **quantities)


def regenerate(
    studies: Sequence[Study], into: Path, make_launcher: Callable[[Tuning], Launcher], seconds: Timer
) -> list[Path]:
    """Measure, and write one table for each family. Returns the files.

    Raises `ConfigError` when no candidate of a kernel runs at all.
    """
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for study in studies:
        rules = [_rule(shape, _fastest(study, shape, make_launcher, seconds)) for shape in study.shapes]
        tables.setdefault(study.family, {})[study.kernel] = rules
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for family, table in tables.items():
        written.append(into / f"{family}.json")
        written[-1].write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return written


def _fastest(study: Study, shape: Shape, make_launcher: Callable[[Tuning], Launcher], seconds: Timer) -> LaunchConfig:
    taken: dict[LaunchConfig, float] = {}
    for config in study.candidates:
        launch = make_launcher(_OneForced(study.kernel, config))
        try:
            taken[config] = seconds(lambda launch=launch: shape.work(launch))  # type: ignore[misc]
        except RuntimeError as error:  # Triton's OutOfResources is one, too
            print(f"{study.kernel} {dict(config.tiles)}: passed over, {str(error).splitlines()[0][:100]}")
    if not taken:
        raise ConfigError(f"no candidate of {study.kernel!r} runs for {dict(shape.when)}; add smaller ones")
    best = min(taken, key=taken.__getitem__)
    print(f"{study.kernel} {dict(shape.when)}: {dict(best.tiles)}, {best.num_warps} warps, {taken[best] * 1e6:.1f} us")
    return best


def _rule(shape: Shape, config: LaunchConfig) -> dict[str, Any]:
    sizes = {"tiles": dict(config.tiles), "num_warps": config.num_warps, "num_stages": config.num_stages}
    options = {"options": dict(config.options)} if config.options else {}
    return {"when": {name: list(bounds) for name, bounds in shape.when.items()}, **sizes, **options}


def studies(device: str, num_programs: int) -> list[Study]:
    """Return what is measured: attention that decodes, verifies and prefills, and norms."""
    tiles = [(16, 32), (16, 64), (16, 128), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64)]
    attention = [
        LaunchConfig((("BLOCK_M", m), ("BLOCK_N", n), ("PROGRAMS", num_programs)), warps, stages)
        for m, n in tiles
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]
    rows = [LaunchConfig((("ROWS", size),), warps, 1) for size in (1, 2, 4, 8) for warps in (1, 2, 4, 8)]
    return [
        Study("attention", "paged_attention", list(_attention_shapes(device)), attention),
        Study("norms", "rms_norm", list(_norm_shapes(device)), rows),
    ]


def _attention_shapes(device: str) -> Iterator[Shape]:
    for first, head_dim in ((1, 64), (65, 128), (129, 256)):
        for rows, lengths in (((1, 16), (1,) * 64), ((17, 64), (4,) * 16), ((65, 1 << 30), (2048,) * 4)):
            when = {"rows": rows, "head_dim": (first, head_dim), "query_bytes": (2, 2)}
            yield Shape(when, _attention(device, head_dim, np.array(lengths)))


def _attention(device: str, head_dim: int, lengths: "np.ndarray[Any, np.dtype[np.int64]]") -> Work:
    num_blocks, part = 128, 8 * 16 * head_dim
    known = np.full(len(lengths), num_blocks * 16, np.int32)
    pages = torch.randn(2, len(lengths) * num_blocks * part, device=device).to(torch.bfloat16)
    cache = PagedCache(pages[0], pages[1], part, 8, 16, head_dim)
    order = np.random.default_rng(0).permutation(len(lengths) * num_blocks).astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    slots = np.zeros(int(starts[-1]), np.int64)
    batch = AttentionBatch(starts, known, order.reshape(len(lengths), num_blocks), slots, 16, None)
    query = torch.randn(int(starts[-1]), 32, head_dim, device=device).to(torch.bfloat16)
    call = AttentionCall(AttentionParams(head_dim**-0.5))
    return lambda launch: paged_attention(launch, query, cache, PagedAttention(launch, device).prepare(batch), call)


def _norm_shapes(device: str) -> Iterator[Shape]:
    for first, columns in ((1, 128), (129, 1024), (1025, 4096), (4097, 16384)):
        x = torch.randn((64 << 20) // columns, columns, device=device).to(torch.bfloat16)
        yield Shape({"columns": (first, columns)}, _norm(x))


def _norm(x: torch.Tensor) -> Work:
    weight = x[0].clone()
    return lambda launch: norms.rms_norm(launch, x, weight, 1e-5, 0.0)


def _timer(device: str) -> Timer:
    module = torch.get_device_module(device)

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        work()
        for _ in range(_ROUNDS):
            begin, end = (module.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(float(begin.elapsed_time(end)) / 1e3)
        return statistics.median(taken)

    return seconds


def main() -> None:
    """Measure on a device and write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="torch's name of the device")
    parser.add_argument("--into", required=True, type=Path, help="folder of the architecture's tables")
    arguments = parser.parse_args()
    properties = torch.get_device_module(arguments.device).get_device_properties(arguments.device)
    found = studies(arguments.device, _PROGRAMS * properties.multi_processor_count)
    for path in regenerate(found, arguments.into, DeviceLauncher, _timer(arguments.device)):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
