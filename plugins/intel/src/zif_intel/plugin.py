"""The hooks of the Intel plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Platform, hookimpl
from zif_intel.platform import IntelPlatform


@hookimpl
def zif_platform() -> Platform:
    return IntelPlatform()
