"""What a user should know of a plan before the weights load."""

from collections.abc import Iterator

from zif.contract import DeviceInfo, Workload
from zif.host.packages import installed_version
from zif_amd.architectures import ARCHITECTURES, Architecture, Float8
from zif_amd.claims import ASSUMED
from zif_amd.smi import board_facts
from zif_amd.tables import tuning_folder, waves_per_eu


def plan_notes(workload: Workload, device: DeviceInfo) -> Iterator[str]:
    """Yield what the device is like, what serves it, and what the workload's dtype costs on it."""
    architecture, facts = ARCHITECTURES[device.architecture], dict(device.runtime)
    float8 = "no fp8" if architecture.float8 is Float8.NONE else f"fp8 of the kind {architecture.float8}"
    yield (
        f"{architecture.name}: waves of {architecture.wave_size}, {architecture.matrix} matrix instructions, "
        f"{architecture.lds_bytes >> 10} KiB of LDS, {float8}"
    )
    yield _tuning_note(architecture)
    yield from architecture.costs(workload.dtype)
    if assumed := facts.get(ASSUMED):
        yield assumed
    if partition := facts.get("partition"):
        yield f"partition {partition}: {_partition_meaning(partition)}"
    if installed_version("amdsmi"):
        yield from board_facts(facts["PCI"].split(" ")[0])


def _tuning_note(architecture: Architecture) -> str:
    folder = tuning_folder(architecture)
    if folder is None:
        return f"no tuning tables for {architecture.name} yet: the portable ones serve"
    asked = [f"{kernel} asks for {_or(waves)}" for kernel, waves in waves_per_eu(architecture).items()]
    return f"tuned with the tables of {folder.name}; waves per EU: {'; '.join(asked) or 'left to the compiler'}"


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))


def _partition_meaning(partition: str) -> str:
    """Explain the compute mode: in SPX all dies of a GPU are one device, in CPX each die is one (AMD, MI300 guides)."""
    if partition.startswith("SPX"):
        return "the whole GPU is one device"
    return "this device is one part of a GPU, whose other parts are devices of their own"
