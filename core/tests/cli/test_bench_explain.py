"""`zif bench` and `zif explain` end to end, on the platform that computes nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zif.cli.bench import percentile
from zif.cli.main import main

_MODEL = str(Path(__file__).resolve().parents[3] / "examples" / "embedded_model" / "checkpoint")
_NULL = ["--platform", "null", "--kv-bytes", "1MiB"]
_SMALL = ["--input-len", "8", "--output-len", "4"]


def test_throughput_ends_with_one_line_of_json(capsys):
    assert main(["bench", "throughput", _MODEL, *_NULL, *_SMALL, "--num-prompts", "3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num_requests"], result["input_len"], result["output_len"]) == (3, 8, 4)
    assert result["requests_per_s"] == pytest.approx(3 / result["seconds"])
    assert result["input_tokens_per_s"] == pytest.approx(24 / result["seconds"])
    assert result["output_tokens_per_s"] == pytest.approx(12 / result["seconds"])


def test_latency_ends_with_one_line_of_json(capsys):
    assert main(["bench", "latency", _MODEL, *_NULL, *_SMALL, "--batch-size", "2", "--repeats", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("time_to_first_token_s", "time_per_output_token_s"):
        assert 0 < result[f"{name}_median"] <= result[f"{name}_p90"]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_covers_the_share(values, share):
    result = percentile(values, share)
    covered = [sum(v <= candidate for v in values) for candidate in (result, *[v for v in values if v < result])]
    assert covered[0] >= share * len(values)
    assert all(count < share * len(values) for count in covered[1:])


def test_explain_shows_every_part_of_the_plan(capsys):
    assert main(["explain", _MODEL, *_NULL]) == 0
    shown = capsys.readouterr().out
    for part in ("LlamaForCausalLM", "platform   null", "attention.full", "16", "weights", "KV", "zif.null.runner"):
        assert part in shown


def test_explain_shows_the_dtype_of_kv(capsys):
    assert main(["explain", _MODEL, *_NULL, "--kv-cache-dtype", "float16"]) == 0
    shown = capsys.readouterr().out.splitlines()
    titles = next(line for line in shown if "tokens per block" in line)
    row = shown[shown.index(titles) + 1]
    assert row[titles.index("dtype") :].split()[0] == "float16"


@pytest.mark.parametrize(("quantization", "schemes"), [("int8", ["W8A8"]), ("int4", ["W8A8", "W4A16 in groups of 32"])])
def test_explain_shows_what_weights_are_rounded_to(quantization, schemes, capsys):
    assert main(["explain", _MODEL, *_NULL, "--quantization", quantization]) == 0
    shown = capsys.readouterr().out
    assert ", ".join(["bfloat16", *(f"weights {scheme}" for scheme in schemes)]) in shown
    assert "quantization.w8a8" in shown
    assert main(["explain", _MODEL, *_NULL, "--quantization", quantization, "--json"]) == 0
    rounded = json.loads(capsys.readouterr().out)
    assert (rounded["model"]["quantization"], rounded["model"]["weight_schemes"]) == (quantization, schemes)
    assert main(["explain", _MODEL, *_NULL, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert rounded["memory"]["weight_bytes"] < 0.55 * plain["memory"]["weight_bytes"]
    assert plain["model"]["weight_schemes"] == []


def test_explain_shows_that_results_do_not_depend_on_the_batch(capsys):
    assert main(["explain", _MODEL, *_NULL, "--batch-invariant"]) == 0
    assert ", batch-invariant\n" in capsys.readouterr().out
    assert main(["explain", _MODEL, *_NULL, "--batch-invariant", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_invariant"] is True
    assert main(["explain", _MODEL, *_NULL]) == 0
    assert "batch-invariant" not in capsys.readouterr().out


def test_explain_as_json_adds_up(capsys):
    assert main(["explain", _MODEL, *_NULL, "--max-model-len", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (group,) = plan["kv"]["groups"]
    num_blocks = plan["kv"]["slab_bytes"] * (plan["kv"]["num_slabs"] - 1) // group["layout"]["block_bytes"]
    blocks_per_request = 64 // group["spec"]["block_size"]
    assert plan["kv"]["max_concurrency"] == pytest.approx(num_blocks / blocks_per_request)
    assert plan["memory"]["kv_bytes"] == 2**20
    assert plan["config"]["max_model_len"] == 64


@pytest.mark.parametrize("as_json", [False, True])
def test_a_refusal_has_its_reasons_and_exit_code_1(as_json, capsys):
    options = ["--platform", "null", "--memory-limit", "1MiB", "--kv-bytes", "64KiB", "--block-size", "512"]
    assert main(["explain", _MODEL, *options, *(["--json"] if as_json else [])]) == 1
    shown = capsys.readouterr().out
    reasons = json.loads(shown)["refused"] if as_json else shown
    assert "block size 512" in reasons
    assert "available 1.00 MiB" in reasons


def test_a_model_that_is_not_there_is_an_error(capsys):
    assert main(["explain", "/nowhere/model", *_NULL]) == 1
    assert "/nowhere/model" in capsys.readouterr().err
