"""The comparison of CPU engines under a cap: what a capped process sees, and that nothing is compared without it."""

import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
# Behind everything else, because the names of its files are ordinary words.
sys.path.append(str(BENCHMARKS))

from cpu import cap, rounds  # noqa: E402
from cpu.engines import ENGINES, Engine  # noqa: E402
from cpu.environments import PeerError  # noqa: E402
from cpu.plot import svg  # noqa: E402
from cpu.report import readme_section, report  # noqa: E402
from cpu.results import Results, read  # noqa: E402
from cpu.workloads import workloads  # noqa: E402

from zif_cpu.library import Library, load_library  # noqa: E402

ISA = "avx512_vnni"
FAKE = """
import subprocess, sys
from cpu.protocol import serve

class Fake:
    def __init__(self): self.running = {}
    def add(self, index, prompt, num_output): self.running[index] = num_output
    def step(self):
        changed = [(index, 1) for index in self.running]
        self.running = {index: left - 1 for index, left in self.running.items() if left > 1}
        return changed

def load(options):
    if options["escapes"]: subprocess.Popen([sys.executable, "-c", "input()"], env={}, stdin=subprocess.PIPE)
    return Fake(), {"versions": {"fake": "1"}, "configuration": {}}

serve(load)
"""
USES_TILES = """
import ctypes, mmap
system = ctypes.CDLL(None, use_errno=True)
assert (system.syscall(158, 0x1023, 18) == 0) == {granted}
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("c4e2784907 c4e27b49c0 c4e27849c0 c3"))  # ldtilecfg [rdi]; tilezero tmm0; tilerelease; ret
shapes = bytes([1, *[0] * 15, 64, *[0] * 31, 16, *[0] * 15])  # one tile of 16 rows of 64 bytes
ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))(shapes)
"""
ASKS_ZIF = "from zif_cpu.library import choose_kernels; print(choose_kernels(None).isa)"
ASKS_TORCH = "import torch; print(*sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True))"
FAULTS = "import faulthandler; faulthandler.enable(); import ctypes; ctypes.string_at(8)"


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("instruction sets of x86-64")
    try:
        return cap.prepare(tmp_path_factory.mktemp("folder"), ISA)
    except PeerError as error:
        pytest.skip(str(error))


def ran(code, variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def library_only(capped):
    """Without the switches: what the processor says is the cap's, not what an engine is asked to do."""
    return {"LD_PRELOAD": capped.variables["LD_PRELOAD"]}


# What a capped process sees


def test_zif_takes_the_kernels_of_the_cap_without_being_told(capped):
    library = load_library()
    if not isinstance(library, Library) or ISA not in library.isas:
        pytest.skip(f"no kernels of {ISA}")
    assert ran(ASKS_ZIF, library_only(capped)).stdout.strip() == ISA


def test_torch_sees_vnni_and_nothing_above(capped):
    uncapped, seen = (set(ran(ASKS_TORCH, v).stdout.split()) for v in ({}, library_only(capped)))
    late = {
        name for name in uncapped if name.startswith(("amx", "avx10")) or name.endswith(("_bf16", "_fp16", "avx_vnni"))
    }
    assert seen == uncapped - late
    assert "avx2" in seen


def test_a_child_is_capped_as_its_parent_is(capped):
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASKS_TORCH!r}], check=True)"
    assert ran(code, library_only(capped)).stdout == ran(ASKS_TORCH, library_only(capped)).stdout


def test_who_uses_amx_without_asking_dies_of_it(capped):
    if ran(USES_TILES.format(granted=True), {}).returncode:
        pytest.skip("no AMX here")
    assert ran(USES_TILES.format(granted=False), library_only(capped)).returncode == -signal.SIGILL


def test_other_faults_reach_the_handler_of_the_program(capped):
    done = ran(FAULTS, library_only(capped))
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


def test_what_cannot_be_capped_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PeerError, match=r"no cap 'avx9'; there are avx512_vnni"):
        cap.prepare(tmp_path, "avx9")
    monkeypatch.setattr(cap, "_built", lambda folder, isa: tmp_path / "missing.so")
    with pytest.raises(PeerError, match=r"nothing can be capped here: (.|\n)*not preloaded"):
        cap.prepare(tmp_path, ISA)


# Rounds and results


@pytest.fixture
def plan(tmp_path, monkeypatch, capped):
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE)
    monkeypatch.setattr(rounds, "command_of", lambda folder, engine: [sys.executable, str(script)])
    monkeypatch.setattr(rounds, "options_of", lambda _, engine, *__: {"escapes": engine.name.startswith("openvino")})
    monkeypatch.setattr(rounds, "prepare", lambda folder, name: None)
    monkeypatch.setattr(rounds, "prepare_weights", lambda folder, engine, model: folder)
    monkeypatch.setattr(rounds, "measure_floors", lambda plan: {"read_bytes_per_s": 1e9, "bf16_per_s": 1e9})
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    engines = [Engine(name, name, "bf16", "zif", "{model}") for name in ("zif-bf16", "openvino-fp16", "llama-bf16")]
    chosen = {"one": workloads()["one"]}
    return rounds.Plan(engines, chosen, 1, tmp_path, 1, 0.0, 60.0, "python benchmarks/cpu.py", cap=capped)


def test_only_engines_whose_processes_are_all_capped_are_compared(plan, tmp_path):
    path = tmp_path / "cpu-avx512_vnni.json"
    rounds.run(plan, Results.begin(path, False, False, ISA))
    data = read(path)
    assert [run["engine"] for run in data["runs"] if run["workloads"]] == ["zif-bf16"]
    assert data["versions"]["zif-bf16"]["configuration"]["cap"] == ISA
    assert "not capped at avx512_vnni: 1 of its processes" in data["notes"]["openvino-fp16, dense"]
    assert "left out under a cap" in data["notes"]["llama-bf16"]
    for text in (report(data), readme_section(data, "p", "f")):
        assert "**Capped at `avx512_vnni`: every engine computed as on a processor with AVX-512 and VNNI" in text
    assert "capped at avx512_vnni" in svg(data)


def test_without_a_cap_nothing_is_left_out_and_nothing_is_said(plan, tmp_path):
    path = tmp_path / "cpu.json"
    rounds.run(replace(plan, cap=None), Results.begin(path, False, False))
    data = read(path)
    assert len(data["runs"]) == 3
    assert data["notes"] == {}
    assert "apped at" not in report(data) + readme_section(data, "p", "f") + svg(data)


def test_results_of_another_cap_are_not_mixed(tmp_path):
    path = tmp_path / "cpu.json"
    results = Results.begin(path, False, False, ISA)
    results.run_of("vllm-bf16", "dense", 0)
    results.save("command")
    assert len(Results.begin(path, False, False, ISA).data["runs"]) == 1
    assert Results.begin(path, False, False).data["runs"] == []


def test_floors_are_measured_under_the_cap(capped, tmp_path, monkeypatch):
    seen = {}

    def noted(command, env, **_):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.setattr(rounds.subprocess, "run", noted)
    rounds.measure_floors(rounds.Plan([], {}, 1, tmp_path, 1, 0.0, 1.0, "", cap=capped))
    assert capped.variables.items() <= seen.items()


def test_results_of_a_cap_have_files_of_their_own():
    # In a process of its own: the script and its package have one name.
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cpu.py"), "--isa", ISA, "--quick", "--table"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    stem = "results/cpu-avx512_vnni-quick.json"
    assert stem in said.stderr or "Capped at" in said.stdout


def test_every_cap_and_every_engine_that_is_left_out_exists():
    assert cap.SWITCHES.keys() == cap.WORDS.keys()
    assert cap.LEFT_OUT.keys() <= {entry.name for entry in ENGINES}
    assert all((BENCHMARKS / "cpu" / f"cap_{isa}.c").exists() for isa in cap.SWITCHES)
