"""The comparison of CPU engines: rounds, results that continue, tables, targets, picture and README."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
# Behind everything else, because the names of its files are ordinary words.
sys.path.append(str(BENCHMARKS))

from cpu import rounds  # noqa: E402
from cpu.engines import ENGINES, Engine, engine  # noqa: E402
from cpu.environments import PeerError, recipes  # noqa: E402
from cpu.plot import svg  # noqa: E402
from cpu.report import BEGIN, END, is_current, readme_section, report, write_section  # noqa: E402
from cpu.results import Results, read  # noqa: E402
from cpu.shapes import ModelShape, model_shape  # noqa: E402
from cpu.targets import Summary, Target, decode_share, floor_tokens_per_s  # noqa: E402
from cpu.workloads import Request, Workload, workloads  # noqa: E402

FAKE = """
from cpu.protocol import serve

class Fake:
    def __init__(self): self.running = {}
    def add(self, index, prompt, num_output): self.running[index] = num_output
    def step(self):
        changed = [(index, 1) for index in self.running]
        self.running = {index: left - 1 for index, left in self.running.items() if left > 1}
        return changed

def load(options):
    if options["behave"] == "refuse": raise ValueError("no such scheme")
    return Fake(), {"versions": {"fake": "1"}, "configuration": options}

serve(load)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


# Rounds and results


@pytest.fixture
def plan(tmp_path, monkeypatch, fake):
    engines = [Engine(name, name, "bf16", "zif", "{model}") for name in ("zif-bf16", "openvino-fp16")]
    monkeypatch.setattr(rounds, "command_of", lambda folder, engine: fake)
    monkeypatch.setattr(rounds, "options_of", lambda folder, engine, model, threads: {"behave": "well"})
    monkeypatch.setattr(rounds, "prepare", lambda folder, name: None)
    monkeypatch.setattr(rounds, "prepare_weights", lambda folder, engine, model: folder)
    monkeypatch.setattr(rounds, "measure_floors", lambda plan: dict(FLOORS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    chosen = {name: workloads()[name] for name in ("one", "moe-one")}
    return rounds.Plan(engines, chosen, 2, tmp_path, 1, 0.0, 60.0, "python benchmarks/cpu.py")


FLOORS = {"read_bytes_per_s": 24e9, "bf16_per_s": 1e12, "fp32_per_s": 2e11, "int8_per_s": 2e12}


def order(data):
    return [(run["round"], run["engine"], run["model"]) for run in data["runs"] if run["workloads"]]


def test_rounds_interleave_and_are_kept(plan, tmp_path):
    path = tmp_path / "cpu.json"
    rounds.run(plan, Results.begin(path, False, False))
    data = read(path)
    assert [(r, e) for r, e, model in order(data) if model == "dense"] == [
        (0, "zif-bf16"), (0, "openvino-fp16"), (1, "openvino-fp16"), (1, "zif-bf16"),
    ]  # fmt: skip
    assert {model for _, _, model in order(data)} == {"dense", "moe"}
    assert all(run["errors"] == {} and run["first_token_s"] >= run["ready_s"] > 0 for run in data["runs"])
    assert [entry["round"] for entry in data["floors"]] == [0, 1]
    assert data["versions"]["openvino-fp16"]["versions"] == {"fake": "1"}


def test_other_workloads_run_in_as_many_rounds_as_asked(plan, tmp_path):
    path = tmp_path / "cpu.json"
    rounds.run(replace(plan, engines=plan.engines[:1]), Results.begin(path, False, False))
    assert order(read(path)) == [(0, "zif-bf16", "dense"), (0, "zif-bf16", "moe"), (1, "zif-bf16", "dense")]
    rounds.run(replace(plan, engines=plan.engines[:1], num_other_rounds=2), Results.begin(path, False, False))
    assert order(read(path))[3:] == [(1, "zif-bf16", "moe")]


def test_what_was_measured_is_not_measured_again(plan, tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    rounds.run(replace(plan, num_rounds=1), Results.begin(path, False, False))
    ran = []
    monkeypatch.setattr(rounds, "_run_engine", lambda plan, results, key, names: ran.append((key[2], names)))
    rounds.run(replace(plan, num_rounds=1), Results.begin(path, False, False))
    assert ran == []
    more = {**plan.workloads, "eight": workloads()["eight"]}
    rounds.run(replace(plan, num_rounds=1, workloads=more), Results.begin(path, False, False))
    assert ran == [(0, ["eight"])] * 2
    ran.clear()
    rounds.run(replace(plan, num_rounds=1), Results.begin(path, False, fresh=True))
    assert len(ran) == 4


def test_an_engine_that_fails_is_noted_and_the_others_go_on(plan, tmp_path, monkeypatch):
    def behaviour(folder, engine, model, threads):
        return {"behave": "refuse" if engine.name.startswith("openvino") else "well"}

    monkeypatch.setattr(rounds, "options_of", behaviour)
    path = tmp_path / "cpu.json"
    rounds.run(replace(plan, num_rounds=1), Results.begin(path, False, False))
    data = read(path)
    assert data["notes"]["openvino-fp16, dense"] == "start: ValueError: no such scheme"
    assert {engine for _, engine, _ in order(data)} == {"zif-bf16"}
    assert "no such scheme" in report(data)
    monkeypatch.setattr(rounds, "options_of", lambda *_: {"behave": "well"})
    rounds.run(replace(plan, num_rounds=1), Results.begin(path, False, False))
    assert read(path)["notes"] == {}


def test_results_of_other_sources_or_of_another_machine_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    results = Results.begin(path, False, False)
    results.run_of("zif-bf16", "dense", 0)["sources"] = "older"
    results.run_of("vllm-bf16", "dense", 0)["sources"] = "older"
    results.save("command")
    assert [run["engine"] for run in Results.begin(path, False, False).data["runs"]] == ["vllm-bf16"]
    monkeypatch.setattr("cpu.machine.describe", lambda: {"processor": "another"})
    assert Results.begin(path, False, False).data["runs"] == []


def test_another_format_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0"):
        read(tmp_path / "r.json")


# Tables


def measured(rates, **more):
    """Results of two rounds with the rates of {engine: {workload: rate}}; the second is a tenth slower."""
    runs = []
    for engine_name, by_workload in rates.items():
        for index, factor in enumerate((1.0, 0.9)):
            entries = {
                name: {"tokens_per_s": rate * factor, "decode_tokens_per_s": rate * factor, "first_token_p50_s": 2.0,
                       "first_token_p99_s": 3.0, "gap_p50_s": 0.1, "gap_p99_s": 0.2, "cores_used": 2.0}
                for name, rate in by_workload.items()
            }  # fmt: skip
            start = {"first_token_s": 2.5, "ready_s": 2.0, "load_s": 1.0, "peak_bytes": 2**30, "sources": "abc"}
            key = {"engine": engine_name, "model": "dense", "round": index}
            runs.append({**key, **start, "workloads": entries, "errors": {}})
    machine = {"processor": "P", "family": "f", "instruction_sets": ["avx512f"], "cores": 2, "memory_bytes": 2**34}
    floors = [{"round": index, **FLOORS} for index in range(2)]
    return {"quick": False, "runs": runs, "machine": machine, "floors": floors, "notes": {}, "versions": {},
            "commands": ["python benchmarks/cpu.py"], "date": "2026-01-01", "commit": "c", **more}  # fmt: skip


RATES = {
    "zif-bf16": {"one": 20.0, "eight": 100.0, "many": 300.0, "mixed": 50.0},
    "openvino-fp16": {"one": 10.0, "eight": 100.0, "many": 200.0},
    "llama-q8_0": {"one": 8.0},
}


def test_the_report_has_medians_ratios_and_targets():
    text = report(measured(RATES))
    assert "| zif, bf16 | 19.0 | 95.0 | 285.0 |" in text
    assert "| OpenVINO GenAI, fp16 weights | 2.00 | 1.00 | 1.50 |" in text
    assert "| zif-bf16 over openvino-fp16, one | at least 1x | 2.00x | reached |" in text
    assert "| zif-bf16 over openvino-fp16, eight | at least 1.25x | 1.00x | **missed** |" in text
    assert "| zif-bf16 over vllm-bf16, many | at least 3x | - | not measured |" in text
    assert "| zif-bf16, cold process to first token | at most 3 s | 2.50 s | reached |" in text
    assert "2.00 s | 3.00 s | 100 ms | 200 ms" in text


def test_every_table_of_the_report_is_rectangular():
    text = report(measured(RATES, notes={"vllm-bf16": "a | bar\nand a line"}))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "- **vllm-bf16**: a / bar and a line" in text


def test_ahead_means_more_than_equal():
    same = {"zif-int8": {"one": 8.0}, "llama-q8_0": {"one": 8.0}}
    assert "| zif-int8 over llama-q8_0, one | at least 1x | 1.00x | **missed** |" in report(measured(same))


def test_a_limit_from_above_is_met_from_below():
    target = Target("t", 3.0, lambda summary: None, at_most=True)
    assert target.is_met(3.0)
    assert not target.is_met(3.1)


TINY = ModelShape({"model.embed_tokens.weight": 1_000, "q": 3_000}, 1, 8, 8)


def test_floors_are_the_longer_of_reading_and_computing():
    summary = Summary(measured({"zif-bf16": {"one": 0.5}}))
    summary.data["floors"][:] = [{"round": 0, "read_bytes_per_s": 8_000.0, "bf16_per_s": 1e12}]
    one = Workload("one", "", "dense", (Request((5,) * 10, 2),))
    # One step after the prompt: 4,000 weights of 2 bytes and 11 positions of 32 bytes at 8,000 bytes/s.
    assert floor_tokens_per_s(summary, TINY, one, "bf16") == pytest.approx(2 / ((8_000 + 11 * 32) / 8_000), rel=1e-6)
    summary.data["floors"][:] = [{"round": 0, "read_bytes_per_s": 1e12, "bf16_per_s": 8_000.0}]
    prompt = (2 * (3_000 * 10 + 1_000) + 2 * 16 * 50) / 8_000
    assert floor_tokens_per_s(summary, TINY, one, "bf16") == pytest.approx(2 / (prompt + 1.0), rel=1e-6)
    summary.data["floors"][0]["int8_per_s"] = 4_000.0
    assert floor_tokens_per_s(summary, TINY, one, "int8") == pytest.approx(2 / (prompt + 1.0), rel=1e-6)
    summary.data["floors"].clear()
    assert floor_tokens_per_s(summary, TINY, one, "bf16") is None


def test_a_floor_is_the_best_of_all_rounds():
    summary = Summary(measured({}))
    summary.data["floors"][:] = [{"round": 0, "bf16_per_s": 3.0}, {"round": 1, "bf16_per_s": 5.0}, {"round": 1}]
    assert summary.floor("bf16_per_s") == 5.0
    assert summary.floor("int8_per_s") is None


def test_share_of_the_read_floor():
    summary = Summary(measured({"zif-bf16": {"one": 1.0}}))
    summary.data["floors"][:] = [{"round": 0, "read_bytes_per_s": 2 * (8_000 + 144 * 32)}]
    assert decode_share(summary, "zif-bf16", TINY, "bf16") == pytest.approx(0.95 / 2)


def test_shapes_are_those_of_the_models():
    dense, sparse = model_shape("dense"), model_shape("moe")
    assert dense.weights_per_token == sum(dense.matrices.values()) == 595_984_384
    assert dense.kv_bytes_per_token == 114_688
    experts = 8 * 32 * 3 * 1_024 * 768
    assert sum(sparse.matrices.values()) - sparse.weights_per_token == experts * (1 - 4 / 32)
    assert sparse.weights_read(1) == sparse.weights_per_token
    assert sparse.weights_read(64) == pytest.approx(sum(sparse.matrices.values()), rel=1e-3)


# The picture, the README, the recipes


def test_the_picture_draws_rates_to_scale():
    root = ElementTree.fromstring(svg(measured(RATES)))
    bars = [float(rect.get("width")) for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("x")]
    assert len(bars) == 7
    assert bars[1] / bars[0] == pytest.approx(0.5, abs=0.01)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"zif, bf16", "19.0", "llama.cpp, Q8_0"} <= set(texts)


def test_the_section_is_written_between_markers_and_compared(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    section = readme_section(measured(RATES), "r/cpu.svg", "r/cpu.md")
    assert not is_current(readme, section)
    write_section(readme, section)
    assert is_current(readme, section)
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith(f"{END}\nafter\n")
    assert "| zif, bf16 | 19.0 | 95.0 | 285.0 | 2.5 s |" in readme.read_text()
    write_section(readme, section)
    assert readme.read_text().count("| zif, bf16 |") == 1


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_section(tmp_path / "README.md", "section")


@pytest.mark.skipif(not (BENCHMARKS / "results/cpu.json").exists(), reason="nothing was measured for this tree")
def test_report_picture_and_readme_are_those_of_the_results():
    data = read(BENCHMARKS / "results/cpu.json")
    assert (BENCHMARKS / "results/cpu.md").read_text() == report(data)
    assert (BENCHMARKS / "results/cpu.svg").read_text() == svg(data)
    section = readme_section(data, "benchmarks/results/cpu.svg", "benchmarks/results/cpu.md")
    assert is_current(ROOT / "README.md", section)
    assert not data["quick"]


def test_every_package_has_one_version_and_every_engine_an_environment():
    for recipe in recipes().values():
        for package in [*recipe["install"], *([recipe["source"]] if "source" in recipe else [])]:
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package), package
    assert {entry.environment for entry in ENGINES} == {*recipes(), "zif"}
    for entry in ENGINES:
        assert (BENCHMARKS / "cpu" / f"engine_{entry.environment}.py").exists()


def test_an_unknown_engine_is_named_with_those_there_are():
    with pytest.raises(PeerError, match=r"no engine 'vlm'; there are zif-bf16"):
        engine("vlm")
    assert json.loads(json.dumps(engine("zif-int8").options))["quantization"] == "int8"
