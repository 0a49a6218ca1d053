"""State spaces against the recurrence in float64: one token at a time, packed, and both in turn."""

import math
from dataclasses import replace

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.state_slots import StateSlots
from zif.kernels.state_space import StateSpace, StateSpaceInputs, state_space_chunk, state_space_step
from zif.kernels.tuning import Tuning

LAUNCH = InterpretedLauncher()
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 1, 16, 16), (4, 2, 40, 24), (2, 1, 32, 128)]
"""Heads, groups, dimension of a head, size of its state."""


def recurrence(inputs, space, state, slots, lengths):
    """Return outputs and states of the module's formula, float64."""
    x, dt, b, c = (rows.double() for rows in (inputs.x, inputs.dt, inputs.b, inputs.c))
    shared = x.shape[1] // b.shape[1]
    b, c = b.repeat_interleave(shared, 1), c.repeat_interleave(shared, 1)
    dt = dt if space.dt_bias is None else dt + space.dt_bias.double()
    dt = torch.nn.functional.softplus(dt) if space.dt_softplus else dt
    dt = dt.clamp(space.dt_min, space.dt_max)
    out, states, token = torch.zeros_like(x), state.double().clone(), 0
    for request, length in enumerate(lengths):
        read, write = int(slots.read[request]), int(slots.write[request])
        s = torch.zeros(state.shape[1:], dtype=torch.float64) if read < 0 else state[read].double()
        for t in range(token, token + length):
            s = torch.exp(dt[t] * space.a.double())[:, None, None] * s
            s = s + (dt[t, :, None] * x[t])[:, :, None] * b[t, :, None, :]
            out[t] = (s * c[t, :, None, :]).sum(2)
        token += length
        if write >= 0:
            states[write] = s
    out = out if space.skip is None else out + space.skip.double()[:, None] * x
    return out if inputs.gate is None else out * torch.nn.functional.silu(inputs.gate.double()), states


def case(dtype, lengths, shape, bare=False):
    torch.manual_seed(sum(lengths))
    heads, groups, dim, size = shape
    tokens = sum(lengths)
    x, gate = torch.randn(2, tokens, heads, dim).to(dtype)
    b, c = torch.randn(2, tokens, groups, size).div(math.sqrt(size) / 2).to(dtype)
    dt = torch.randn(tokens, heads).to(dtype)
    a, skip, bias = -torch.rand(heads) * 4, torch.randn(heads), torch.randn(heads)
    inputs = StateSpaceInputs(x, dt.abs() if bare else dt, b, c, None if bare else gate)
    space = StateSpace(a, dt_softplus=False) if bare else StateSpace(a, skip, bias)
    state = torch.randn(len(lengths) + 2, heads, dim, size)
    slots = torch.randperm(len(lengths) + 2)[: len(lengths)]
    start = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return inputs, space, state, StateSlots(slots, slots.clone()), start


def rows_of(inputs, chosen):
    fields = ("x", "dt", "b", "c", "gate")
    return StateSpaceInputs(*(None if (rows := getattr(inputs, f)) is None else rows[chosen] for f in fields))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bare", [True, False])
def test_a_step_equals_the_recurrence(dtype, shape, bare):
    inputs, space, state, slots, _ = case(dtype, [1, 1, 1], shape, bare)
    expected, states = recurrence(inputs, space, state, slots, [1, 1, 1])
    out = state_space_step(LAUNCH, inputs, space, state, slots)
    torch.testing.assert_close(out.double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(state.double(), states, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [40, 0, 2]])
@pytest.mark.parametrize("bare", [True, False])
def test_chunks_equal_the_recurrence(dtype, shape, lengths, bare):
    inputs, space, state, slots, start = case(dtype, lengths, shape, bare)
    expected, states = recurrence(inputs, space, state, slots, lengths)
    out = state_space_chunk(LAUNCH, inputs, space, state, slots, start)
    torch.testing.assert_close(out.double(), expected, rtol=CLOSE[dtype], atol=4 * CLOSE[dtype])
    torch.testing.assert_close(state.double(), states, rtol=CLOSE[dtype], atol=4 * CLOSE[dtype])


def test_the_chunks_of_devices_equal_the_recurrence():
    lengths = [63, 64, 65, 130]
    inputs, space, state, slots, start = case(torch.float32, lengths, (2, 1, 32, 16))
    expected, states = recurrence(inputs, space, state, slots, lengths)
    out = state_space_chunk(InterpretedLauncher(Tuning.read()), inputs, space, state, slots, start)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), states, rtol=1e-4, atol=1e-3)


def test_steps_equal_chunks_and_chunks_resume():
    lengths = [20, 20]
    inputs, space, state, slots, start = case(torch.float32, lengths, (2, 2, 16, 16))
    whole, stepped, resumed = state.clone(), state.clone(), state.clone()
    expected = state_space_chunk(LAUNCH, inputs, space, whole, slots, start).unflatten(0, (2, 20))
    rows = [state_space_step(LAUNCH, rows_of(inputs, [t, 20 + t]), space, stepped, slots) for t in range(20)]
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(stepped, whole, rtol=2e-5, atol=2e-5)
    for part in (range(17), range(17, 20)):
        chosen = [*part, *(20 + t for t in part)]
        starts = torch.tensor([0, len(part), 2 * len(part)], dtype=torch.int32)
        got = state_space_chunk(LAUNCH, rows_of(inputs, chosen), space, resumed, slots, starts)
        torch.testing.assert_close(got.unflatten(0, (2, -1)), expected[:, part], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(resumed, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 18, 2]])
def test_fresh_requests_see_no_state_and_other_slots_are_left(lengths):
    inputs, space, state, _, start = case(torch.float32, lengths, (2, 1, 16, 16))
    slots = StateSlots(torch.tensor([-1, 4, 2]), torch.tensor([0, 1, -1]))
    state[[0, 1, 3]] = torch.nan
    expected, states = recurrence(inputs, space, state, slots, lengths)
    runs = [lambda s: state_space_chunk(LAUNCH, inputs, space, s, slots, start)]
    runs += [lambda s: state_space_step(LAUNCH, inputs, space, s, slots)] if lengths == [1, 1, 1] else []
    for run in runs:
        after = state.clone()
        torch.testing.assert_close(run(after).double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(after.double(), states, rtol=2e-5, atol=2e-5, equal_nan=True)
        assert torch.equal(after[[2, 4]], state[[2, 4]])


def test_nan_stays_with_its_request():
    inputs, space, state, slots, start = case(torch.float32, [3, 20, 2], (2, 1, 16, 16))
    inputs.x[21] = torch.nan
    out = state_space_chunk(LAUNCH, inputs, space, state, slots, start)
    assert out[21].isnan().all()
    assert out[[*range(19), 23, 24]].isfinite().all()


def test_dt_is_clamped_and_large_dt_survives_softplus():
    inputs, space, state, slots, start = case(torch.float32, [4], (2, 1, 16, 16))
    inputs.dt[:2] = torch.tensor([[-100.0, 100.0], [30.0, 0.0]])
    space = replace(space, dt_min=0.1, dt_max=2.0)
    expected, states = recurrence(inputs, space, state, slots, [4])
    out = state_space_chunk(LAUNCH, inputs, space, state, slots, start)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), states, rtol=2e-5, atol=2e-5)


def test_a_strong_decay_forgets_without_overflow():
    inputs, space, state, slots, start = case(torch.float32, [40], (2, 1, 16, 16), bare=True)
    space = replace(space, a=torch.tensor([-500.0, -1e-6]))
    expected, states = recurrence(inputs, space, state, slots, [40])
    out = state_space_chunk(LAUNCH, inputs, space, state, slots, start)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(state.double(), states, rtol=2e-5, atol=2e-4)


def test_inputs_and_slots_may_be_strided():
    lengths, (heads, groups, dim, size) = [5, 17], (2, 1, 16, 16)
    inputs, space, state, slots, start = case(torch.float32, lengths, (heads, groups, dim, size))
    parts = (inputs.x.flatten(1), inputs.b.flatten(1), inputs.c.flatten(1), inputs.gate.flatten(1), inputs.dt)
    fused = torch.cat(parts, 1)
    x, b, c, gate, dt = fused.split([part.shape[1] for part in parts], 1)
    b, c = b.unflatten(1, (groups, size)), c.unflatten(1, (groups, size))
    strided = StateSpaceInputs(x.unflatten(1, (heads, dim)), dt, b, c, gate.unflatten(1, (heads, dim)))
    arena = torch.zeros(state.shape[0], state[0].numel() + 7)
    home = arena[:, 3:-4].unflatten(1, state.shape[1:])
    home.copy_(state)
    expected = state_space_chunk(LAUNCH, inputs, space, state, slots, start)
    assert torch.equal(state_space_chunk(LAUNCH, strided, space, home, slots, start), expected)
    assert torch.equal(home, state)
    one, where = [0, 5], slots
    expected = state_space_step(LAUNCH, rows_of(inputs, one), space, state, where)
    assert torch.equal(state_space_step(LAUNCH, rows_of(strided, one), space, home, where), expected)


def test_no_tokens():
    inputs, space, state, slots, start = case(torch.float32, [], (2, 1, 16, 16))
    assert state_space_step(LAUNCH, inputs, space, state, slots).shape == (0, 2, 16)
    assert state_space_chunk(LAUNCH, inputs, space, state, slots, start).shape == (0, 2, 16)


def test_bad_arguments_are_named():
    inputs, space, state, slots, start = case(torch.float32, [2], (4, 2, 16, 16))
    bad = torch.zeros(2, 3, 16)
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        state_space_chunk(LAUNCH, replace(inputs, b=bad, c=bad), space, state, slots, start)
    with pytest.raises(ValueError, match=r"dt is \(2, 3\)"):
        state_space_chunk(LAUNCH, replace(inputs, dt=torch.zeros(2, 3)), space, state, slots, start)
    with pytest.raises(ValueError, match="skip of shape"):
        state_space_chunk(LAUNCH, inputs, replace(space, skip=torch.zeros(3)), state, slots, start)
    with pytest.raises(ValueError, match="for 2 requests"):
        state_space_step(LAUNCH, inputs, space, state, slots)
    with pytest.raises(ValueError, match="each slot must be dense"):
        state_space_chunk(LAUNCH, inputs, space, state[:, :2], slots, start)
    with pytest.raises(ValueError, match=r"must be \[T, H, P\]"):
        state_space_step(LAUNCH, inputs, space, state[0], slots)
