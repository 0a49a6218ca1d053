"""The hooks of the TPU plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Device, EngineConfig, ModelRunner, Plan, Platform, hookimpl
from zif_tpu.platform import TpuPlatform


@hookimpl
def zif_platform() -> Platform:
    return TpuPlatform()


@hookimpl
def zif_model_runner(config: EngineConfig, plan: Plan, device: Device) -> ModelRunner | None:
    from zif_tpu.device import XlaDevice

    if not isinstance(device, XlaDevice):
        return None
    from zif_tpu.runner import XlaRunner

    return XlaRunner(config, plan, device)
