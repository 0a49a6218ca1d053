"""Causal convolution against a token-by-token sum in float64: outputs and states, one token at a time and packed."""

import pytest
import torch

from zif.contract import Activation
from zif.kernels.convolution import Convolution, convolution_chunk, convolution_step
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.state_slots import StateSlots, token_requests

LAUNCH = InterpretedLauncher()
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def expected_of(x, convolution, state, slots, lengths):
    """Return outputs and states, as float64: every token sees its request's history, oldest input first."""
    weight = convolution.weight.double()
    width, kept = weight.shape[1], state.shape[2]
    out, states, first = [], state.double().clone(), 0
    for request, length in enumerate(lengths):
        read, write = int(slots.read[request]), int(slots.write[request])
        history = torch.zeros(x.shape[1], kept).double() if read < 0 else state[read].double()
        history = torch.cat((torch.zeros(x.shape[1], width).double(), history), 1)
        for row in x[first : first + length].double():
            history = torch.cat((history, row[:, None]), 1)
            y = (history[:, -width:] * weight).sum(1)
            y = y if convolution.bias is None else y + convolution.bias.double()
            out.append(y if convolution.activation is None else torch.nn.functional.silu(y))
        first += length
        if write >= 0:
            states[write] = history[:, -kept:]
    return torch.stack(out) if out else x.double(), states


def case(dtype, lengths, channels, width, kept, slots=None):
    torch.manual_seed(sum(lengths) + width)
    requests = len(lengths)
    x = torch.randn(sum(lengths), channels).to(dtype)
    state = torch.randn(requests + 3, channels, kept).to(dtype)
    read = torch.randperm(requests + 3)[:requests].int()
    slots = slots or StateSlots(read, read.clone())
    start = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return x, state, slots, start


def made(dtype, channels, width, plain):
    weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
    return Convolution(weight) if plain else Convolution(weight, bias, Activation.SILU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "width", "kept"), [(1, 2, 1), (65, 3, 2), (70, 4, 4), (64, 4, 3), (5, 7, 8)])
@pytest.mark.parametrize("plain", [True, False])
def test_a_step_equals_the_sum(dtype, channels, width, kept, plain):
    x, state, slots, _ = case(dtype, [1] * 3, channels, width, kept)
    convolution = made(dtype, channels, width, plain)
    expected, states = expected_of(x, convolution, state, slots, [1] * 3)
    got = convolution_step(LAUNCH, x, convolution, state, slots)
    torch.testing.assert_close(got.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert torch.equal(state.double(), states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [2, 1, 0, 3, 20]])
@pytest.mark.parametrize(("channels", "width", "kept"), [(65, 2, 1), (70, 4, 4), (64, 4, 3), (3, 6, 7)])
def test_a_chunk_equals_the_sum(dtype, lengths, channels, width, kept):
    x, state, slots, start = case(dtype, lengths, channels, width, kept)
    convolution = made(dtype, channels, width, plain=width == 2)
    expected, states = expected_of(x, convolution, state, slots, lengths)
    got = convolution_chunk(LAUNCH, x, convolution, state, slots, start)
    torch.testing.assert_close(got.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert torch.equal(state.double(), states)


def test_steps_equal_a_chunk():
    x, state, slots, start = case(torch.float32, [5, 5], 33, 4, 4)
    convolution = made(torch.float32, 33, 4, plain=False)
    stepped = state.clone()
    rows = [convolution_step(LAUNCH, x[[i, 5 + i]], convolution, stepped, slots) for i in range(5)]
    got = convolution_chunk(LAUNCH, x, convolution, state, slots, start)
    torch.testing.assert_close(torch.stack(rows, 1).flatten(0, 1), got)
    assert torch.equal(stepped, state)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 6, 1]])
def test_fresh_requests_see_no_state_and_other_slots_are_left(lengths):
    slots = StateSlots(torch.tensor([-1, 4, 2]), torch.tensor([0, 5, -1]))
    x, state, slots, start = case(torch.float32, lengths, 9, 4, 4, slots)
    state[[0, 1, 3, 5]] = torch.nan
    convolution = made(torch.float32, 9, 4, plain=False)
    expected, states = expected_of(x, convolution, state, slots, lengths)
    runs = [lambda s: convolution_chunk(LAUNCH, x, convolution, s, slots, start)]
    runs += [lambda s: convolution_step(LAUNCH, x, convolution, s, slots)] if lengths == [1, 1, 1] else []
    for run in runs:
        after = state.clone()
        torch.testing.assert_close(run(after).double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(after.double(), states, rtol=0, atol=0, equal_nan=True)


def test_an_input_that_the_kernel_does_not_reach_may_be_nan():
    x, state, slots, start = case(torch.float32, [1, 1], 4, 3, 5)
    state[..., :3] = torch.nan
    assert convolution_step(LAUNCH, x, made(torch.float32, 4, 3, True), state.clone(), slots).isfinite().all()
    assert convolution_chunk(LAUNCH, x, made(torch.float32, 4, 3, True), state, slots, start).isfinite().all()


def test_nan_stays_with_its_request():
    x, state, slots, start = case(torch.float32, [3, 4, 2], 4, 4, 4)
    x[3] = torch.nan
    out = convolution_chunk(LAUNCH, x, made(torch.float32, 4, 4, True), state, slots, start)
    assert out[3:7].isnan().all()
    assert out[[0, 1, 2, 7, 8]].isfinite().all()


def test_inputs_and_slots_may_be_strided_and_rows_behind_the_last_request_are_zero():
    x, _, slots, start = case(torch.float32, [4, 3], 8, 4, 4)
    fused = torch.full((9, 24), torch.nan)
    fused[:7, 8:16] = x
    arena = torch.randn(5, 50)
    state = arena[:, 9:41].view(5, 8, 4)
    convolution = made(torch.float32, 8, 4, plain=False)
    expected, states = expected_of(x, convolution, state, slots, [4, 3])
    before = arena.clone()
    out = convolution_chunk(LAUNCH, fused[:, 8:16], convolution, state, slots, start)
    torch.testing.assert_close(out[:7].double(), expected, rtol=2e-6, atol=2e-6)
    assert out[7:].eq(0).all()
    assert torch.equal(state.double(), states)
    assert torch.equal(arena[:, :9], before[:, :9])
    assert torch.equal(arena[:, 41:], before[:, 41:])


def test_no_tokens():
    x, state, slots, start = case(torch.float32, [], 8, 4, 4)
    convolution = made(torch.float32, 8, 4, plain=True)
    assert convolution_chunk(LAUNCH, x, convolution, state, slots, start).shape == (0, 8)
    assert convolution_step(LAUNCH, x, convolution, state, slots).shape == (0, 8)


def test_tokens_know_their_requests():
    assert token_requests(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 7).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_bad_arguments_are_named():
    x, state, slots, start = case(torch.float32, [2, 2], 8, 4, 2)
    with pytest.raises(ValueError, match="state of 2 inputs; a kernel of width 4 needs 3"):
        convolution_chunk(LAUNCH, x, made(torch.float32, 8, 4, True), state, slots, start)
    with pytest.raises(ValueError, match="must be dense, for 8 channels"):
        convolution_chunk(LAUNCH, x, made(torch.float32, 9, 3, True), state, slots, start)
    with pytest.raises(ValueError, match="for 4 requests"):
        convolution_step(LAUNCH, x, made(torch.float32, 8, 3, True), state, slots)
    with pytest.raises(ValueError, match="each slot must be dense"):
        convolution_chunk(LAUNCH, x, made(torch.float32, 8, 3, True), state.mT.contiguous().mT, slots, start)
    with pytest.raises(ValueError, match="may be None or SILU"):
        convolution_chunk(LAUNCH, x, Convolution(torch.ones(8, 3), None, Activation.GELU), state, slots, start)
