"""Time the CPU plugin's native kernels against torch's, each beside its floor, and print the ratios.

Physics: with few tokens a product reads its weights once, and decoding reads the visible keys and values once, so the
floor is bytes over read bandwidth, which is measured in the same run: the sum of an array that no cache holds. Weights
come in turn from a set that no cache holds either. With many tokens the arithmetic is the limit, and the floor is far.

    python benchmarks/cpu_kernels.py [--isa amx] [--threads 2] [--rounds 3] [--json FILE] [--smoke]

Native and torch take turns, case by case; times are medians. `--smoke` uses small arrays, to see that all of it runs.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_attention import Case, paged
from torch.nn import functional

from zif.contract import Activation, QuantizedWeight, WeightScheme
from zif.host.attention import TiledAttention
from zif.reference.ops import ReferenceOps
from zif.reference.quantization import quantize
from zif_cpu.attention import NativeAttention
from zif_cpu.library import Library, choose_kernels
from zif_cpu.operators import NativeOps

DTYPES = (torch.bfloat16, torch.float32)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SET_BYTES = 400_000_000
"""Of all weights that take turns, and of the array that is read for the bandwidth."""

SCHEMES = (WeightScheme(8, dynamic_activations=True), WeightScheme(8), WeightScheme(4, 128))

Run = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One case. ours_us, torch_us: medians. floor_us: bytes over bandwidth. ratio: torch over ours."""

    name: str
    dtype: str
    floor_us: float
    ours_us: float
    torch_us: float

    @property
    def ratio(self) -> float:
        return self.torch_us / self.ours_us


def bandwidth(set_bytes: int) -> float:
    """Return the bytes per second at which all threads read an array, the best of some runs."""
    array = torch.ones(set_bytes // 4)
    return max(array.nbytes / seconds(lambda _: array.sum(), 1) for _ in range(5))


def seconds(run: Run, count: int) -> float:
    """Return the median time of `count` calls, each given its number."""
    times = []
    for index in range(count):
        start = time.perf_counter()
        run(index)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def take_turns(ours: Run, theirs: Run, count: int, rounds: int) -> tuple[float, float]:
    """Return the median microseconds of both, which take turns by `count` calls."""
    ours(0), theirs(0)
    times = [(seconds(ours, count), seconds(theirs, count)) for _ in range(rounds)]
    mine, other = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
    return mine, other


def products(native: NativeOps, options: argparse.Namespace, rate: float) -> Iterator[Row]:
    """Yield products of the shapes of a model of 0.6 billion weights."""
    for outputs, inputs in ((3072, 1024), (1024, 3072)):
        for dtype in DTYPES:
            count = max(2, options.set_bytes // (outputs * inputs * dtype.itemsize))
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs).to(dtype)

                def call(ops: Any, x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> Run:
                    return lambda index: ops.linear(x, weights[index % len(weights)], None)

                ours, theirs = take_turns(call(native), call(ReferenceOps()), count, options.rounds)
                name = f"linear {tokens} x {inputs} -> {outputs}"
                yield Row(name, _name(dtype), weights[0].nbytes / rate * 1e6, ours, theirs)


def quantized_products(native: NativeOps, options: argparse.Namespace, rate: float) -> Iterator[Row]:
    """Yield the same products with weights in 8 and 4 bits; torch's are with weights of bfloat16."""
    for outputs, inputs in ((3072, 1024), (1024, 3072)):
        num_weights = max(2, options.set_bytes // (outputs * inputs * 2))
        plain = [torch.randn(outputs, inputs).bfloat16() for _ in range(num_weights)]
        for scheme in SCHEMES:
            weights = [quantize(plain[0], scheme)]
            num_bytes = weights[0].codes.nbytes + weights[0].scales.nbytes
            weights += [copy_of(weights[0]) for _ in range(max(2, options.set_bytes // num_bytes) - 1)]
            for tokens in (*TOKENS, 512):
                x = torch.randn(tokens, inputs).bfloat16()

                def ours(index: int, x: torch.Tensor = x, weights: list[QuantizedWeight] = weights) -> object:
                    return native.quantized_linear(x, weights[index % len(weights)], None)

                def theirs(index: int, x: torch.Tensor = x, plain: list[torch.Tensor] = plain) -> object:
                    return functional.linear(x, plain[index % len(plain)])

                times = take_turns(ours, theirs, num_weights, options.rounds)
                name = f"{scheme.name.split()[0]} {tokens} x {inputs} -> {outputs}"
                yield Row(name, "bfloat16", num_bytes / rate * 1e6, *times)


def copy_of(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight in memory of its own."""
    return QuantizedWeight(weight.scheme, weight.codes.clone(), weight.scales.clone())


def decoding(library: Library, options: argparse.Namespace, rate: float) -> Iterator[Row]:
    """Yield attention of single tokens."""
    for requests, context in ((1, 8192), (8, 2048), (32, 512)):
        context //= options.shrink
        for dtype in DTYPES:
            case = Case(f"decode {requests} x {context}", requests, 1, context)
            runs = [paged(case, dtype, backend) for backend in (NativeAttention(library), TiledAttention())]
            ours, theirs = take_turns(*(lambda _, run=run: run() for run in runs), 3, options.rounds)
            num_bytes = requests * context * 2 * 8 * 128 * dtype.itemsize
            yield Row(case.name, _name(dtype), num_bytes / rate * 1e6, ours, theirs)


def rowwise(native: NativeOps, options: argparse.Namespace) -> Iterator[Row]:
    """Yield what a step does to each token between the products; a floor would be less than a call costs."""
    for dtype in DTYPES:
        for tokens in (1, 32):
            x, weight = torch.randn(tokens, 1024).to(dtype), torch.randn(1024).to(dtype)
            heads, angles = torch.randn(tokens, 16, 128).to(dtype), torch.randn(tokens, 64)
            gate_up = torch.randn(tokens, 6144).to(dtype)
            calls: tuple[tuple[str, Callable[[Any], object]], ...] = (
                ("add and norm", lambda ops, x=x, weight=weight: ops.add_rms_norm(x, x, weight, 1e-6, 0.0)),
                ("rotate", lambda ops, heads=heads, a=angles: ops.rotate(heads, heads, a, a, False)),
                ("silu and gate", lambda ops, gate_up=gate_up: ops.gated_activation(gate_up, Activation.SILU)),
            )
            for name, call in calls:
                runs = (lambda _, ops=ops, call=call: call(ops) for ops in (native, ReferenceOps()))
                yield Row(f"{name}, {tokens}", _name(dtype), 0.0, *take_turns(*runs, 200, options.rounds))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="an instruction set of the native kernels; without it the best")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    options.set_bytes, options.shrink = (SET_BYTES // 40, 32) if options.smoke else (SET_BYTES, 1)
    kernels = choose_kernels(options.isa)
    if kernels.library is None:
        print(f"no native kernels: {kernels.reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    kernels.library.use(kernels.isa, options.threads)
    native = NativeOps(kernels.library, kernels.isa)
    rate = bandwidth(options.set_bytes)
    print(f"kernels {kernels.isa}, torch {torch.__version__}, {options.threads} threads, {rate / 1e9:.1f} GB/s read")
    print(f"{'case':<28} {'dtype':<9} {'floor us':>9} {'ours us':>9} {'torch us':>9} {'ratio':>6} {'of floor':>8}")
    rows = []
    cases = (
        products(native, options, rate),
        quantized_products(native, options, rate),
        decoding(kernels.library, options, rate),
        rowwise(native, options),
    )
    for row in itertools.chain(*cases):
        share = f"{row.floor_us / row.ours_us:8.2f}" if row.floor_us else ""
        times = f"{row.floor_us:9.0f} {row.ours_us:9.1f} {row.torch_us:9.1f}"
        print(f"{row.name:<28} {row.dtype:<9} {times} {row.ratio:6.2f} {share}")
        rows.append({**asdict(row), "ratio": row.ratio})
    if options.json:
        told = {"kernels": kernels.isa, "torch": torch.__version__, "threads": options.threads, "bytes_per_s": rate}
        options.json.write_text(json.dumps({**told, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
