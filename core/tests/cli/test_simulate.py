"""`zif simulate`: results on standard output, misuse refused by name."""

import json
from pathlib import Path

import pytest

from zif.cli.main import main
from zif.kv import PagedBlockManager

ROOT = Path(__file__).parents[3]
TRACE = ROOT / "examples/traffic/trace.jsonl"
MODEL = ROOT / "examples/embedded_model/checkpoint"


def test_random_traffic_prints_what_it_met(capsys):
    assert main(["simulate", "--seed", "3", "--steps", "800", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)
    assert totals["num_steps"] == 800
    assert totals["num_tokens"] > 100
    assert main(["simulate", "--seed", "3", "--steps", "800", "--faults", "none"]) == 0
    assert "no promise was broken" in capsys.readouterr().out


def test_a_broken_promise_ends_with_an_error_and_the_command_to_repeat_it(capsys, monkeypatch):
    monkeypatch.setattr(PagedBlockManager, "release", lambda self, request: None)
    assert main(["simulate", "--faults", "none"]) == 1
    assert "replay with: zif simulate --seed 0 --steps" in capsys.readouterr().err


def test_a_trace_is_replayed_over_plain_blocks_and_over_a_model(capsys, tmp_path):
    plot = tmp_path / "plot.html"
    assert main(["simulate", "--trace", str(TRACE), "--kv-blocks", "200", "--plot", str(plot), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_requests"] == len(TRACE.read_text().splitlines())
    assert 0.2 < report["hit_rate"] < 0.9
    assert plot.read_text().startswith("<!doctype html>")
    assert main(["simulate", "--trace", str(TRACE), "--model", str(MODEL), "--kv-bytes", "8MiB"]) == 0
    assert "prefix hit rate" in capsys.readouterr().out


def test_limits_reach_the_engine(capsys):
    def report(*options):
        assert main(["simulate", "--trace", str(TRACE), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    base = report()
    assert report("--no-enable-prefix-caching")["hit_rate"] == 0
    assert report("--max-num-seqs", "1")["queue_p99_s"] > base["queue_p99_s"]
    assert report("--max-num-batched-tokens", "16")["num_steps"] > base["num_steps"]
    assert report("--max-model-len", "600")["num_refused"] > base["num_refused"] == 0
    assert report("--scheduling-policy", "priority")["num_requests"] == base["num_requests"]
    assert report("--block-size", "256", "--kv-blocks", "256")["cached_tokens"] < base["cached_tokens"]
    assert report("--steps", "5")["num_steps"] == 5
    slow = ["--step-ms", "80", "--token-us", "400", "--context-token-ns", "2000"]
    for option in range(0, len(slow), 2):
        assert report(*slow[option : option + 2])["duration_s"] > base["duration_s"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--plot", "x.html"], "--plot needs --trace"),
        (["--kv-blocks", "5"], "--kv-blocks needs --trace"),
        (["--faults", "fire@1"], "POINT@N"),
        (["--trace", str(TRACE), "--workers", "2"], "--workers does not go with --trace"),
        (["--trace", str(TRACE), "--plot", "x.png"], "rasterizer"),
        (["--trace", str(TRACE), "--kv-bytes", "4MiB"], "--kv-bytes needs --model"),
        (["--trace", str(TRACE), "--model", str(MODEL)], "--kv-bytes 4GiB"),
        (["--trace", str(TRACE), "--model", str(MODEL), "--kv-bytes", "many"], "no number of bytes"),
        (["--trace", str(ROOT / "absent")], "cannot be read"),
    ],
)
def test_misuse_is_refused(capsys, options, complaint):
    assert main(["simulate", *options]) == 2
    assert complaint in capsys.readouterr().err
