"""What zif has to reach, as ratios within one set of results; and the floors that the machine sets.

A floor is the time in which the weights of a step can be read and its products computed at the best rates that any of
the rounds measured, whichever is longer; an engine's share of it is floor time over its own. Weights count as 16 or 8
bits: an engine that holds the same numbers in fewer may be faster than the floor.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cpu.figures import median_of, ratio
from cpu.shapes import ModelShape
from cpu.workloads import Workload

BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0}


@dataclass(frozen=True, slots=True)
class Target:
    """A claim: `measured` of a summary is at least (or, for times, at most) `bound`."""

    text: str
    bound: float
    measured: Callable[["Summary"], float | None]
    at_most: bool = False
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        """Say whether a measured value reaches the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


class Summary:
    """Medians over the rounds of a file of results."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def figure(self, engine: str, workload: str, key: str = "tokens_per_s") -> float | None:
        """Return the median of a workload's figure over rounds."""
        runs = (run for run in self.data["runs"] if run["engine"] == engine)
        return median_of([run["workloads"][workload] for run in runs if workload in run["workloads"]], key)

    def start(self, engine: str, key: str, model: str = "dense") -> float | None:
        """Return the median of a figure of the engine's start."""
        return median_of([r for r in self.data["runs"] if (r["engine"], r["model"]) == (engine, model)], key)

    def floor(self, key: str) -> float | None:
        """Return the best measured rate: a floor that noise lowers would flatter whoever is held to it."""
        return max((entry[key] for entry in self.data["floors"] if key in entry), default=None)

    def num_rounds(self, engine: str, workload: str) -> int:
        """Return how many rounds have the workload."""
        return sum(workload in run["workloads"] for run in self.data["runs"] if run["engine"] == engine)

    def times_faster(self, one: str, other: str, workload: str) -> float | None:
        """Return the ratio of two engines' rates."""
        return ratio(self.figure(one, workload), self.figure(other, workload))


def floor_tokens_per_s(summary: Summary, shape: ModelShape, workload: Workload, scheme: str) -> float | None:
    """Return the rate at which the machine's floors would answer the workload, all requests at once."""
    reading, computing = summary.floor("read_bytes_per_s"), best_products_per_s(summary, scheme)
    if not reading or not computing:
        return None
    num_requests = len(workload.requests)
    body = shape.weights_per_token - shape.head_weights
    pairs = sum(len(r.prompt) ** 2 / 2 for r in workload.requests)
    products = 2 * (body * workload.num_input + shape.head_weights * num_requests)
    products += 2 * shape.attention_products_per_pair * pairs
    seconds = products / computing
    for step in range(1, max(r.num_output for r in workload.requests)):
        running = [r for r in workload.requests if r.num_output > step]
        positions = sum(len(r.prompt) + step for r in running)
        read = shape.weights_read(len(running)) * BYTES_PER_WEIGHT[scheme] + positions * shape.kv_bytes_per_token
        seconds += max(read / reading, 2 * shape.weights_per_token * len(running) / computing)
    return workload.num_output / seconds


def best_products_per_s(summary: Summary, scheme: str) -> float | None:
    """Return the best rate of products: 8-bit weights may also be widened and multiplied in 16 bits."""
    kinds = ("bf16", "fp32") if scheme == "bf16" else ("bf16", "fp32", "int8")
    return max((rate for kind in kinds if (rate := summary.floor(f"{kind}_per_s"))), default=None)


def decode_share(summary: Summary, engine: str, shape: ModelShape, scheme: str) -> float | None:
    """Return the rate of one request's tokens after the first, over the rate at which weights and KV can be read."""
    reading, rate = summary.floor("read_bytes_per_s"), summary.figure(engine, "one", "decode_tokens_per_s")
    if not reading or not rate:
        return None
    bytes_per_token = shape.weights_read(1) * BYTES_PER_WEIGHT[scheme] + 144 * shape.kv_bytes_per_token
    return rate * bytes_per_token / reading


def prefill_share(summary: Summary, engine: str, shape: ModelShape, scheme: str) -> float | None:
    """Return the products per second of the 2,048-token prompt (attention included) over the best GEMM's."""
    computing, seconds = best_products_per_s(summary, scheme), summary.figure(engine, "prefill", "first_token_p50_s")
    if not computing or not seconds:
        return None
    body = shape.weights_per_token - shape.head_weights
    products = 2 * (body * 2_048 + shape.head_weights) + shape.attention_products_per_pair * 2_048**2
    return products / seconds / computing


def targets(shape: ModelShape) -> list[Target]:
    """Return every target that this comparison can judge."""

    def faster(one: str, other: str, workload: str, bound: float) -> Target:
        return Target(f"{one} over {other}, {workload}", bound, lambda s: s.times_faster(one, other, workload))

    ahead = math.nextafter(1.0, 2.0)
    return [
        faster("zif-bf16", "openvino-fp16", "one", 1.0),
        faster("zif-bf16", "openvino-fp16", "eight", 1.25),
        faster("zif-bf16", "openvino-fp16", "many", 1.25),
        *(faster("zif-bf16-kv8", "openvino-fp16", name, 1.25) for name in ("eight", "many")),
        faster("zif-bf16", "vllm-bf16", "many", 3.0),
        faster("zif-bf16", "vllm-fp32", "many", 1.4),
        faster("zif-int8", "openvino-int8", "one", 1.3),
        faster("zif-int8", "openvino-int8", "many", 1.6),
        faster("zif-int8-kv8", "openvino-int8", "many", 1.6),
        *(faster("zif-int8", "llama-q8_0", name, ahead) for name in ("one", "eight", "many")),
        Target("zif-bf16, one request's decoding, share of the read floor", 90,
               lambda s: _percent(decode_share(s, "zif-bf16", shape, "bf16")), unit=" %"),
        Target("zif-bf16, prefill of 2,048 tokens, share of the best GEMM", 80,
               lambda s: _percent(prefill_share(s, "zif-bf16", shape, "bf16")), unit=" %"),
        Target("zif-bf16, cold process to first token", 3.0,
               lambda s: s.start("zif-bf16", "first_token_s"), at_most=True, unit=" s"),
        Target("zif-bf16, idle engine, share of a core", 1.0,
               lambda s: _percent(s.start("zif-bf16", "idle_cores")), at_most=True, unit=" %"),
    ]  # fmt: skip


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
