"""Which GPUs the runtime will count, and in which order: what its variables leave of what the driver lists."""

from collections.abc import Sequence
from dataclasses import dataclass

from zif_amd.hardware import Gpu
from zif_amd.settings import VisibleDevices

_UUID = "GPU-"
_NONE = "-1"


@dataclass(frozen=True, slots=True)
class Visible:
    """The GPUs that are left, in the order in which the runtime counts them from 0.

    `steps` say what the variables did; `problem` why nothing is left, "" otherwise.
    """

    gpus: tuple[Gpu, ...]
    steps: tuple[str, ...]
    problem: str


def visible_gpus(gpus: Sequence[Gpu], filters: Sequence[VisibleDevices]) -> Visible:
    """Apply the variables one after the other.

    As the runtimes do, a name that is no device, or that comes again, ends the list (ROCR, amd_filter_device.cpp; HIP,
    rocdevice.cpp). A device that this process cannot open is not counted.
    """
    left, steps, problem = [gpu for gpu in gpus if not gpu.problem], [], ""
    if gpus and not left:
        problem = gpus[0].problem
    for one in filters:
        if problem:
            break
        chosen, ended_by = _chosen(left, one.names)
        written = ",".join(one.names)
        ending = f"; {ended_by!r} is no further one of them, and ends the list" if ended_by else ""
        steps.append(f"{one.variable}={written}: {len(chosen)} of {len(left)} GPUs{ending}")
        if not one.names or one.names[0] == _NONE:
            problem = f"{one.variable}={written} hides every GPU; unset it, or name those to use: 0 to {len(left) - 1}"
        elif not chosen:
            problem = f"{one.variable}={written} names no GPU; there are {len(left)}, counted from 0: name those to use"
        left = chosen
    return Visible(() if problem else tuple(left), tuple(steps), problem)


def _chosen(gpus: Sequence[Gpu], names: Sequence[str]) -> tuple[list[Gpu], str]:
    """Return the GPUs named, and the name that ended the list early, "" for none."""
    chosen: list[Gpu] = []
    for name in names:
        gpu = _find(gpus, name)
        if gpu is None or gpu in chosen:
            return chosen, name
        chosen.append(gpu)
    return chosen, ""


def _find(gpus: Sequence[Gpu], name: str) -> Gpu | None:
    if name.isdecimal():
        return gpus[int(name)] if int(name) < len(gpus) else None
    if not name.upper().startswith(_UUID):
        return None
    wanted = name[len(_UUID) :].lower()
    found = [gpu for gpu in gpus if int(gpu.unique_id, 16) and wanted and gpu.unique_id.startswith(wanted)]
    return found[0] if len(found) == 1 else None
