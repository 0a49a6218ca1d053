"""Whether a device still has the memory that a plan counts on. Imports no array library."""

from zif.contract import DeviceInfo, Plan, format_bytes
from zif.errors import PlatformUnavailableError


def check_planned_memory(plan: Plan, device: DeviceInfo) -> None:
    """Raise `PlatformUnavailableError` when others have taken so much since that the plan no longer fits."""
    memory = plan.memory
    needed = memory.weight_bytes + memory.kv_bytes + memory.activation_bytes
    if needed > device.available_bytes:
        raise PlatformUnavailableError(
            f"{device.device_id!r} ({device.name}) has {format_bytes(device.available_bytes)} free, and the plan needs "
            f"{format_bytes(needed)}: it was taken since; end the processes that use it, or plan again"
        )
