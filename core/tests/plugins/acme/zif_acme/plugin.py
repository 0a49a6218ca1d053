"""The hooks. Discovery imports this file, so it imports neither torch nor a vendor library."""

from zif.contract import Platform, hookimpl
from zif_acme.platform import AcmePlatform


@hookimpl
def zif_platform() -> Platform:
    return AcmePlatform()
