"""The null platform's hooks. It is in core, and found through its entry point like any other."""

from zif.contract import Device, EngineConfig, ModelRunner, Plan, Platform, hookimpl


@hookimpl
def zif_platform() -> Platform:
    from zif.null.platform import NullPlatform

    return NullPlatform()


@hookimpl
def zif_model_runner(config: EngineConfig, plan: Plan, device: Device) -> ModelRunner | None:
    from zif.null.platform import NAME
    from zif.null.runner import NullRunner

    return NullRunner(config) if plan.platform == NAME else None
