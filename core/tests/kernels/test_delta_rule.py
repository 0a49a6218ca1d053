"""The gated delta rule against the recurrence in float64: one token at a time, packed, and both in turn."""

from dataclasses import replace

import pytest
import torch

from zif.kernels.delta_rule import DeltaInputs, delta_rule_step
from zif.kernels.delta_rule_chunk import delta_rule_chunk
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.state_slots import StateSlots
from zif.kernels.tuning import Tuning

LAUNCH = InterpretedLauncher()
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 1, 16, 16), (2, 4, 24, 40), (1, 2, 64, 32)]
"""Key heads, value heads, dimensions of keys and values."""


def recurrence(inputs, state, slots, lengths):
    """Return outputs and states of the module's formula, float64."""
    q, k, v, g, beta = (rows.double() for rows in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    if inputs.normalize:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q, k))
    out, states, token = torch.zeros_like(v), state.double().clone(), 0
    for request, length in enumerate(lengths):
        read, write = int(slots.read[request]), int(slots.write[request])
        s = torch.zeros(state.shape[1:], dtype=torch.float64) if read < 0 else state[read].double()
        for t in range(token, token + length):
            s = s * g[t].exp()[:, None, None]
            change = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", s, k[t]))
            s = s + torch.einsum("hk,hv->hkv", k[t], change)
            out[t] = inputs.scale * torch.einsum("hkv,hk->hv", s, q[t])
        token += length
        if write >= 0:
            states[write] = s
    return out, states


def case(dtype, lengths, shape, normalize=True):
    torch.manual_seed(sum(lengths))
    key_heads, heads, key, value = shape
    tokens = sum(lengths)
    q, k = torch.randn(2, tokens, key_heads, key).to(dtype)
    k = k if normalize else (k / k.float().norm(dim=-1, keepdim=True)).to(dtype)
    v = torch.randn(tokens, heads, value).to(dtype)
    g, beta = -torch.rand(tokens, heads), torch.rand(tokens, heads).to(dtype)
    state = torch.randn(len(lengths) + 2, heads, key, value)
    slots = torch.randperm(len(lengths) + 2)[: len(lengths)]
    start = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return DeltaInputs(q, k, v, g, beta, key**-0.5, normalize), state, StateSlots(slots, slots.clone()), start


def rows_of(inputs, chosen):
    return replace(inputs, **{name: getattr(inputs, name)[chosen] for name in ("q", "k", "v", "g", "beta")})


def assert_close(got, expected, close):
    torch.testing.assert_close(got.double(), expected.double(), rtol=close, atol=close)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_equals_the_recurrence(dtype, shape, normalize):
    inputs, state, slots, _ = case(dtype, [1, 1, 1], shape, normalize)
    expected, states = recurrence(inputs, state, slots, [1, 1, 1])
    out = delta_rule_step(LAUNCH, inputs, state, slots)
    assert out.dtype == dtype
    assert_close(out, expected, CLOSE[dtype])
    assert_close(state, states, 2e-5)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [40, 0, 2]])
@pytest.mark.parametrize("normalize", [True, False])
def test_chunks_equal_the_recurrence(dtype, shape, lengths, normalize):
    inputs, state, slots, start = case(dtype, lengths, shape, normalize)
    expected, states = recurrence(inputs, state, slots, lengths)
    out = delta_rule_chunk(LAUNCH, inputs, state, slots, start)
    assert out.dtype == dtype
    assert_close(out, expected, CLOSE[dtype])
    assert_close(state, states, CLOSE[dtype])


def test_the_chunks_of_devices_equal_the_recurrence():
    lengths = [31, 32, 33, 65]
    inputs, state, slots, start = case(torch.float32, lengths, (1, 2, 32, 32))
    expected, states = recurrence(inputs, state, slots, lengths)
    out = delta_rule_chunk(InterpretedLauncher(Tuning.read()), inputs, state, slots, start)
    assert_close(out, expected, 2e-5)
    assert_close(state, states, 2e-5)


def test_steps_equal_chunks_and_chunks_resume():
    inputs, state, slots, start = case(torch.float32, [20, 20], (1, 2, 16, 16))
    whole, stepped, resumed = state.clone(), state.clone(), state.clone()
    expected = delta_rule_chunk(LAUNCH, inputs, whole, slots, start).unflatten(0, (2, 20))
    rows = [delta_rule_step(LAUNCH, rows_of(inputs, [t, 20 + t]), stepped, slots) for t in range(20)]
    assert_close(torch.stack(rows, 1), expected, 2e-5)
    assert_close(stepped, whole, 2e-5)
    for part in (range(17), range(17, 20)):
        starts = torch.tensor([0, len(part), 2 * len(part)], dtype=torch.int32)
        chosen = rows_of(inputs, [*part, *(20 + t for t in part)])
        got = delta_rule_chunk(LAUNCH, chosen, resumed, slots, starts)
        assert_close(got.unflatten(0, (2, -1)), expected[:, part], 2e-5)
    assert_close(resumed, whole, 2e-5)


@pytest.mark.parametrize("chunk", [16, 64])
def test_repeated_keys_that_are_kept_for_ever(chunk):
    # The hardest system to solve: everything under the diagonal is one.
    launch = LAUNCH if chunk == 16 else InterpretedLauncher(Tuning.read())
    inputs, state, slots, start = case(torch.float32, [chunk + 3], (1, 1, 16, 16), normalize=False)
    inputs.k[:], inputs.g[:], inputs.beta[:] = inputs.k[0].clone(), 0.0, 1.0
    expected, states = recurrence(inputs, state, slots, [chunk + 3])
    assert_close(delta_rule_chunk(launch, inputs, state, slots, start), expected, 2e-5)
    assert_close(state, states, 2e-5)


def test_a_strong_decay_forgets_without_overflow():
    inputs, state, slots, start = case(torch.float32, [40], (1, 2, 16, 16))
    inputs.g[:, 0] = -200.0
    expected, states = recurrence(inputs, state, slots, [40])
    assert_close(delta_rule_chunk(LAUNCH, inputs, state, slots, start), expected, 2e-5)
    assert_close(state, states, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keys_and_queries_of_zero_are_no_division(dtype):
    inputs, state, slots, start = case(dtype, [5], (1, 1, 16, 16))
    inputs.k[1], inputs.q[2] = 0.0, 0.0
    inputs.v[:] *= 100
    expected, states = recurrence(inputs, state, slots, [5])
    assert_close(delta_rule_chunk(LAUNCH, inputs, state, slots, start), expected, 30 * CLOSE[dtype])
    assert_close(state, states, 30 * CLOSE[dtype])


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 18, 2]])
def test_fresh_requests_see_no_state_and_other_slots_are_left(lengths):
    inputs, state, _, start = case(torch.float32, lengths, (1, 2, 16, 16))
    slots = StateSlots(torch.tensor([-1, 4, 2]), torch.tensor([0, 1, -1]))
    state[[0, 1, 3]] = torch.nan
    expected, states = recurrence(inputs, state, slots, lengths)
    runs = [lambda s: delta_rule_chunk(LAUNCH, inputs, s, slots, start)]
    runs += [lambda s: delta_rule_step(LAUNCH, inputs, s, slots)] if lengths == [1, 1, 1] else []
    for run in runs:
        after = state.clone()
        assert_close(run(after), expected, 2e-5)
        torch.testing.assert_close(after.double(), states, rtol=2e-5, atol=2e-5, equal_nan=True)
        assert torch.equal(after[[2, 4]], state[[2, 4]])


def test_nan_stays_with_its_request():
    inputs, state, slots, start = case(torch.float32, [3, 20, 2], (1, 2, 16, 16))
    inputs.v[20] = torch.nan
    out = delta_rule_chunk(LAUNCH, inputs, state, slots, start)
    assert out[20].isnan().all()
    assert out[[*range(19), 23, 24]].isfinite().all()


def test_inputs_and_slots_may_be_strided_and_rows_behind_the_last_request_are_allowed():
    inputs, state, slots, start = case(torch.float32, [5, 17], (1, 2, 16, 16))
    parts = [getattr(inputs, name).flatten(1) for name in ("q", "k", "v", "g", "beta")]
    fused = torch.cat((torch.cat(parts, 1), torch.full((3, sum(p.shape[1] for p in parts)), torch.nan)))
    q, k, v, g, beta = fused.split([part.shape[1] for part in parts], 1)
    shaped = (q.unflatten(1, (1, 16)), k.unflatten(1, (1, 16)), v.unflatten(1, (2, 16)))
    strided = DeltaInputs(*shaped, g, beta, inputs.scale)
    arena = torch.zeros(state.shape[0], state[0].numel() + 7)
    home = arena[:, 3:-4].unflatten(1, state.shape[1:])
    home.copy_(state)
    expected = delta_rule_chunk(LAUNCH, inputs, state, slots, start)
    assert torch.equal(delta_rule_chunk(LAUNCH, strided, home, slots, start)[:22], expected)
    assert torch.equal(home, state)
    expected = delta_rule_step(LAUNCH, rows_of(inputs, [0, 5]), state, slots)
    strided = DeltaInputs(*(rows[::5][:2] for rows in (*shaped, g, beta)), inputs.scale)
    assert torch.equal(delta_rule_step(LAUNCH, strided, home, slots), expected)


def test_no_tokens():
    inputs, state, slots, start = case(torch.float32, [], (1, 2, 16, 16))
    assert delta_rule_step(LAUNCH, inputs, state, slots).shape == (0, 2, 16)
    assert delta_rule_chunk(LAUNCH, inputs, state, slots, start).shape == (0, 2, 16)


def test_bad_arguments_are_named():
    inputs, state, slots, start = case(torch.float32, [2], (2, 4, 16, 16))
    bad = torch.zeros(2, 3, 16)
    with pytest.raises(ValueError, match="4 value heads cannot share 3 key heads"):
        delta_rule_chunk(LAUNCH, replace(inputs, q=bad, k=bad), state, slots, start)
    with pytest.raises(ValueError, match=r"beta is \(2, 3\)"):
        delta_rule_chunk(LAUNCH, replace(inputs, beta=torch.zeros(2, 3)), state, slots, start)
    with pytest.raises(ValueError, match="for 2 requests"):
        delta_rule_step(LAUNCH, inputs, state, slots)
    with pytest.raises(ValueError, match="each slot must be dense"):
        delta_rule_chunk(LAUNCH, inputs, state.mT, slots, start)
    with pytest.raises(ValueError, match=r"must be \[T, Hk, K\]"):
        delta_rule_step(LAUNCH, replace(inputs, k=inputs.k[0]), state, slots)
