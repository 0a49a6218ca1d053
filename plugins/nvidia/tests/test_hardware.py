"""What the driver's library says, and how it says that there is nothing."""

import os

import pytest

from zif_nvidia.hardware import read_hardware

GIB = 1 << 30


@pytest.fixture
def read(nvml):
    return lambda *cards, **options: read_hardware(lambda: nvml(*cards, **options))


def test_gpus_are_read_in_the_order_of_the_bus(read):
    hardware = read("H100", "P100", driver=b"570.26", cuda=12080)
    assert (hardware.driver, hardware.cuda, hardware.problem) == ("570.26", (12, 8), "")
    first, second = hardware.gpus
    assert (first.name, first.architecture, first.uuid) == ("NVIDIA H100 80GB HBM3", "sm_90", "GPU-11111111-aaaa")
    assert (first.memory_bytes, first.free_bytes, first.problem) == (80 * GIB, 79 * GIB, "")
    assert second.architecture == "sm_60"
    assert any("NVIDIA H100" in step for step in hardware.steps)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (4, "permissions"),
        (9, "modprobe nvidia"),
        (12, "--gpus all"),
        (15, "fallen off the bus"),
        (18, "different versions"),
        (999, "error 999"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_reason(read, code, said):
    hardware = read("H100", init_error=code)
    assert hardware.gpus == ()
    assert said in hardware.problem
    assert hardware.steps == (f"NVML: {hardware.problem}",)


def test_a_missing_python_module_is_a_reason():
    def load():
        raise ModuleNotFoundError("pynvml")

    assert "install nvidia-ml-py>=12" in read_hardware(load).problem


def test_a_driver_without_gpus_is_a_reason(read):
    assert "lists no GPU" in read().problem


def test_what_a_container_hides_is_not_needed(read):
    hidden = ("nvmlDeviceGetMigMode", "nvmlDeviceGetComputeMode", "nvmlSystemGetDriverVersion")
    hardware = read(("H100", {"fails": ("processes", "utilization")}), missing=hidden)
    (gpu,) = hardware.gpus
    assert (gpu.num_processes, gpu.busy_percent, gpu.problem, hardware.driver) == (None, None, "", "")


def test_a_gpu_that_fails_keeps_its_place(read):
    broken, good = read(("H100", {"fails": ("handle",)}), "H100 too").gpus
    assert "fallen off the bus" in broken.problem
    assert good.problem == ""


@pytest.mark.parametrize(
    ("mode", "pids", "said"),
    [
        (0, (1, 2), ""),
        (2, (), "prohibits all use"),
        (3, (1,), "another process has it for itself"),
        (3, (), ""),
        (3, (os.getpid(),), ""),
    ],
)
def test_the_compute_mode_can_keep_this_process_out(read, mode, pids, said):
    (gpu,) = read(("H100", {"mode": mode, "pids": pids})).gpus
    assert said in gpu.problem
    assert bool(gpu.problem) == bool(said)


def test_a_divided_gpu_has_parts(read):
    (gpu,) = read(("A100", {"parts": ("slice", "slice too")})).gpus
    assert gpu.divided
    assert [(part.uuid, part.memory_bytes, part.architecture) for part in gpu.parts] == [
        ("MIG-aaaa", 40 * GIB, "sm_80"),
        ("MIG-bbbb", 40 * GIB, "sm_80"),
    ]


def test_the_library_is_left_as_it_was_found(nvml):
    module = nvml("H100")
    read_hardware(lambda: module)
    assert (module.calls[0], module.calls[-1]) == ("nvmlInit", "nvmlShutdown")
