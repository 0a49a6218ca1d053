"""Core's sampler over the operators of kernels: the tokens of the array library, in few transfers and kernels."""

import math

import numpy as np
import pytest
import torch

from support.sampling import SampledBatch, SampledRequest
from zif.contract import DrawOptions, OpTable, SamplingParams
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.launch import Recorder
from zif.kernels.ops import KernelOps
from zif.kernels.sampling import columns_on_device
from zif.kernels.tuning import Tuning
from zif.reference.ops import ReferenceOps

VOCAB_SIZE = 700
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3, "top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"temperature": 5.0, "top_p": 0.999},
    {"min_p": 0.1},
    {"temperature": 1.5, "min_p": 0.02, "top_k": 600, "top_p": 0.95},
    {"logprobs": 3},
    {"temperature": 0.0, "logprobs": 0, "repetition_penalty": 1.3},
    {"logit_bias": {5: 100.0}},
]


class CountingOps(KernelOps):
    """Kernels in the interpreter, and the options of each call."""

    def __init__(self):
        super().__init__(InterpretedLauncher())
        self.calls = []

    def choose_tokens(self, logits, options):
        self.calls.append(options)
        return super().choose_tokens(logits, options)


def requests_of(options):
    return [SampledRequest(SamplingParams(**one), seed=seed) for seed, one in enumerate(options)]


def logits_of(rows, seed=0):
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def sampled(ops, options, logits):
    return SampledBatch(requests_of(options), VOCAB_SIZE, ops=ops).sample(logits)


def test_tokens_log_probabilities_and_faults_are_those_of_the_array_library():
    logits = logits_of(2 * len(OPTIONS))
    logits[3, 7], logits[5, :], logits[8, 9] = math.nan, -math.inf, math.inf
    ops = CountingOps()
    ours, theirs = sampled(ops, 2 * OPTIONS, logits), sampled(None, 2 * OPTIONS, logits)
    assert len(ops.calls) == 1
    assert (ours.faults, ours.logprobs) == (theirs.faults, theirs.logprobs)
    assert sorted(ours.faults) == [3, 5, 8]
    for index, (token, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        assert token == other or index in ours.faults


def test_rows_that_take_the_most_likely_token_have_temperature_zero():
    ops = CountingOps()
    sampled(ops, [{"temperature": 0.0}, {"temperature": 0.5}, {"temperature": 1e-6}], logits_of(3))
    (options,) = ops.calls
    assert options.temperature.tolist() == [0.0, 0.5, 0.0]
    assert [getattr(options, name).dtype.name for name in options.__slots__] == [
        *("float32", "float32", "int64", "float64", "int64")
    ]


def test_an_answer_of_none_leaves_the_choice_to_the_array_library():
    logits = logits_of(len(OPTIONS))
    assert OpTable.choose_tokens(ReferenceOps(), logits, None) is None
    assert sampled(ReferenceOps(), OPTIONS, logits) == sampled(None, OPTIONS, logits)


def test_batches_without_a_draw_start_the_kernels_of_the_most_likely_token_only():
    names = []
    for temperature in (0.0, 1.0):
        recorder = Recorder(Tuning.read())
        columns = [np.full(3, temperature, np.float32), np.zeros(3, np.float32), np.full(3, 9), np.ones(3)]
        options = DrawOptions(*columns, fractions=np.zeros(3, np.int64))
        KernelOps(recorder).choose_tokens(logits_of(3), options)
        names.append({kind.name for kind in recorder.recorded})
    greedy, drawn = names
    assert greedy < drawn
    assert "survey_tiles" in drawn - greedy


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 64])
def test_columns_go_to_the_device_as_they_are_and_aligned(num_rows):
    draw = np.random.default_rng(num_rows)
    options = DrawOptions(
        temperature=draw.random(num_rows, dtype=np.float32),
        min_p=draw.random(num_rows, dtype=np.float32),
        top_k=draw.integers(1, 1 << 40, num_rows),
        top_p=draw.random(num_rows),
        fractions=draw.integers(0, 1 << 62, num_rows),
    )
    columns = columns_on_device(options, torch.device("cpu"))
    for name in options.__slots__:
        column = getattr(columns, name)
        assert np.array_equal(column.numpy(), getattr(options, name))
        assert column.numpy().dtype == getattr(options, name).dtype
        assert column.data_ptr() % 16 == 0
    assert len({getattr(columns, name).untyped_storage().data_ptr() for name in options.__slots__}) == 1
