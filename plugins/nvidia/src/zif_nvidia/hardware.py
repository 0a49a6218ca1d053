"""Which GPUs there are, asked of the driver through its management library (NVML): no context on a device is made.

`pynvml`, the module of nvidia-ml-py, is imported when it is needed. Its calls answer with bytes in some versions and
with text in others, and any of them may be missing in a container; only count, name, UUID, memory and capability are
needed to use a GPU. (NVML API reference.)
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_NOT_LOADED = "the NVIDIA driver is installed, but its kernel module is not loaded, or there is no GPU"
_PROBLEMS = {
    4: "this user may not use the NVIDIA driver; check the permissions of /dev/nvidiactl and /dev/nvidia0",
    9: f"{_NOT_LOADED}; load it (modprobe nvidia), or see why it does not load (dmesg)",
    12: (
        "no NVIDIA driver: its library libnvidia-ml.so.1 is not found; install the driver, or start the container with "
        "access to the GPUs (--gpus all)"
    ),
    13: "the NVIDIA driver is too old for nvidia-ml-py; update the driver",
    15: "a GPU has fallen off the bus; reboot, and look at the system's log (dmesg)",
    18: (
        "the NVIDIA driver's library and kernel module have different versions, as after an update; reboot, or reload "
        "the module"
    ),
}
_NO_PYTHON_MODULE = "nvidia-ml-py is not installed, so GPUs cannot be looked for; install nvidia-ml-py>=12"

_PROHIBITED, _EXCLUSIVE_PROCESS = 2, 3


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one instance of a GPU that is divided (MIG), whose `parts` are empty.

    `num_processes` counts others than this one; it and `busy_percent` are None where the driver does not say. `problem`
    says why the GPU cannot be used now.
    """

    name: str
    uuid: str
    architecture: str
    memory_bytes: int
    free_bytes: int
    num_processes: int | None = None
    busy_percent: int | None = None
    divided: bool = False
    parts: tuple["Gpu", ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the driver lists, in the order of the bus. `cuda` is what it serves, (0, 0) if unknown.

    `problem` says why nothing is known, "" otherwise.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    problem: str = ""
    steps: tuple[str, ...] = ()


def load_nvml() -> Any:
    """Import the module of nvidia-ml-py. Raises `ImportError`."""
    return importlib.import_module("pynvml")


def read_hardware(load: Callable[[], Any] = load_nvml) -> Hardware:
    """Ask the driver. Raises nothing for what is missing."""
    try:
        nvml = load()
    except ImportError:
        return _nothing(_NO_PYTHON_MODULE)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _nothing(_PROBLEMS.get(_code(error), f"the NVIDIA driver does not answer: {error}; see nvidia-smi"))
    try:
        return _read(nvml)
    except nvml.NVMLError as error:
        return _nothing(_PROBLEMS.get(_code(error), f"the NVIDIA driver failed to answer: {error}; see nvidia-smi"))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _nothing(problem: str) -> Hardware:
    return Hardware(problem=problem, steps=(f"NVML: {problem}",))


def _read(nvml: Any) -> Hardware:
    driver = _text(_asked(nvml, lambda: nvml.nvmlSystemGetDriverVersion(), ""))
    version = int(_asked(nvml, lambda: nvml.nvmlSystemGetCudaDriverVersion_v2(), 0))
    cuda = (version // 1000, version % 1000 // 10)
    gpus = tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    steps = (
        f"NVIDIA driver: {driver or 'of unknown version'}, for CUDA up to {cuda[0]}.{cuda[1]}",
        *(f"GPU {index}: {_description(gpu)}" for index, gpu in enumerate(gpus)),
    )
    return Hardware(gpus, driver, cuda, "" if gpus else "the NVIDIA driver lists no GPU; see lspci and dmesg", steps)


def _gpu(nvml: Any, index: int) -> Gpu:
    """Read one GPU; one that does not answer is listed with its problem, because others are counted after it."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        architecture = f"sm_{major}{minor}"
        divided = _is_divided(nvml, handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        num_processes = _num_processes(nvml, handle)
        return Gpu(
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            architecture=architecture,
            memory_bytes=int(memory.total),
            free_bytes=int(memory.free),
            num_processes=num_processes,
            busy_percent=_busy_percent(nvml, handle),
            divided=divided,
            parts=tuple(_parts(nvml, handle, architecture)) if divided else (),
            problem=_mode_problem(nvml, handle, num_processes),
        )
    except nvml.NVMLError as error:
        problem = _PROBLEMS.get(_code(error), f"the driver says: {error}; see nvidia-smi")
        return Gpu(f"GPU {index}", "", "", 0, 0, problem=problem)


def _parts(nvml: Any, handle: Any, architecture: str) -> Iterator[Gpu]:
    """Yield the instances of a divided GPU that are there."""
    for place in range(int(_asked(nvml, lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0))):
        with contextlib.suppress(nvml.NVMLError):  # a place where no instance was made
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            memory = nvml.nvmlDeviceGetMemoryInfo(part)
            name, uuid = _text(nvml.nvmlDeviceGetName(part)), _text(nvml.nvmlDeviceGetUUID(part))
            yield Gpu(name, uuid, architecture, int(memory.total), int(memory.free))


def _is_divided(nvml: Any, handle: Any) -> bool:
    mode = _asked(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle), (0, 0))
    return bool(mode[0])


def _num_processes(nvml: Any, handle: Any) -> int | None:
    processes = _asked(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle), None)
    # In a container the numbers of processes are those of another namespace; then this process counts as another one.
    return None if processes is None else sum(process.pid != os.getpid() for process in processes)


def _busy_percent(nvml: Any, handle: Any) -> int | None:
    rates = _asked(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle), None)
    return None if rates is None else int(rates.gpu)


def _mode_problem(nvml: Any, handle: Any, num_processes: int | None) -> str:
    """Say why the compute mode keeps this process out, "" when it does not."""
    mode = _asked(nvml, lambda: nvml.nvmlDeviceGetComputeMode(handle), 0)
    if mode == _PROHIBITED:
        return "its compute mode prohibits all use; an administrator may change it (nvidia-smi -c DEFAULT)"
    if mode == _EXCLUSIVE_PROCESS and num_processes:
        return "another process has it for itself (compute mode exclusive); end that process, or change the mode"
    return ""


def _asked(nvml: Any, call: Callable[[], Any], otherwise: Any) -> Any:
    """Return a call's answer; `otherwise` where the driver, or what stands between, does not give it."""
    try:
        return call()
    except (nvml.NVMLError, AttributeError):
        return otherwise


def _description(gpu: Gpu) -> str:
    if not gpu.architecture:
        return gpu.problem
    facts = [gpu.name, gpu.architecture, f"{gpu.free_bytes} of {gpu.memory_bytes} bytes free", gpu.uuid]
    if gpu.divided:
        facts.append(f"divided (MIG) into {len(gpu.parts)}")
    if gpu.num_processes:
        facts.append(f"used by {gpu.num_processes} processes")
    return ", ".join(filter(None, (*facts, gpu.problem)))


def _code(error: Any) -> int:
    return int(getattr(error, "value", 0) or 0)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
