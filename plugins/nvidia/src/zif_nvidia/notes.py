"""What a user should know of a plan before the weights load."""

from collections.abc import Iterator

from zif.contract import DeviceInfo
from zif_nvidia.architectures import ARCHITECTURES, NO_MATRIX
from zif_nvidia.hardware import Hardware
from zif_nvidia.software import minor_version_note
from zif_nvidia.tables import tuning_folder


def plan_notes(device: DeviceInfo, cuda: tuple[int, ...], hardware: Hardware) -> Iterator[str]:
    """Yield what the device is like, what serves it, and what is known to be slow on it.

    `cuda` is what torch is built for.
    """
    architecture, facts = ARCHITECTURES[device.architecture], dict(device.runtime)
    float8 = "fp8 in hardware" if architecture.float8 else "no fp8"
    yield (
        f"{architecture.name}: {architecture.matrix} matrix instructions, {architecture.shared_bytes >> 10} KiB of "
        f"shared memory for a block of threads, {float8}"
    )
    if architecture.matrix == NO_MATRIX:
        yield "Triton multiplies and adds one by one here: prompts are slow"
    folder = tuning_folder(architecture.name)
    if folder is None:
        yield f"no tuning tables for {architecture.name} yet: the portable ones serve"
    elif folder.name != architecture.name:
        yield f"no tuning tables for {architecture.name} yet: those of {folder.name} serve"
    if note := minor_version_note(cuda, hardware.cuda):
        yield note
    if others := facts.get("other processes"):
        yield f"{others} other processes use this GPU: what they take later is not counted here"
    yield "access between GPUs (peer to peer, NVLink) is not looked at: NCCL finds out when ranks meet"
