"""`zif explain`: what would run on which device, decided without reading weights, or every reason why nothing would."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from zif.cli.setting_options import add_setting_options, print_config_if_asked, settings_of
from zif.cli.terminal import format_table, held_as
from zif.contract import EngineConfig, format_bytes
from zif.errors import PlanRefusedError

if TYPE_CHECKING:
    from zif.contract import KVArena, MemoryPlan
    from zif.engine.planning import PlannedModel

_EXIT_REFUSED = 1


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("explain", help="show what would run, without loading weights", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_setting_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 1 when the platform refuses."""
    if print_config_if_asked(arguments):
        return 0
    settings = settings_of(arguments)
    from zif.engine.planning import plan_model

    try:
        planned = plan_model(settings)
    except PlanRefusedError as refusal:
        print(json.dumps({"refused": str(refusal)}) if arguments.json else f"refused: {refusal}")
        return _EXIT_REFUSED
    print(json.dumps(_as_json(planned), indent=2) if arguments.json else _as_text(planned))
    return 0


def max_concurrency(arena: "KVArena", config: EngineConfig) -> float:
    """Return how many requests of full length the arena holds at once. Layer groups share its slabs."""
    slabs_per_request = 0.0
    for index, group in enumerate(arena.groups):
        num_blocks = group.spec.peak_blocks(config.max_model_len, config.max_num_batched_tokens)
        slabs_per_request += num_blocks * _num_lendable_slabs(arena) / max(_num_blocks(arena, index), 1)
    return _num_lendable_slabs(arena) / slabs_per_request


def _num_lendable_slabs(arena: "KVArena") -> int:
    return arena.num_slabs - 1


def _num_blocks(arena: "KVArena", group: int) -> int:
    """Count the blocks that one group would have if it borrowed every slab."""
    return sum(len(arena.slab_blocks(group, slab)) for slab in range(1, arena.num_slabs))


def _as_text(planned: "PlannedModel") -> str:
    plan, model, config = planned.plan, planned.model, planned.config
    concurrency = max_concurrency(planned.arena, config)
    sections = [
        f"model      {model.path}\n           {model.architecture}, {model.implementation}, {held_as(model)}",
        f"platform   {plan.platform}, device {plan.device_id}{', batch-invariant' if plan.batch_invariant else ''}",
        f"limits     {config.max_model_len} tokens per request, {config.max_num_seqs} requests and "
        f"{config.max_num_batched_tokens} tokens per step",
        "features\n" + format_table([(d.feature, str(d.outcome), d.detail) for d in plan.decisions]),
        "KV\n" + format_table(_kv_rows(planned.arena)) + f"\n  {concurrency:.1f} requests of "
        f"{config.max_model_len} tokens at once",
        "memory\n" + format_table(_memory_rows(plan.memory)),
        "implementations\n" + format_table([*plan.implementations]),
        "constraints\n" + format_table([(k, str(v)) for k, v in dataclasses.asdict(plan.constraints).items()]),
    ]
    if notes := (*planned.notes, *plan.notes):
        sections.append("notes\n" + "\n".join(f"  {note}" for note in notes))
    return "\n".join(sections)


def _kv_rows(arena: "KVArena") -> list[tuple[str, ...]]:
    titles = ("group", "kind", "dtype", "layers", "tokens per block", "bytes per block", "blocks at most")
    rows: list[tuple[str, ...]] = [titles]
    for index, group in enumerate(arena.groups):
        spec, num_blocks = group.spec, _num_blocks(arena, index)
        cells = (index, spec.kind, spec.dtype, len(spec.layers), spec.block_size, group.layout.block_bytes, num_blocks)
        rows.append(tuple(map(str, cells)))
    return rows


def _memory_rows(memory: "MemoryPlan") -> list[tuple[str, ...]]:
    held = memory.weight_bytes + memory.activation_bytes + memory.kv_bytes
    amounts = {
        "weights": memory.weight_bytes,
        "activations": memory.activation_bytes,
        "KV": memory.kv_bytes,
        "together": held,
        "available": memory.available_bytes,
    }
    return [(name, format_bytes(num_bytes)) for name, num_bytes in amounts.items()]


def _as_json(planned: "PlannedModel") -> dict[str, Any]:
    plan, model, arena = planned.plan, planned.model, planned.arena
    return {
        "model": {
            "path": str(model.path),
            "architecture": model.architecture,
            "implementation": model.implementation,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "weight_schemes": [*model.weight_schemes],
        },
        "platform": plan.platform,
        "device_id": plan.device_id,
        "batch_invariant": plan.batch_invariant,
        "config": dataclasses.asdict(planned.config),
        "decisions": [dataclasses.asdict(decision) for decision in plan.decisions],
        "kv": {
            "groups": [dataclasses.asdict(g) | {"kind": g.spec.kind} for g in arena.groups],
            "slab_bytes": arena.slab_bytes,
            "num_slabs": arena.num_slabs,
            "max_concurrency": max_concurrency(arena, planned.config),
        },
        "memory": dataclasses.asdict(plan.memory),
        "implementations": dict(plan.implementations),
        "constraints": dataclasses.asdict(plan.constraints),
        "notes": [*planned.notes, *plan.notes],
    }
