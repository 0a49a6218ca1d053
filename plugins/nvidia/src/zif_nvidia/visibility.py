"""Which GPUs CUDA will count, and in which order: what CUDA_VISIBLE_DEVICES leaves of what the driver lists."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from zif_nvidia.hardware import Gpu
from zif_nvidia.settings import VISIBLE

_INDEX = re.compile(r"[+]?(\d+)")


@dataclass(frozen=True, slots=True)
class Visible:
    """The GPUs that are left, in the order in which CUDA counts them from 0; those with a `problem` included.

    `steps` say what the variable did; `problem` why nothing is left, "" otherwise.
    """

    gpus: tuple[Gpu, ...]
    steps: tuple[str, ...] = ()
    problem: str = ""


def visible_gpus(gpus: Sequence[Gpu], written: str | None) -> Visible:
    """Apply the variable as CUDA does; None where it is not set.

    Entries are indices, or beginnings of UUIDs that name one GPU. What names none ends the list, and what comes twice
    empties it. A process sees one instance of divided GPUs. (CUDA C++ programming guide, environment variables; MIG
    user guide, device enumeration.)
    """
    if written is None:
        chosen, ending = list(gpus), ""
    elif not written.strip():
        empty = f"{VISIBLE} is set and empty, which hides every GPU; unset it, or name those to use, as in {VISIBLE}=0"
        return Visible((), (empty,), empty)
    else:
        chosen, ending = _chosen(gpus, [entry.strip() for entry in written.split(",")])
    steps = () if written is None else (f"{VISIBLE}={written}: {len(chosen)} of {len(gpus)} GPUs{ending}",)
    if written is not None and gpus and not chosen:
        problem = f"{VISIBLE}={written!r} names no GPU that is there{ending}; there are {len(gpus)}, counted from 0"
        return Visible((), steps, problem)
    return _undivided(chosen, steps)


def _chosen(gpus: Sequence[Gpu], entries: Sequence[str]) -> tuple[list[Gpu], str]:
    """Return the GPUs named, and how the list ended before its end, "" when it did not."""
    named_by_uuid = entries[0].startswith(("GPU-", "MIG-"))
    chosen: list[Gpu] = []
    for entry in entries:
        gpu = _by_uuid(gpus, entry) if named_by_uuid else _by_index(gpus, entry)
        if gpu is None:
            return chosen, f" ({entry!r} names none, and ends the list)"
        if gpu in chosen:
            return [], f" ({entry!r} comes twice, which empties the list)"
        chosen.append(gpu)
    return chosen, ""


def _by_index(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    # As strtoul: digits at the beginning count, whatever follows them.
    found = _INDEX.match(entry)
    index = int(found[1]) if found else len(gpus)
    return gpus[index] if index < len(gpus) else None


def _by_uuid(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    whole = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    parts = [part for gpu in gpus for part in gpu.parts if part.uuid.startswith(entry)]
    found = parts if entry.startswith("MIG-") else whole
    return found[0] if len(found) == 1 and len(entry) > len("GPU-") else None


def _undivided(chosen: Sequence[Gpu], steps: Sequence[str]) -> Visible:
    """Put one instance in the place of divided GPUs, the first, because CUDA shows no more to a process."""
    left: list[Gpu] = []
    notes: list[str] = []
    has_part = False
    for gpu in chosen:
        is_part = gpu.divided or gpu.uuid.startswith("MIG-")
        if is_part and has_part:
            notes.append(f"{gpu.name}: left out, a process sees one instance of divided GPUs (MIG)")
            continue
        has_part = has_part or is_part
        left.extend(_instance(gpu))
    return Visible(tuple(left), (*steps, *notes))


def _instance(gpu: Gpu) -> Iterator[Gpu]:
    if not gpu.divided:
        yield gpu
    elif gpu.parts:
        yield replace(gpu.parts[0], problem=gpu.problem)
    else:
        advice = "it is divided (MIG), but no instance was made; make one (nvidia-smi mig), or switch MIG off"
        yield replace(gpu, problem=gpu.problem or advice)
