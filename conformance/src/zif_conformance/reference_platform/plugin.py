"""The hooks of this plugin, and nothing else: discovery imports this file, so it imports no array library."""

from zif.contract import Platform, hookimpl
from zif_conformance.reference_platform.platform import ReferencePlatform


@hookimpl
def zif_platform() -> Platform:
    return ReferencePlatform()
