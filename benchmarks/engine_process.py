"""What the process boundary costs: requests per second through client and engine process, and CPU time on each side.

The physics: the null platform computes nothing, so what is left is scheduling, block tables, detokenizing, encoding
and two processes waking each other. Both sides are one thread of Python; the slower one decides. CPU time is read from
the processes' own accounts and does not depend on what else the machine does, requests per second do.

    python benchmarks/engine_process.py [--requests 5000] [--concurrency 128] [--output-len 4]
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

from cpu.session import cpu_seconds

from zif import SamplingParams
from zif.serving.answers import EnginePrompt
from zif.serving.engine.client import ProcessEngine
from zif.settings import EngineSettings

MODEL = Path(__file__).parent.parent / "examples" / "embedded_model" / "checkpoint"
PROMPT_LEN = 16
WARM_UP_REQUESTS = 300


async def ask(engine: ProcessEngine, num_requests: int, concurrency: int, output_len: int) -> None:
    """Send requests, `concurrency` at a time, and read every answer to its end."""
    numbers = iter(range(num_requests))

    async def work() -> None:
        for number in numbers:
            prompt = [(number * 31 + position * 7) % 3000 + 1 for position in range(PROMPT_LEN)]
            sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
            async for _ in engine.generate(EnginePrompt(prompt), sampling):
                pass

    await asyncio.gather(*[work() for _ in range(concurrency)])


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run once and return the numbers."""
    async with ProcessEngine(EngineSettings(model=str(MODEL), platform="null"), on_phase=lambda *_: None) as engine:
        began = time.perf_counter()
        await engine.wait_ready()
        ready_s = time.perf_counter() - began
        assert engine.pid is not None
        await ask(engine, WARM_UP_REQUESTS, arguments.concurrency, arguments.output_len)
        client_s, engine_s, began = time.process_time(), cpu_seconds(engine.pid), time.perf_counter()
        await ask(engine, arguments.requests, arguments.concurrency, arguments.output_len)
        seconds = time.perf_counter() - began
        return {
            "ready_s": round(ready_s, 2),
            "requests_per_s": round(arguments.requests / seconds),
            "client_us_per_request": round(1e6 * (time.process_time() - client_s) / arguments.requests),
            "engine_us_per_request": round(1e6 * (cpu_seconds(engine.pid) - engine_s) / arguments.requests),
        }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=4)
    arguments = parser.parse_args()
    print(json.dumps(vars(arguments) | asyncio.run(measure(arguments))))


if __name__ == "__main__":
    main()
