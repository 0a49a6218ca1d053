"""The pluggy hooks of contract version 1, under the project name "zif" and the entry-point group "zif.v1".

Hooks are called at start-up only; they return objects whose plain methods the engine then calls. An implementation
may take fewer arguments than its specification. An unknown hook name is an error at load.
"""

import pluggy

from zif.contract.config import EngineConfig
from zif.contract.device import Device
from zif.contract.kv import KVArena
from zif.contract.plan import Plan
from zif.contract.platform import Platform
from zif.contract.runner import ModelRunner
from zif.contract.scheduling import BlockManager, Scheduler

PROJECT_NAME = "zif"
ENTRY_POINT_GROUP = "zif.v1"
CONTRACT_VERSION = (1, 0)

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def zif_platform() -> Platform:  # type: ignore[empty-body]
    """Return the vendor's platform. Called once per process, at discovery; imports no array or vendor library."""


@hookspec(firstresult=True)
def zif_scheduler(config: EngineConfig, plan: Plan, block_manager: BlockManager) -> Scheduler | None:
    """Return a scheduler for this plan, or None to leave it to others. Called once per engine; core's is tried last."""


@hookspec(firstresult=True)
def zif_block_manager(config: EngineConfig, plan: Plan, arena: KVArena) -> BlockManager | None:
    """Return a block manager for this plan, or None. Called once per engine; core's own is tried last."""


@hookspec(firstresult=True)
def zif_model_runner(config: EngineConfig, plan: Plan, device: Device) -> ModelRunner | None:
    """Return a model runner for this plan, or None. Called once per worker; core's torch runner is tried last.

    Asked of the plugin whose platform was chosen, and of plugins that bring no platform.
    """
