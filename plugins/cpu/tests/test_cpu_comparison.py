"""The comparison of CPU engines, but for the engines: traffic, clocks, processes, results, tables, picture.

An engine of a few lines takes the peers' place; what the README shows must be what the results hold.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
# Behind everything else, because the names of its files are ordinary words.
sys.path.append(str(BENCHMARKS))

from cpu import engines, environments  # noqa: E402
from cpu.environments import PeerError  # noqa: E402
from cpu.figures import decode_rate, figures_of, percentile  # noqa: E402
from cpu.process import EngineProcess  # noqa: E402
from cpu.protocol import answer  # noqa: E402
from cpu.workloads import SHARED_TOKENS, Request, Workload, workloads  # noqa: E402

FAKE = """
import os, signal, sys, time
from cpu.protocol import serve

class Fake:
    def __init__(self): self.running = {}
    def add(self, index, prompt, num_output): self.running[index] = num_output
    def step(self):
        print("chatter")
        changed = [(index, 1) for index in self.running]
        self.running = {index: left - 1 for index, left in self.running.items() if left > 1}
        return changed

def load(options):
    if options["behave"] == "die": os.kill(os.getpid(), signal.SIGILL)
    if options["behave"] == "refuse": raise ValueError("no such scheme")
    if options["behave"] == "hang": time.sleep(60)
    return Fake(), {"versions": {"fake": "1"}, "configuration": options}

serve(load)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


def started(command, behave="well"):
    return EngineProcess(command, {"behave": behave}, {"PYTHONPATH": str(BENCHMARKS)})


# Traffic


def test_traffic_is_the_same_every_time_and_as_large_as_it_says():
    assert workloads() == workloads()
    sizes = {name: (len(w.requests), w.num_input, w.num_output) for name, w in workloads().items()}
    assert sizes["one"] == (1, 128, 32)
    assert sizes["eight"] == (8, 1_024, 256)
    assert sizes["many"] == (32, 4_096, 2_048)
    assert sizes["prefill"] == (1, 2_048, 1)
    assert sizes["long"] == (1, 8_192, 16)
    assert sizes["moe-eight"] == (8, 1_024, 256)


def test_no_prompt_begins_like_another_unless_that_is_its_workload():
    for name, workload in workloads().items():
        beginnings = [request.prompt[:16] for request in workload.requests]
        assert len(set(beginnings)) == (1 if name == "prefix" else len(beginnings))
        assert all(1_000 <= token < 32_768 for request in workload.requests for token in request.prompt)


def test_shared_prompts_share_what_the_primer_computes_and_no_more():
    prefix = workloads()["prefix"]
    shared = prefix.primer[0].prompt[:SHARED_TOKENS]
    assert all(request.prompt[:SHARED_TOKENS] == shared for request in prefix.requests)
    assert len({request.prompt[SHARED_TOKENS : SHARED_TOKENS + 4] for request in prefix.requests}) == 16


def test_mixed_requests_arrive_in_order_with_lengths_within_bounds():
    requests = workloads()["mixed"].requests
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0 < arrivals[-1]
    assert all(16 <= len(r.prompt) <= 512 and 8 <= r.num_output <= 128 for r in requests)
    assert len({len(r.prompt) for r in requests}) > 16


def test_quick_traffic_has_an_eighth_of_the_output():
    whole, quick = workloads(), workloads(quick=True)
    assert quick["many"].num_output == whole["many"].num_output // 8
    assert quick["prefill"].num_output == 1
    assert quick["many"].num_input == whole["many"].num_input


# Clocks


def test_percentiles_are_values_that_were_measured():
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 50) == 3.0
    with pytest.raises(ValueError, match="needs values"):
        percentile([], 50)


def test_figures_count_from_the_arrival():
    workload = Workload("w", "w", "dense", (Request((1,), 3), Request((1,), 2, arrival_s=1.0)))
    figures = figures_of(workload, [[0.5, 1.0, 2.0], [1.5, 2.5]], 2.5)
    assert figures["tokens_per_s"] == 2.0
    assert (figures["first_token_p50_s"], figures["first_token_p99_s"]) == (0.5, 0.5)
    assert (figures["gap_p50_s"], figures["gap_p99_s"]) == (1.0, 1.0)
    # After the last first token, at 1.5: tokens at 2.0 and 2.5.
    assert figures["decode_tokens_per_s"] == 2.0


def test_one_token_has_no_decode_rate():
    assert decode_rate([[1.0]]) is None


class Clock:
    """Time that moves when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("cpu.protocol.time", clock)
    return clock


class Counting:
    """Gives every running request a token in each step of a second, and remembers how many ran at once."""

    def __init__(self, clock, per_step=1):
        self.clock, self.running, self.most, self.per_step = clock, {}, 0, per_step

    def add(self, index, prompt, num_output):
        self.running[index] = num_output
        self.most = max(self.most, len(self.running))

    def step(self):
        self.clock.sleep(1.0)
        changed = [(index, min(self.per_step, left)) for index, left in self.running.items()]
        self.running = {i: left - self.per_step for i, left in self.running.items() if left > self.per_step}
        return changed


def asked(*shapes):
    return [{"prompt": [1], "num_output": count, "arrival_s": arrival} for count, arrival in shapes]


def test_requests_are_added_when_they_arrive(clock):
    engine = Counting(clock)
    answered = answer(engine, asked((2, 0.0), (4, 1.5), (1, 1.5), (1, 9.0)))
    assert answered["token_s"] == [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [3.0], [10.0]]
    assert answered["wall_s"] == 10.0
    assert engine.most == 2


def test_several_tokens_of_one_step_have_one_time(clock):
    assert answer(Counting(clock, per_step=2), asked((3, 0.0)))["token_s"] == [[1.0, 1.0, 2.0]]


class Batches:
    """Takes a second for the first token and one for each other."""

    def __init__(self, clock, missing=0):
        self.clock, self.sizes, self.missing = clock, [], missing

    def answer(self, prompts, num_outputs):
        self.sizes.append(len(prompts))
        begin = self.clock.now
        self.clock.sleep(max(num_outputs))
        return [[begin + 1.0 + i for i in range(count - self.missing)] for count in num_outputs]


def test_batches_take_what_came_meanwhile(clock):
    batches = Batches(clock)
    answered = answer(batches, asked((2, 0.0), (1, 0.5), (3, 2.0), (1, 30.0)))
    assert batches.sizes == [1, 2, 1]
    assert answered["token_s"] == [[1.0, 2.0], [3.0], [3.0, 4.0, 5.0], [31.0]]


def test_a_batch_with_too_few_tokens_is_an_error(clock):
    with pytest.raises(RuntimeError, match="1 tokens in place of 2"):
        answer(Batches(clock, missing=1), asked((2, 0.0)))


# Processes


def test_a_process_answers_and_is_measured(fake):
    with started(fake) as process:
        assert process.wait_ready(60)["versions"] == {"fake": "1"}
        answered = process.ask(workloads()["eight"].requests, 60)
        assert [len(times) for times in answered["token_s"]] == [32] * 8
        assert process.session.cpu_s() > 0
        assert process.session.peak_bytes() > 2**20
        assert len(process.session.processes()) == 1
    assert process.session.processes() == []


@pytest.mark.parametrize(("behave", "said"), [("refuse", "ValueError: no such scheme"), ("die", "SIGILL")])
def test_a_process_that_fails_says_why(fake, behave, said):
    with started(fake, behave) as process, pytest.raises(PeerError, match=said):
        process.wait_ready(60)


def test_a_process_that_hangs_is_given_up_and_ended(fake, monkeypatch):
    with started(fake, "hang") as process:
        with pytest.raises(PeerError, match=r"no answer within 0\.2 s"):
            process.wait_ready(0.2)
        monkeypatch.setattr("cpu.process.END_S", 0.1)
    assert process.session.processes() == []


# Environments


def recipe(check):
    return {"peer": {"install": [], "check": check}}


def test_an_environment_is_made_once_and_again_when_its_recipe_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "recipes", lambda: recipe("import json"))
    environments.prepare(tmp_path, "peer")
    assert environments.python_of(tmp_path, "peer").exists()
    assert "pip" in environments.installed(tmp_path, "peer")
    with monkeypatch.context() as patch:
        patch.setattr(environments, "_run", lambda command, variables: pytest.fail(f"ran {command}"))
        environments.prepare(tmp_path, "peer")
    monkeypatch.setattr(environments, "recipes", lambda: recipe("import no_such_module"))
    with pytest.raises(PeerError, match="No module named 'no_such_module'"):
        environments.prepare(tmp_path, "peer")
    with pytest.raises(PeerError, match="no_such_module"):
        environments.prepare(tmp_path, "peer")


def test_weights_that_cannot_be_made_leave_nothing_behind(tmp_path, monkeypatch):
    failing = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w'); sys.exit('out of memory')"]
    monkeypatch.setattr(engines, "_converter", lambda folder, engine, model, target: [*failing, str(target)])
    with pytest.raises(PeerError, match="'dense' could not be made: out of memory"):
        engines.prepare_weights(tmp_path, engines.engine("zif-bf16"), "dense")
    assert list((tmp_path / "models").iterdir()) == []
