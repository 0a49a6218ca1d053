"""The parts of an engine that plugins can replace, and how they are chosen. `engine.py` is the only caller."""

import time
from dataclasses import dataclass
from functools import partial

from zif.contract import BlockManager, Device, HiddenRows, KVStore, ModelDescription, ModelRunner, RemoteTier, Scheduler
from zif.engine.kv_tiers import KVTiers
from zif.engine.planning import PlannedModel
from zif.engine.pooling import Pooler
from zif.errors import EngineError
from zif.kv.journal import BlockJournal
from zif.models.pooling import PoolingMode


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The parts that plugins can replace, wired together."""

    device: Device
    runner: ModelRunner
    block_manager: BlockManager
    scheduler: Scheduler
    store: KVStore | None = None

    def hidden_problem(self, rows: HiddenRows) -> str | None:
        """Say which part keeps prompts from being pooled over `rows`; None when each serves such requests."""
        if not self.runner.reports_hidden:
            return f"{type(self.runner).__name__} reports no hidden states; choose another platform"
        if not self.scheduler.serves_hidden:
            return f"{type(self.scheduler).__name__} plans no requests for hidden states; use zif's own scheduler"
        if rows is HiddenRows.ALL and not self.block_manager.serves_hidden:
            name = type(self.block_manager).__name__
            return f"{name} does not have every token of a prompt computed; use zif's own block manager"
        return None


@dataclass(frozen=True, slots=True)
class EngineExtras:
    """What a caller hands to an engine beside settings: a place for KV that engines share, a journal of blocks."""

    remote_kv: RemoteTier | None = None
    journal: BlockJournal | None = None


def wire_parts(planned: PlannedModel, device: Device, tiers: KVTiers, journal: BlockJournal | None) -> EngineParts:
    """Ask the plugins for each part, and use core's own where none answers."""
    config, plan = planned.config, planned.plan
    ask = partial(planned.registry.ask, plan.platform, config=config, plan=plan)
    block_manager = ask(hook="zif_block_manager", arena=planned.arena)
    if block_manager is None:
        from zif.kv import PagedBlockManager, Retainer

        block_manager = PagedBlockManager(
            planned.arena,
            enable_prefix_caching=config.enable_prefix_caching,
            max_step_tokens=config.max_num_batched_tokens,
            retainer=Retainer(time.monotonic, config.tenant_cache_percent),
            tiers=tiers.setup,
            journal=journal,
        )
    elif journal is not None:
        raise EngineError(f"{type(block_manager).__name__} keeps no journal of its blocks; start without KV events")
    scheduler = ask(hook="zif_scheduler", block_manager=block_manager)
    if scheduler is None:
        from zif.scheduling import TokenBudgetScheduler

        scheduler = TokenBudgetScheduler(config, block_manager, plan.constraints)
    runner = ask(hook="zif_model_runner", device=device)
    if runner is None:
        from zif.runtime.runner import TorchRunner

        runner = TorchRunner(config, device)
    return EngineParts(device, runner, block_manager, scheduler, tiers.store)


def open_pooler(model: ModelDescription, parts: EngineParts) -> Pooler:
    """Read how the model pools. Its `abilities` say which of the parts does not serve that, if one does not.

    Raises `ModelError` when the model pools and does nothing else, and cannot.
    """
    pooler = Pooler.open(model, parts.hidden_problem(HiddenRows.LAST))
    if pooler.mode is PoolingMode.LAST:
        return pooler
    problem = parts.hidden_problem(HiddenRows.ALL)
    return pooler if problem is None else Pooler.open(model, problem)
