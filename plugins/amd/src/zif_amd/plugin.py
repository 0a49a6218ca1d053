"""The hooks of the AMD plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Platform, hookimpl
from zif_amd.platform import AmdPlatform


@hookimpl
def zif_platform() -> Platform:
    return AmdPlatform()
