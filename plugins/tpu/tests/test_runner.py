"""The runner on XLA: the same text, no compilation after warm-up, one transfer a step, the cache updated in place."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zif import LLM, SamplingParams
from zif.errors import EngineError, RequestError

SMALL = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "dtype": "float32",
    "kv_bytes": 1 << 24,
}
PROMPTS = ["Return a list of", "Raise an error", "The first", "def run(self", "A" * 90, "value"]


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, platform="tpu", **SMALL) as opened:
        yield opened


def _runner(llm):
    return llm._engine._parts.runner


def _texts(llm, prompts, sampling):
    return [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_text_is_the_cpu_plugins(model, dtype):
    sampling, settings = SamplingParams(max_tokens=40, temperature=0.0), {**SMALL, "dtype": dtype}
    with LLM(model, platform="cpu", **settings) as other:
        expected = _texts(other, PROMPTS, sampling)
    with LLM(model, platform="tpu", **settings) as opened:
        got = _texts(opened, PROMPTS, sampling)
    if dtype == "float32":
        assert got == expected
    else:  # rounding may decide between two tokens; it must not for most
        assert sum(a == b for a, b in zip(got, expected, strict=True)) >= len(PROMPTS) // 2


def test_drawn_text_is_the_cpu_plugins(model, llm):
    sampling = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, seed=5)
    with LLM(model, platform="cpu", **SMALL) as other:
        assert _texts(llm, PROMPTS, sampling) == _texts(other, PROMPTS, sampling)


def _mixed_sampling(chance):
    """Return options of every kind of path: greedy, drawn, on the host with log-probabilities or rules."""
    options = {"max_tokens": chance.randint(8, 40), "ignore_eos": True, "temperature": chance.choice([0.0, 0.7, 1.3])}
    options |= chance.choice(
        [{}, {}, {"top_p": 0.9, "top_k": 20}, {"logprobs": 3}, {"logit_bias": {7: 2.0}}, {"repetition_penalty": 1.2}]
    )
    return SamplingParams(seed=chance.randrange(1000), **options)


def test_a_thousand_steps_of_mixed_traffic_compile_nothing_and_transfer_once_each(llm, monkeypatch):
    import torch_xla.debug.metrics as metrics

    chance = random.Random(1)
    runner, counted = _runner(llm), []
    submit = runner.submit

    def counting(step):
        before = _transfers(metrics)
        future = submit(step)
        counted.append(_transfers(metrics) - before)
        return future

    monkeypatch.setattr(runner, "submit", counting)
    compilations = _count(metrics, "CompileTime")
    fallbacks = {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}
    while len(counted) < 1000:
        prompts = [
            {"prompt_token_ids": [chance.randrange(1, 300) for _ in range(chance.choice([1, 3, 17, 40, 100, 150]))]}
            for _ in range(12)
        ]
        outputs = llm.generate(prompts, [_mixed_sampling(chance) for _ in prompts], use_tqdm=False)
        assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    assert _count(metrics, "CompileTime") == compilations
    assert max(counted) == 1
    assert {n: metrics.counter_value(n) for n in metrics.counter_names() if n.startswith("aten::")} == fallbacks


def _count(metrics, name):
    data = metrics.metric_data(name)
    return data[0] if data else 0


def _transfers(metrics):
    return _count(metrics, "TransferFromDeviceTime")


def test_logprobs_of_prompts_and_answers_are_those_of_the_cpu_plugin(model, llm):
    sampling = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, prompt_logprobs=2)
    with LLM(model, platform="cpu", **SMALL) as other:
        expected = other.generate(PROMPTS, sampling, use_tqdm=False)
    for got, wanted in zip(llm.generate(PROMPTS, sampling, use_tqdm=False), expected, strict=True):
        for ours, theirs in zip(got.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
            assert {i: v.logprob for i, v in ours.items()} == pytest.approx(
                {i: v.logprob for i, v in theirs.items()}, abs=1e-3
            )
        assert got.outputs[0].cumulative_logprob == pytest.approx(wanted.outputs[0].cumulative_logprob, abs=1e-3)


def test_speculation_and_lower_tiers_change_no_text(model, llm):
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    expected = _texts(llm, PROMPTS * 2, sampling)
    more = {"speculation": "ngram", "max_draft_tokens": 3, "host_kv_bytes": 1 << 24, "kv_bytes": 1 << 21}
    with LLM(model, platform="tpu", **{**SMALL, **more}) as opened:
        assert _texts(opened, PROMPTS * 2, sampling) == expected


def test_a_request_beyond_the_largest_shape_is_refused_with_the_limit(llm):
    with pytest.raises(RequestError, match="257 tokens and the context is 256"):
        llm.generate([{"prompt_token_ids": [1] * 257}], SamplingParams(max_tokens=1), use_tqdm=False)


def test_the_cache_is_updated_in_place_by_the_optimized_program(model, tmp_path):
    """In XLA's dump of optimized programs, the first parameter of each step is aliased with the first result."""
    code = (
        "from zif import LLM, SamplingParams\n"
        f"settings = {SMALL!r}\n"
        f"with LLM({model!r}, platform='tpu', **settings) as llm:\n"
        "    llm.generate(['Return'], SamplingParams(max_tokens=2, temperature=0.0), use_tqdm=False)\n"
    )
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    environment = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=300)
    programs = [path.read_text() for path in Path(tmp_path).glob("*after_optimizations.txt")]
    cache = _cache_shape(Path(model), SMALL["kv_bytes"])
    steps = [text for text in programs if f"-> ({cache}, " in text]
    assert len(steps) >= 4
    for text in steps:
        # The first result is the cache after the step: the header says which parameter has the same memory.
        alias = re.search(r"input_output_alias=\{ \{0\}: \((\d+), ", text.splitlines()[0])
        assert alias, text.splitlines()[0][:300]
        entry = text[text.index("ENTRY") :]
        assert re.search(rf"= {re.escape(cache)}\S* parameter\({alias[1]}\)", entry), alias[1]


def _cache_shape(model, kv_bytes):
    """Return how XLA writes the cache of the embedded model: [tokens of all layers, 2 * K, D]."""
    config = json.loads((model / "config.json").read_text())
    heads, dim = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    block_rows = config["num_hidden_layers"] * 16
    num_rows = kv_bytes // (block_rows * 2 * heads * dim * 4) * block_rows
    return f"f32[{num_rows},{2 * heads},{dim}]"


_TEXTS = """
import sys
from zif import LLM, SamplingParams
prompts = ["Return a list of", "Raise an error", "A" * 90]
for sampling in (SamplingParams(max_tokens=24, temperature=0.0), SamplingParams(max_tokens=8, seed=3, logprobs=2)):
    with LLM(MODEL, platform="tpu", tensor_parallel_size=int(sys.argv[1]), **SETTINGS) as llm:
        print([output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)])
"""


def _texts_of(model, tensor_parallel_size):
    code = _TEXTS.replace("MODEL", repr(model)).replace("SETTINGS", repr(SMALL))
    environment = {**os.environ, "CPU_NUM_DEVICES": "2"}
    command = [sys.executable, "-c", code, str(tensor_parallel_size)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_devices_together_give_the_text_of_one(model):
    one, two = (_texts_of(model, size) for size in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    assert len(one.stdout) > 100


def test_more_devices_than_there_are_is_refused(model):
    done = _texts_of(model, 4)
    assert done.returncode != 0
    assert "tensor_parallel_size=4 is neither 1 nor the 2 devices" in done.stderr


def test_a_shape_that_cannot_be_compiled_in_time_is_refused_and_the_engine_lives(model, monkeypatch):
    monkeypatch.setenv("ZIF_TPU_COMPILE_DEADLINE_S", "0.0001")
    settings = {**SMALL, "max_num_batched_tokens": 48, "kv_bytes": 1 << 23}
    with LLM(model, platform="tpu", **settings) as opened:
        for _ in range(2):
            outputs = opened.generate(PROMPTS[:2], SamplingParams(max_tokens=3), use_tqdm=False)
            assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
            for output in outputs:
                assert "no program for" in output.outputs[0].error
                assert "ZIF_TPU_COMPILE_DEADLINE_S" in output.outputs[0].error


def test_without_the_program_that_brings_logits_only_those_who_need_them_fail(model, monkeypatch):
    from zif_tpu import runner as module
    from zif_tpu.programs import CompilationError
    from zif_tpu.sampling import Choice

    compiled = module.XlaRunner._compiled

    def failing(self, key):
        if isinstance(key, tuple) and key[1] != Choice.DRAWN:
            raise CompilationError("XLA refused the program: out of order")
        return compiled(self, key)

    monkeypatch.setattr(module.XlaRunner, "_compiled", failing)
    plain = SamplingParams(max_tokens=6, temperature=0.0)
    with LLM(model, platform="tpu", **SMALL) as opened:
        for needs in ({"logprobs": 2}, {"prompt_logprobs": 1}, {"logit_bias": {5: 1.0}}):
            needing = SamplingParams(max_tokens=6, temperature=0.0, **needs)
            first, second = opened.generate(["Return a list of", "Raise an"], [plain, needing], use_tqdm=False)
            assert first.outputs[0].error is None
            assert len(first.outputs[0].token_ids) == 6
            assert "logits to the host" in second.outputs[0].error


def test_lower_tiers_whose_programs_fail_are_refused_with_the_reason(model, monkeypatch, caplog):
    from zif_tpu import blocks
    from zif_tpu.programs import CompilationError

    def failing(*_):
        raise CompilationError("out of order")

    monkeypatch.setattr(blocks, "compile_program", failing)
    with pytest.raises(EngineError, match="leave out host_kv_bytes"):
        LLM(model, platform="tpu", host_kv_bytes=1 << 22, **SMALL)
    assert "blocks stay on the device: no program copies them: out of order" in caplog.text


@pytest.mark.parametrize("broken", ["one width", "every chunk"])
def test_a_compilation_that_fails_is_served_by_a_larger_shape_or_refuses_its_requests(model, monkeypatch, broken):
    from zif_tpu import runner as module
    from zif_tpu.buckets import StepShape
    from zif_tpu.programs import CompilationError

    compiled = module.XlaRunner._compiled

    def failing(self, key):
        if isinstance(key, StepShape) and (key.width > 1 if broken == "every chunk" else key.width == 16):
            raise CompilationError("XLA refused the program: out of order")
        return compiled(self, key)

    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    with LLM(model, platform="cpu", **SMALL) as other:
        expected = _texts(other, ["Return a list of", "x"], sampling)
    monkeypatch.setattr(module.XlaRunner, "_compiled", failing)
    with LLM(model, platform="tpu", **SMALL) as opened:
        outputs = opened.generate(["Return a list of"], sampling, use_tqdm=False)
        if broken == "one width":
            assert outputs[0].outputs[0].text == expected[0]
        else:
            assert "out of order" in outputs[0].outputs[0].error
        # A prompt of one token is a step of width 1.
        single = opened.generate([{"prompt_token_ids": [5]}], sampling, use_tqdm=False)[0].outputs[0]
        assert single.finish_reason == "length"
