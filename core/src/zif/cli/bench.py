"""`zif bench`: how fast a model runs here. Random prompts from a fixed seed, so that runs compare.

The first lines are for people; the last line of standard output is one JSON object.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zif.cli.opening import open_llm
from zif.cli.setting_options import add_setting_options, print_config_if_asked, settings_of
from zif.contract import SamplingParams
from zif.errors import ConfigError

if TYPE_CHECKING:
    from zif.engine.llm import LLM
    from zif.engine.outputs import RequestOutput

_PROMPT_SEED = 0
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class _Workload:
    """What is run: `num_requests` at once, each of `input_len` random tokens, each making `output_len` tokens."""

    num_requests: int
    input_len: int
    output_len: int


def register(commands: Any) -> None:
    """Add the command and its two kinds to the parser."""
    parser = commands.add_parser("bench", help="measure throughput or latency", allow_abbrev=False)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    throughput = kinds.add_parser("throughput", help="many requests at once", allow_abbrev=False)
    _add_counts(throughput, {"--num-prompts": 100, "--input-len": 128, "--output-len": 128})
    throughput.set_defaults(run=run_throughput)
    latency = kinds.add_parser("latency", help="one batch, repeated", allow_abbrev=False)
    _add_counts(latency, {"--batch-size": 1, "--input-len": 128, "--output-len": 128, "--repeats": 10})
    latency.set_defaults(run=run_latency)
    for kind in (throughput, latency):
        add_setting_options(kind)


def run_throughput(arguments: argparse.Namespace) -> int:
    """Run all requests at once and print requests and tokens per second."""
    if print_config_if_asked(arguments):
        return 0
    workload = _Workload(arguments.num_prompts, arguments.input_len, arguments.output_len)
    with open_llm(settings_of(arguments)) as llm:
        _warm_up(llm, workload)
        prompts = _random_prompts(llm, workload, _PROMPT_SEED)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, _sampling(workload), use_tqdm=False)
        seconds = time.perf_counter() - begin
    _print_throughput(workload, _num_output_tokens(outputs), seconds)
    return 0


def run_latency(arguments: argparse.Namespace) -> int:
    """Run one batch several times and print the median and 90th percentile of its latencies."""
    if print_config_if_asked(arguments):
        return 0
    workload = _Workload(arguments.batch_size, arguments.input_len, arguments.output_len)
    if workload.output_len < 2:
        raise ConfigError("output_len=1 leaves no time between tokens to measure; give --output-len 2 or more")
    outputs: list[RequestOutput] = []
    with open_llm(settings_of(arguments)) as llm:
        _warm_up(llm, workload)
        for repeat in range(arguments.repeats):
            # New prompts each time: a cached prompt would answer at once.
            prompts = _random_prompts(llm, workload, _PROMPT_SEED + repeat)
            outputs += llm.generate(prompts, _sampling(workload), use_tqdm=False)
    _print_latency(workload, arguments.repeats, outputs)
    return 0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of `values` do not exceed. share: (0, 1]."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _add_counts(parser: argparse.ArgumentParser, defaults: dict[str, int]) -> None:
    group = parser.add_argument_group("workload")
    for flag, default in defaults.items():
        group.add_argument(flag, type=_count, default=default, metavar="N", help=f"(default: {default})")


def _count(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _random_prompts(llm: "LLM", workload: _Workload, seed: int) -> list[dict[str, Any]]:
    """Draw prompts as token ids; no two begin alike but by chance."""
    generator = random.Random(seed)
    rows = (
        [generator.randrange(llm.model.vocab_size) for _ in range(workload.input_len)]
        for _ in range(workload.num_requests)
    )
    return [{"prompt_token_ids": row} for row in rows]


def _sampling(workload: _Workload) -> SamplingParams:
    return SamplingParams(max_tokens=workload.output_len, temperature=0.0, ignore_eos=True)


def _warm_up(llm: "LLM", workload: _Workload) -> None:
    """Run a short batch of the same shape, so that first-use costs stay out of the measurement."""
    short = _Workload(workload.num_requests, workload.input_len, min(_WARM_UP_TOKENS, workload.output_len))
    llm.generate(_random_prompts(llm, short, _PROMPT_SEED - 1), _sampling(short), use_tqdm=False)


def _num_output_tokens(outputs: "Sequence[RequestOutput]") -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _print_throughput(workload: _Workload, num_output_tokens: int, seconds: float) -> None:
    num_input_tokens = workload.num_requests * workload.input_len
    result = {
        "kind": "throughput",
        **asdict(workload),
        "seconds": seconds,
        "requests_per_s": workload.num_requests / seconds,
        "input_tokens_per_s": num_input_tokens / seconds,
        "output_tokens_per_s": num_output_tokens / seconds,
    }
    print(f"{workload.num_requests} requests, {num_input_tokens} tokens in, {num_output_tokens} out, {seconds:.2f} s")
    print(f"{result['requests_per_s']:.2f} requests/s, {result['input_tokens_per_s']:.1f} tokens/s in, "
          f"{result['output_tokens_per_s']:.1f} tokens/s out")  # fmt: skip
    print(json.dumps(result))


def _print_latency(workload: _Workload, repeats: int, outputs: "Sequence[RequestOutput]") -> None:
    first_token_s = [_first_token_s(output) for output in outputs]
    per_token_s = [_per_token_s(output) for output in outputs]
    result = {"kind": "latency", **asdict(workload), "repeats": repeats}
    for name, values in (("time_to_first_token_s", first_token_s), ("time_per_output_token_s", per_token_s)):
        result[f"{name}_median"], result[f"{name}_p90"] = statistics.median(values), percentile(values, 0.9)
        label = name.removesuffix("_s").replace("_", " ")
        print(f"{label}: median {result[f'{name}_median'] * 1e3:.2f} ms, p90 {result[f'{name}_p90'] * 1e3:.2f} ms")
    print(json.dumps(result))


def _first_token_s(output: "RequestOutput") -> float:
    seconds = output.metrics.time_to_first_token_s if output.metrics else None
    assert seconds is not None, f"request {output.request_id} finished without a first token"
    return seconds


def _per_token_s(output: "RequestOutput") -> float:
    """Return the mean time between output tokens."""
    times = output.metrics
    assert times is not None, f"request {output.request_id} has no times"
    assert times.first_token_s is not None, f"request {output.request_id} finished without a first token"
    assert times.finished_s is not None, f"request {output.request_id} has not finished"
    return (times.finished_s - times.first_token_s) / (len(output.outputs[0].token_ids) - 1)
