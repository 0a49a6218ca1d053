"""What runs inside every engine's process: a loop that answers lines of JSON, and the clock of requests.

What it is: the same code around every engine, so that what differs is the engine. It imports the standard library
only, because it runs in the environments of all peers. The process loads its model, says "ready", then answers one
line of requests at a time with the time of every token. What the engine prints goes to standard error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO, runtime_checkable


class SteppedEngine(Protocol):
    """An engine that takes requests while it computes others."""

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        """Queue a request under a number that no other one has while it runs."""

    def step(self) -> Sequence[tuple[int, int]]:
        """Compute once; return the numbers of requests that got tokens, each with how many."""


@runtime_checkable
class BatchEngine(Protocol):
    """An engine that answers a batch from start to end and takes nothing meanwhile."""

    def answer(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[float]]:
        """Answer all; return for each request the readings of `time.perf_counter` at its tokens."""


Loader = Callable[[Mapping[str, Any]], tuple[SteppedEngine | BatchEngine, dict[str, Any]]]
"""Makes the engine of the options given, and says what it is configured as, with versions."""


def serve(load: Loader) -> None:
    """Load the engine that `sys.argv[1]` (JSON) describes and answer until standard input ends."""
    answers = _claim_standard_output()
    try:
        started = time.perf_counter()
        engine, about = load(json.loads(sys.argv[1]))
        _say(answers, {"event": "ready", "load_s": time.perf_counter() - started, **about})
        for line in sys.stdin:
            _say(answers, {"event": "answered", **answer(engine, json.loads(line)["requests"])})
    except Exception as error:
        traceback.print_exc()
        _say(answers, {"event": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})
    else:
        if hasattr(engine, "close"):
            engine.close()
    # Engines with threads of their own may hang or abort when Python takes them down; nothing is left to save.
    answers.flush()
    os._exit(0)


def answer(engine: SteppedEngine | BatchEngine, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the requests at their times; return the seconds after the start at which each token came."""
    started = time.perf_counter()
    if isinstance(engine, BatchEngine):
        token_times = _answer_in_batches(engine, requests, started)
    else:
        token_times = _answer_by_steps(engine, requests, started)
    wall_s = time.perf_counter() - started
    for times, request in zip(token_times, requests, strict=True):
        if len(times) != request["num_output"]:
            raise RuntimeError(f"a request got {len(times)} tokens in place of {request['num_output']}")
    return {"wall_s": wall_s, "token_s": [[round(t - started, 6) for t in times] for times in token_times]}


def _answer_by_steps(engine: SteppedEngine, requests: list[dict[str, Any]], started: float) -> list[list[float]]:
    token_times: list[list[float]] = [[] for _ in requests]
    num_missing = sum(request["num_output"] for request in requests)
    num_added = 0
    while num_missing:
        waited = time.perf_counter() - started
        while num_added < len(requests) and requests[num_added]["arrival_s"] <= waited:
            engine.add(num_added, requests[num_added]["prompt"], requests[num_added]["num_output"])
            num_added += 1
        if num_missing == sum(request["num_output"] for request in requests[num_added:]):
            time.sleep(max(0.0, requests[num_added]["arrival_s"] - (time.perf_counter() - started)))
            continue
        changed = engine.step()
        now = time.perf_counter()
        for index, count in changed:
            token_times[index] += [now] * count
            num_missing -= count
    return token_times


def _answer_in_batches(engine: BatchEngine, requests: list[dict[str, Any]], started: float) -> list[list[float]]:
    """Answer whatever has arrived, then whatever has arrived meanwhile."""
    token_times: list[list[float]] = []
    while len(token_times) < len(requests):
        first = len(token_times)
        time.sleep(max(0.0, requests[first]["arrival_s"] - (time.perf_counter() - started)))
        waited = time.perf_counter() - started
        batch = [request for request in requests[first:] if request["arrival_s"] <= waited]
        token_times += engine.answer([r["prompt"] for r in batch], [r["num_output"] for r in batch])
    return token_times


def _claim_standard_output() -> TextIO:
    """Return standard output for answers, and send what anything else prints there to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
