"""The reference operators against their definitions in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zif.contract import Activation, ExpertWeights, RouterOutput, Routing
from zif.reference.ops import ReferenceOps

OPS = ReferenceOps()
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCES)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: torch.Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(ours.double().numpy(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    x, weight, bias = random(5, 8, dtype=dtype), random(3, 8, dtype=dtype, seed=1), random(3, dtype=dtype, seed=2)
    exact = x.double().numpy() @ weight.double().numpy().T
    assert_near(OPS.linear(x, weight, None), exact, dtype)
    assert_near(OPS.linear(x, weight, bias), exact + bias.double().numpy(), dtype)


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> np.ndarray:
    wide = x.double().numpy()
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * (weight.double().numpy() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(4, 16), (4, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(16, dtype=dtype, seed=1)
    assert_near(OPS.rms_norm(x, weight, 1e-5, offset), exact_rms_norm(x, weight, 1e-5, offset), dtype)


def test_rms_norm_squares_in_float32() -> None:
    x = torch.full((1, 8), 500.0, dtype=torch.float16)
    assert torch.equal(OPS.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6, 0.0), torch.ones_like(x))


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(OPS.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, 0.0), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_normalizes_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = random(4, 16, dtype=dtype), random(4, 16, dtype=dtype, seed=1), random(16, seed=2).to(dtype)
    total = (x + residual).clone()
    output = OPS.add_rms_norm(x, residual, weight, 1e-6, 1.0)
    assert torch.equal(output.residual, total)
    assert_near(output.normed, exact_rms_norm(total, weight, 1e-6, 1.0), dtype)


def exact_rotation(heads: torch.Tensor, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Multiply pairs, as complex numbers, by e^(i angle)."""
    rotated, half = heads.double().numpy().copy(), angles.shape[1]
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + 1 if interleaved else first + half
    turned = (rotated[..., first] + 1j * rotated[..., second]) * np.exp(1j * angles)[:, None, :]
    rotated[..., first], rotated[..., second] = turned.real, turned.imag
    return rotated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [2, 4])
def test_rotate(half: int, interleaved: bool, dtype: torch.dtype) -> None:
    query, key = random(5, 4, 8, dtype=dtype), random(5, 2, 8, dtype=dtype, seed=1)
    angles = random(5, half, seed=2)
    expected = [exact_rotation(heads, angles.double().numpy(), interleaved) for heads in (query, key)]
    rotated = OPS.rotate(query, key, angles.cos(), angles.sin(), interleaved)
    assert_near(rotated.query, expected[0], dtype)
    assert_near(rotated.key, expected[1], dtype)


def test_rotate_takes_heads_inside_a_wider_row() -> None:
    fused = random(5, 3 * 8)
    query, key = fused[:, :16].view(5, 2, 8), fused[:, 16:].view(5, 1, 8)
    angles = random(5, 4, seed=1)
    rotated = OPS.rotate(query, key, angles.cos(), angles.sin(), False)
    apart = OPS.rotate(query.clone(), key.clone(), angles.cos(), angles.sin(), False)
    assert torch.equal(rotated.query, apart.query)
    assert torch.equal(rotated.key, apart.key)


def exact_activation(gate_up: torch.Tensor, activation: Activation) -> np.ndarray:
    gate, up = np.split(gate_up.double().numpy(), 2, axis=-1)
    if activation == Activation.SWIGLU_CLAMPED:
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    if activation == Activation.SILU:
        return gate / (1 + np.exp(-gate)) * up
    if activation == Activation.GELU:
        return gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
def test_gated_activation(activation: Activation, dtype: torch.dtype) -> None:
    gate_up = random(6, 20, dtype=dtype) * 6
    assert_near(OPS.gated_activation(gate_up, activation), exact_activation(gate_up, activation), dtype)


@pytest.mark.parametrize("columns", [1, 3, 5, 21])
@pytest.mark.parametrize("activation", Activation)
def test_an_odd_width_has_no_gate_for_each_up(activation: Activation, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} columns"):
        OPS.gated_activation(random(6, columns), activation)
    with pytest.raises(ValueError, match=f"{columns} columns"):
        OPS.gated_linear(random(6, 4), random(columns, 4), None, activation)


def exact_routing(logits: np.ndarray, count: int, routing: Routing) -> tuple[list[int], list[float]]:
    """Route one token by the definition."""
    chosen = sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:count]
    weights = np.exp(logits.astype(np.float64) - logits.max())
    if routing != Routing.TOPK_SOFTMAX:
        weights = weights / weights.sum()
    picked = weights[chosen]
    if routing != Routing.SOFTMAX_TOPK:
        picked = picked / picked.sum()
    return chosen, picked.tolist()


@given(
    values=st.lists(st.integers(-3, 3), min_size=4, max_size=9),
    count=st.integers(1, 4),
    routing=st.sampled_from(Routing),
)
@settings(max_examples=150, deadline=None)
def test_route_prefers_the_lowest_id_among_ties(values: list[int], count: int, routing: Routing) -> None:
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    routed = OPS.route(logits, count, routing)
    assert (routed.weights.dtype, routed.expert_ids.dtype) == (torch.float32, torch.int64)
    for row in range(2):
        expert_ids, weights = exact_routing(logits[row].numpy(), count, routing)
        assert routed.expert_ids[row].tolist() == expert_ids
        assert routed.weights[row].tolist() == pytest.approx(weights, rel=1e-5)


def random_experts(dtype: torch.dtype = torch.float32, biases: bool = True) -> ExpertWeights:
    """Five experts with C = 8 and I = 6."""
    return ExpertWeights(
        gate_up=random(5, 12, 8, dtype=dtype, seed=1),
        down=random(5, 8, 6, dtype=dtype, seed=2),
        gate_up_bias=random(5, 12, dtype=dtype, seed=3) if biases else None,
        down_bias=random(5, 8, dtype=dtype, seed=4) if biases else None,
    )


def exact_experts(x: torch.Tensor, experts: ExpertWeights, routed: RouterOutput, activation: Activation) -> np.ndarray:
    """Run token by token and expert by expert."""
    total = np.zeros(x.shape)
    for token in range(x.shape[0]):
        for share, expert in zip(routed.weights[token].tolist(), routed.expert_ids[token].tolist(), strict=True):
            hidden = experts.gate_up[expert].double() @ x[token].double()
            hidden = hidden if experts.gate_up_bias is None else hidden + experts.gate_up_bias[expert].double()
            out = experts.down[expert].double().numpy() @ exact_activation(hidden, activation)
            out = out if experts.down_bias is None else out + experts.down_bias[expert].double().numpy()
            total[token] += share * out
    return total


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.SWIGLU_CLAMPED])
def test_experts(activation: Activation, biases: bool) -> None:
    x, experts = random(7, 8), random_experts(biases=biases)
    routed = OPS.route(random(7, 5, seed=9), 2, Routing.SOFTMAX_TOPK_NORMALIZED)
    exact = exact_experts(x, experts, routed, activation)
    np.testing.assert_allclose(OPS.experts(x, experts, routed, activation).numpy(), exact, rtol=1e-4, atol=1e-4)


def test_experts_do_not_depend_on_the_other_tokens() -> None:
    x, experts = random(9, 8), random_experts()
    routed = OPS.route(random(9, 5, seed=9), 3, Routing.SOFTMAX_TOPK)
    together = OPS.experts(x, experts, routed, Activation.SILU)
    for token in range(9):
        row = slice(token, token + 1)
        alone = RouterOutput(routed.weights[row], routed.expert_ids[row])
        torch.testing.assert_close(OPS.experts(x[row], experts, alone, Activation.SILU), together[row])


def test_experts_of_no_tokens() -> None:
    routed = RouterOutput(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert OPS.experts(torch.zeros(0, 8), random_experts(), routed, Activation.SILU).shape == (0, 8)


def test_experts_run_only_when_chosen() -> None:
    x, experts = random(3, 8), random_experts(biases=False)
    experts.gate_up[4] = torch.nan
    routed = RouterOutput(torch.ones(3, 1), torch.tensor([[0], [2], [3]]))
    assert OPS.experts(x, experts, routed, Activation.SILU).isfinite().all()


@pytest.mark.parametrize("routing", Routing)
def test_nan_of_one_token_stays_with_it(routing: Routing) -> None:
    x, experts, logits = random(4, 8), random_experts(), random(4, 5, seed=9)
    clean = OPS.experts(x, experts, OPS.route(logits, 2, routing), Activation.SILU)
    x[1], logits[1] = torch.nan, torch.nan
    routed = OPS.route(logits, 2, routing)
    assert ((routed.expert_ids >= 0) & (routed.expert_ids < 5)).all()
    mixed = OPS.experts(x, experts, routed, Activation.SILU)
    assert mixed[1].isnan().all()
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(mixed[others], clean[others])
