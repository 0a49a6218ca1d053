"""`zif simulate`: run the control plane without a model, to prove it or to plan with it.

Without a trace: random traffic and faults, with every promise checked after every step. With `--trace`: what recorded
traffic would meet on an engine of given limits, in modelled time.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.cli.terminal import format_table, note
from zif.errors import ConfigError
from zif.settings import parse_bytes

if TYPE_CHECKING:
    from zif.contract import EngineConfig, KVArena
    from zif.simulation import Totals

_DEFAULT_STEPS = 20_000
_DEFAULT_BLOCKS = 4096
_DEFAULT_BLOCK_SIZE = 16
_LONGEST = 2**31 - 1


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "simulate", help="run scheduler and KV memory without a model", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides everything (default: 0)")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help=f"steps to run (default: {_DEFAULT_STEPS}, or the whole trace)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    _add_random(parser.add_argument_group("random traffic"))
    _add_trace(parser.add_argument_group("recorded traffic"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command. A broken promise is a `SimulationFailure`, whose message says how to repeat it."""
    return _run_random(arguments) if arguments.trace is None else _run_trace(arguments)


def _add_random(group: Any) -> None:
    group.add_argument(
        "--faults",
        metavar="FAULTS",
        help="random (default), none, or a list such as allocation@17,abort@3: the n-th call of a point fails, with a "
        "+ behind every later one too; points: allocation, step, crash, duplicate, stale, abort, clock",
    )
    group.add_argument("--workers", type=_positive, metavar="N", help="processes (default: 1)")


def _add_trace(group: Any) -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="JSONL with arrival_s, prompt_tokens, output_tokens, and optional prefix_id with prefix_tokens, tenant, "
        "priority",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw KV memory and queues over time: .html or .svg")
    group.add_argument("--model", type=Path, metavar="FOLDER", help="take layer groups and bytes from this model")
    group.add_argument("--kv-bytes", metavar="BYTES", help="memory for KV; needs --model")
    group.add_argument("--kv-blocks", type=_positive, metavar="N", help=f"without a model (default: {_DEFAULT_BLOCKS})")
    group.add_argument("--block-size", type=_positive, metavar="N", help=f"(default: {_DEFAULT_BLOCK_SIZE})")
    group.add_argument("--max-model-len", type=_positive, metavar="N", help="(default: the model's, or no limit)")
    group.add_argument("--max-num-seqs", type=_positive, metavar="N", help="(default: 256)")
    group.add_argument("--max-num-batched-tokens", type=_positive, metavar="N", help="(default: 2048)")
    group.add_argument("--scheduling-policy", choices=("fcfs", "priority"), help="(default: fcfs)")
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="(default: true)")
    group.add_argument("--step-ms", type=_duration, metavar="T", help="time of any step (default: 8)")
    group.add_argument("--token-us", type=_duration, metavar="T", help="time per computed token (default: 40)")
    group.add_argument("--context-token-ns", type=_duration, metavar="T", help="per token of context (default: 20)")


_RANDOM_ONLY = ("faults", "workers")
_TRACE_ONLY = (
    "plot", "model", "kv_bytes", "kv_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "scheduling_policy", "enable_prefix_caching", "step_ms", "token_us", "context_token_ns",
)  # fmt: skip


def _run_random(arguments: argparse.Namespace) -> int:
    from zif.simulation import Campaign, run_campaign

    _refuse(arguments, _TRACE_ONLY, "needs --trace")
    steps = arguments.steps or _DEFAULT_STEPS
    campaign = Campaign(arguments.seed, steps, arguments.faults or "random", arguments.workers or 1)
    totals = run_campaign(campaign, lambda so_far: note(f"{so_far.num_steps} of {steps} steps"))
    if arguments.json:
        print(json.dumps({declared.name: getattr(totals, declared.name) for declared in fields(totals)}))
    else:
        print(format_table([("no promise was broken", ""), *_rows(totals)], indent=""))
    return 0


def _rows(totals: "Totals") -> list[tuple[str, ...]]:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"

    return [
        ("steps", f"{totals.num_steps}"),
        ("requests", f"{totals.num_requests}, ended by: {counted(totals.finished)}"),
        ("tokens generated", f"{totals.num_tokens}"),
        ("prompt tokens found computed", f"{totals.num_cached_tokens}"),
        ("preemptions", f"{totals.num_preemptions}"),
        ("blocks copied", f"{totals.num_saved_blocks} out, {totals.num_loaded_blocks} in"),
        ("guessed tokens", f"{totals.num_drafted_tokens}, of which right: {totals.num_accepted_tokens}"),
        ("faults injected", counted(totals.strikes)),
    ]


def _run_trace(arguments: argparse.Namespace) -> int:
    from zif.simulation import TraceReplay, check_plot_path, read_trace, trace_summary, write_plot

    _refuse(arguments, _RANDOM_ONLY, "does not go with --trace")
    if arguments.plot is not None:
        check_plot_path(arguments.plot)
    arena, config = _engine(arguments)
    report = TraceReplay(config, arena, _cost(arguments)).run(read_trace(arguments.trace), arguments.steps)
    if arguments.plot is not None:
        write_plot(report, arguments.plot)
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        print(format_table([tuple(row) for row in trace_summary(report)], indent=""))
    return 0


def _engine(arguments: argparse.Namespace) -> "tuple[KVArena, EngineConfig]":
    """Return arena and limits: from a model and bytes, or plain blocks."""
    from zif.contract import EngineConfig
    from zif.simulation import model_arena, plain_arena

    block_size = arguments.block_size or _DEFAULT_BLOCK_SIZE
    longest = _LONGEST
    if arguments.model is None:
        if arguments.kv_bytes is not None:
            raise ConfigError("--kv-bytes needs --model, which says what a block takes; or give --kv-blocks")
        arena = plain_arena(arguments.kv_blocks or _DEFAULT_BLOCKS, block_size)
    else:
        from zif.models.description import ModelSource, describe_model

        if arguments.kv_bytes is None or arguments.kv_blocks is not None:
            raise ConfigError("--model needs the memory for KV in bytes, such as --kv-bytes 4GiB, not in blocks")
        model = describe_model(ModelSource(arguments.model, block_size=block_size))
        arena, longest = model_arena(model.kv_specs, _bytes(arguments.kv_bytes)), model.max_model_len
    caching = arguments.enable_prefix_caching
    return arena, EngineConfig(
        arguments.max_model_len or longest,
        arguments.max_num_seqs or 256,
        arguments.max_num_batched_tokens or 2048,
        True if caching is None else caching,
        arguments.scheduling_policy or "fcfs",
        arguments.seed,
    )


def _cost(arguments: argparse.Namespace) -> Any:
    from zif.simulation import CostModel

    default = CostModel()
    return CostModel(
        default.step_s if arguments.step_ms is None else arguments.step_ms * 1e-3,
        default.token_s if arguments.token_us is None else arguments.token_us * 1e-6,
        default.context_token_s if arguments.context_token_ns is None else arguments.context_token_ns * 1e-9,
    )


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"kv_bytes: {error}; write it like 4GiB") from error


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} {why}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0 and less than 1e9")
    return value
