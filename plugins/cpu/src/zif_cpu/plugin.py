"""The hooks of the CPU plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Platform, hookimpl
from zif_cpu.platform import CpuPlatform


@hookimpl
def zif_platform() -> Platform:
    return CpuPlatform()
