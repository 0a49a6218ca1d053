"""What is read from the driver's files, on faked machines: GPUs, their memory, partitions, and why there is none."""

import os

import pytest

from zif_amd.architectures import ARCHITECTURES, Float8, Matrix, target_name, why_unsupported
from zif_amd.hardware import read_hardware

GIB = 1 << 30


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (90402, "gfx942"),
        (90010, "gfx90a"),
        (90008, "gfx908"),
        (90500, "gfx950"),
        (100300, "gfx1030"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (120001, "gfx1201"),
    ],
)
def test_the_number_of_an_architecture_becomes_its_name(version, name):
    assert target_name(version) == name


@pytest.mark.parametrize(
    ("name", "wave_size", "matrix", "float8", "lds_kib"),
    [
        ("gfx908", 64, Matrix.MFMA, Float8.NONE, 64),
        ("gfx90a", 64, Matrix.MFMA, Float8.NONE, 64),
        ("gfx942", 64, Matrix.MFMA, Float8.FNUZ, 64),
        ("gfx950", 64, Matrix.MFMA, Float8.OCP, 160),
        ("gfx1100", 32, Matrix.WMMA, Float8.NONE, 64),
        ("gfx1151", 32, Matrix.WMMA, Float8.NONE, 64),
        ("gfx1201", 32, Matrix.WMMA, Float8.OCP, 64),
    ],
)
def test_the_table_of_architectures(name, wave_size, matrix, float8, lds_kib):
    entry = ARCHITECTURES[name]
    assert (entry.wave_size, entry.matrix, entry.float8, entry.lds_bytes >> 10) == (wave_size, matrix, float8, lds_kib)
    assert why_unsupported(name) == ""


@pytest.mark.parametrize("name", ["gfx906", "gfx90c", "gfx1010", "gfx1030", "gfx803"])
def test_what_has_no_matrix_instructions_is_not_served_and_told_why(name):
    reason = why_unsupported(name)
    assert name in reason
    assert "no matrix instructions" in reason
    assert all(served in reason for served in ARCHITECTURES)


def test_what_is_not_known_is_not_served():
    assert "compiled and tuned" in why_unsupported("gfx1103")


def test_a_gpu_is_read_with_its_memory_and_address(machine):
    machine.add_driver()
    machine.add("MI300X", unique_id=0xAB)
    hardware = read_hardware(machine.root)
    (gpu,) = hardware.gpus
    assert (hardware.driver, hardware.release, hardware.problem) == ("6.14.14", (6, 14, 14), "")
    assert (gpu.architecture, gpu.wave_size, gpu.lds_bytes, gpu.num_simds) == ("gfx942", 64, 64 << 10, 1216)
    assert (gpu.memory_bytes, gpu.used_bytes, gpu.busy_percent) == (192 * GIB, GIB, 7)
    assert (gpu.pci_address, gpu.pci_id, gpu.unique_id) == ("0000:01:00.0", "0x74a1", "00000000000000ab")
    assert (gpu.product, gpu.partition, gpu.problem) == ("AMD Instinct MI300X OAM", "SPX/NPS1", "")
    assert "amdgpu driver: 6.14.14" in hardware.steps
    assert "KFD nodes: 2, of them GPUs: 1" in hardware.steps
    assert any("gfx942 at 0000:01:00.0" in step and "SPX/NPS1" in step for step in hardware.steps)


@pytest.mark.parametrize(("location", "address"), [(0xC300, "0000:c3:00.0"), (0x0C3A, "0000:0c:07.2")])
def test_the_address_is_cut_out_of_the_location(machine, location, address):
    machine.add_driver()
    machine.add("MI300X", location=location)
    assert read_hardware(machine.root).gpus[0].pci_address == address


def test_nodes_are_counted_by_number_not_by_name(machine):
    machine.add_driver()
    for number in range(12):
        machine.add("MI300X", used_bytes=number)
    assert [gpu.used_bytes for gpu in read_hardware(machine.root).gpus] == list(range(12))


def test_a_part_of_a_gpu_has_its_share_and_the_modes_of_the_whole(machine):
    machine.add_driver()
    machine.add("MI300X", render_folder=False, memory_bytes=24 * GIB, modes=("CPX", "NPS4"))
    folder = "sys/bus/pci/devices/0000:01:00.0"
    machine.write({f"{folder}/mem_info_vram_total": f"{192 * GIB}\n", f"{folder}/mem_info_vram_used": f"{30 * GIB}\n"})
    (gpu,) = read_hardware(machine.root).gpus
    assert (gpu.memory_bytes, gpu.used_bytes, gpu.partition) == (24 * GIB, 24 * GIB, "CPX/NPS4")


def test_memory_shared_with_the_host_counts_what_is_used_of_both(machine):
    machine.add_driver()
    machine.add("780M", memory_bytes=20 * GIB)
    folder = "sys/class/drm/renderD128/device"
    machine.write({f"{folder}/mem_info_vram_total": f"{GIB}\n", f"{folder}/mem_info_gtt_used": f"{3 * GIB}\n"})
    (gpu,) = read_hardware(machine.root).gpus
    assert (gpu.memory_bytes, gpu.used_bytes) == (20 * GIB, 4 * GIB)


def test_a_driver_of_the_kernel_states_no_version(machine):
    machine.add_driver(version="")
    machine.add("RX7900")
    hardware = read_hardware(machine.root)
    assert (hardware.driver, hardware.release) == ("of Linux 6.8.0-55-generic", ())


def test_no_gpu_and_no_driver(machine):
    hardware = read_hardware(machine.root)
    assert (hardware.gpus, hardware.problem) == ((), "there is no AMD GPU in this host, and no amdgpu driver")
    assert "amdgpu driver: not loaded" in hardware.steps


@pytest.mark.parametrize("kind", ["0x030000", "0x038000", "0x120000"])
def test_a_gpu_without_a_driver_is_named(machine, kind):
    folder = "sys/bus/pci/devices/0000:03:00.0"
    machine.write({f"{folder}/vendor": "0x1002\n", f"{folder}/class": f"{kind}\n"})
    assert "AMD GPU (0000:03:00.0)" in read_hardware(machine.root).problem
    assert "not loaded" in read_hardware(machine.root).problem


def test_other_devices_of_the_vendor_are_no_gpus(machine):
    folder = "sys/bus/pci/devices/0000:03:00.1"
    machine.write({f"{folder}/vendor": "0x1002\n", f"{folder}/class": "0x040300\n"})
    assert "no AMD GPU" in read_hardware(machine.root).problem


def test_a_driver_that_does_not_compute(machine):
    machine.write({"sys/module/amdgpu/version": "6.14.14\n"})
    assert "without KFD" in read_hardware(machine.root).problem


def test_a_driver_that_lists_no_gpu(machine):
    machine.add_driver()
    assert "lists no GPU that computes" in read_hardware(machine.root).problem


def test_nodes_that_a_container_may_not_see(machine):
    machine.add_driver()
    (machine.root / "sys/class/kfd/kfd/topology/nodes/1/properties").mkdir(parents=True)  # reading it fails
    assert "--device=/dev/kfd" in read_hardware(machine.root).problem


def test_a_container_without_the_device_file(machine):
    machine.add_driver()
    machine.add("MI300X")
    (machine.root / "dev/kfd").unlink()
    assert read_hardware(machine.root).problem.startswith("/dev/kfd is not here; start the container with")


def test_no_access_names_the_group(machine):
    machine.add_driver()
    machine.add("MI300X")
    machine.deny("dev/kfd")
    problem = read_hardware(machine.root).problem
    group = os.stat(machine.root / "dev/kfd").st_gid
    assert problem.startswith("no access to /dev/kfd; join the group ")
    assert f"--group-add {group}" in problem


def test_a_group_without_a_name_is_named_by_its_number(machine, monkeypatch):
    machine.add_driver()
    machine.add("MI300X")
    machine.deny("dev/kfd")

    def unknown(group):
        raise KeyError(group)

    monkeypatch.setattr("zif_amd.hardware.grp.getgrgid", unknown)
    assert "join the group that owns it (" in read_hardware(machine.root).problem


def test_one_of_two_gpus_may_be_closed_to_the_process(machine):
    machine.add_driver()
    machine.add("MI300X")
    machine.add("MI300X")
    machine.deny("dev/dri/renderD128")
    hardware = read_hardware(machine.root)
    assert hardware.problem == ""
    assert [bool(gpu.problem) for gpu in hardware.gpus] == [True, False]
    assert "/dev/dri/renderD128" in hardware.gpus[0].problem
    assert any("not usable" in step for step in hardware.steps)


def test_files_of_another_form_say_nothing(machine):
    machine.add_driver()
    machine.add("MI300X")
    folder = "sys/class/drm/renderD128/device"
    machine.write({f"{folder}/mem_info_vram_used": "busy\n", f"{folder}/gpu_busy_percent": "\n"})
    (gpu,) = read_hardware(machine.root).gpus
    assert (gpu.used_bytes, gpu.busy_percent) == (0, None)
