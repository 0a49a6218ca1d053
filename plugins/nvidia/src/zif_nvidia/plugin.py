"""The hooks of the NVIDIA plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Platform, hookimpl
from zif_nvidia.platform import NvidiaPlatform


@hookimpl
def zif_platform() -> Platform:
    return NvidiaPlatform()
