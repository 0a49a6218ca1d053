"""What a host says of itself, read from faked files: processor, cores, memory, and the limits of control groups."""

import os

import pytest

from zif.host.facts import read_host

GIB = 1 << 30
CPUINFO = (
    "processor : 0\nmodel name : Some Processor\nflags : fpu avx2 avx512f amx_bf16\n\nprocessor : 1\nflags : fpu\n"
)
MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\n"


@pytest.fixture
def machine(tmp_path):
    """A function that fakes files of a machine with 8 GiB, 6 of them available, and returns its root."""

    def build(**files):
        known = {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, "proc/self/cgroup": ""}
        for name, text in {**known, **{n.replace("__", "/"): t for n, t in files.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def _write(root, folder, **files):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text)


def test_a_machine_without_limits(machine):
    host = read_host(machine())
    assert (host.processor, host.isa_features) == ("Some Processor", ("avx2", "avx512f", "amx_bf16"))
    assert (host.memory_bytes, host.available_bytes) == (8 * GIB, 6 * GIB)
    assert host.num_cores == len(os.sched_getaffinity(0))
    assert host.steps[-1].endswith("none")


def test_arm_features_are_read(machine):
    root = machine()
    (root / "proc/cpuinfo").write_text("Features : fp asimd bf16 sve\n")
    assert read_host(root).isa_features == ("asimd", "bf16", "sve")


def test_control_groups_of_version_2(machine):
    root = machine()
    (root / "proc/self/cgroup").write_text("0::/outer/inner\n")
    _write(root, "sys/fs/cgroup", cgroup__controllers="cpu memory")
    _write(
        root, "sys/fs/cgroup/outer", memory__max=str(4 * GIB), memory__current=str(3 * GIB), cpu__max="100000 100000"
    )
    _write(root, "sys/fs/cgroup/outer", memory__stat=f"anon 5\ninactive_file {GIB}\n")
    _write(root, "sys/fs/cgroup/outer/inner", memory__max="max", memory__current="7", cpu__max="max 100000")
    host = read_host(root)
    assert (host.memory_bytes, host.available_bytes, host.num_cores) == (4 * GIB, 2 * GIB, 1)
    assert "/sys/fs/cgroup/outer: 1 cores" in host.steps[-1]


def test_control_groups_of_version_1(machine):
    root = machine()
    (root / "proc/self/cgroup").write_text("4:memory:/job\n3:cpuset:/\n1:cpu,cpuacct:/gone\n0::/\n")
    _write(root, "sys/fs/cgroup/memory", memory__limit_in_bytes="9223372036854771712")
    _write(root, "sys/fs/cgroup/memory/job", memory__limit_in_bytes=str(2 * GIB), memory__usage_in_bytes=str(GIB))
    _write(root, "sys/fs/cgroup/memory/job", memory__stat=f"total_inactive_file {GIB // 2}\n")
    _write(root, "sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    host = read_host(root)
    assert (host.memory_bytes, host.available_bytes, host.num_cores) == (2 * GIB, GIB + GIB // 2, 1)


def test_a_full_control_group_leaves_nothing(machine):
    root = machine()
    (root / "proc/self/cgroup").write_text("0::/\n")
    _write(root, "sys/fs/cgroup", cgroup__controllers="", memory__max=str(GIB), memory__current=str(2 * GIB))
    assert read_host(root).available_bytes == 0


def test_a_system_without_these_files_answers_through_psutil(tmp_path):
    host = read_host(tmp_path)
    assert 0 < host.available_bytes <= host.memory_bytes
    assert host.num_cores >= 1
