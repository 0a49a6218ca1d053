"""The traffic that every engine gets: token ids, output lengths and arrival times, the same in every run.

What it is: pure data from a seed, so that each engine and each round computes the same requests. What it is not: a
model of anybody's users. Prompts are random ids, so nothing is shared between requests but what a workload shares.
"""

import random
from dataclasses import dataclass, replace

MAIN = ("one", "eight", "many", "prefill")
"""Workloads that targets are about: they run in every round."""
FIRST_TOKEN = 1_000
"""Lower ids are left to special tokens."""
NUM_TOKENS = 28_000
SHARED_TOKENS = 512
LONG_TOKENS = 8_192
ARRIVAL_S = 0.5
"""Mean time between two requests of the mixed workload."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of token ids, how many tokens to generate, and when it comes (seconds after the start)."""

    prompt: tuple[int, ...]
    num_output: int
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with a name; `primer` is answered before the clock starts."""

    name: str
    title: str
    model: str
    requests: tuple[Request, ...]
    primer: tuple[Request, ...] = ()

    @property
    def num_input(self) -> int:
        """Return the tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_output(self) -> int:
        """Return the tokens that all requests generate."""
        return sum(request.num_output for request in self.requests)


def workloads(quick: bool = False) -> dict[str, Workload]:
    """Return every workload by name; `quick` has an eighth of the output, and shorter long prompts."""
    listed = [
        _batch("one", "dense", (1, 128, 32)),
        _batch("eight", "dense", (8, 128, 32)),
        _batch("many", "dense", (32, 128, 64)),
        _batch("prefill", "dense", (1, 2_048, 1)),
        mixed(),
        prefix(),
        _batch("long", "dense", (1, LONG_TOKENS // 4 if quick else LONG_TOKENS, 16)),
        _batch("moe-one", "moe", (1, 128, 32)),
        _batch("moe-eight", "moe", (8, 128, 32)),
    ]
    return {workload.name: shortened(workload) if quick else workload for workload in listed}


def warm_up() -> Workload:
    """Return what an engine answers before its first workload: shapes of one and of several requests."""
    rng = random.Random("warm-up")
    requests = tuple(Request(_tokens(rng, 32), 4) for _ in range(4))
    return Workload("warm-up", "warm-up", "", requests)


def cold_start() -> Workload:
    """Return the first request of a fresh process."""
    return Workload("cold", "cold start", "", (Request(_tokens(random.Random("cold"), 128), 1),))


def mixed(num_requests: int = 32) -> Workload:
    """Return log-normal prompts and outputs that arrive as a Poisson process."""
    rng = random.Random("mixed")
    requests, arrival = [], 0.0
    for _ in range(num_requests):
        num_input = _clamped(rng.lognormvariate(4.85, 0.8), 16, 512)
        num_output = _clamped(rng.lognormvariate(3.5, 0.6), 8, 128)
        requests.append(Request(_tokens(rng, num_input), num_output, arrival))
        arrival += rng.expovariate(1 / ARRIVAL_S)
    title = f"{num_requests} x log-normal (median 128, 33), arriving at {1 / ARRIVAL_S:g}/s"
    return Workload("mixed", title, "dense", tuple(requests))


def prefix(num_requests: int = 16) -> Workload:
    """Return prompts that begin with the same tokens, which the primer has computed."""
    rng = random.Random("prefix")
    shared = _tokens(rng, SHARED_TOKENS)
    requests = tuple(Request(shared + _tokens(rng, 32), 32) for _ in range(num_requests))
    title = f"{num_requests} x ({SHARED_TOKENS} shared + 32, 32)"
    return Workload("prefix", title, "dense", requests, (Request(shared + _tokens(rng, 32), 2),))


def shortened(workload: Workload) -> Workload:
    """Return the workload with an eighth of its output, at least two tokens unless it had one."""
    requests = (replace(r, num_output=min(r.num_output, max(2, r.num_output // 8))) for r in workload.requests)
    return replace(workload, title=f"{workload.title}, shortened", requests=tuple(requests))


def _batch(name: str, model: str, shape: tuple[int, int, int]) -> Workload:
    num_requests, num_input, num_output = shape
    rng = random.Random(name)
    requests = tuple(Request(_tokens(rng, num_input), num_output) for _ in range(num_requests))
    return Workload(name, f"{num_requests} x ({num_input:,}, {num_output})", model, requests)


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(FIRST_TOKEN + rng.randrange(NUM_TOKENS) for _ in range(count))


def _clamped(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))
