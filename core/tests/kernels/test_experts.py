"""Experts against the executable specification: grouping, every activation, order of sums, ids that do not exist."""

import math

import pytest
import torch

from zif.contract import Activation, ExpertWeights, RouterOutput
from zif.kernels.experts import check_expert_ids, experts, group_pairs
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.tuning import LaunchConfig, Rule, Tuning
from zif.reference.ops import ReferenceOps

ERRORS = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
"""Three roundings to the dtype: gate and up, what they give, the expert's output; and that of the sum."""
SIZES = [(1, 1, 1, 1, 1), (5, 3, 2, 16, 8), (9, 4, 4, 40, 24), (70, 8, 3, 33, 96), (0, 3, 2, 8, 8)]
"""Tokens, experts, those of a token, channels, inner size."""


def _launcher(rows=16, pairs=16, columns=32, **tiles):
    """Return a launcher with small tiles, so that there are several of everything."""

    def rule(**sizes):
        return [Rule((), LaunchConfig(tuple(sizes.items())))]

    linear = {"COLUMNS": 16, "INNER": 16, "GROUP": 2, "DIES": 1} | tiles
    grouping = rule(ROWS=rows, PAIRS=pairs)
    combine = rule(COLUMNS=columns)
    return InterpretedLauncher(Tuning([{"group_pairs": grouping, "expert_linear": rule(**linear), "combine": combine}]))


def _draw(num_tokens, num_experts, num_chosen, channels, inner, dtype=torch.float32, biased=True):
    torch.manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    gate_up = normal(num_experts, 2 * inner, channels, scale=channels**-0.5)
    down = normal(num_experts, channels, inner, scale=inner**-0.5)
    biases = (normal(num_experts, 2 * inner), normal(num_experts, channels)) if biased else ()
    ids = torch.rand(num_tokens, num_experts).argsort(-1)[:, :num_chosen].contiguous()
    shares = torch.rand(num_tokens, num_chosen)
    return normal(num_tokens, channels), ExpertWeights(gate_up, down, *biases), RouterOutput(shares, ids)


def _double(weights):
    arrays = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return ExpertWeights(*(None if array is None else array.double() for array in arrays))


def _check(got, x, weights, routed, activation):
    expected = ReferenceOps().experts(x.double(), _double(weights), routed, activation)
    assert got.dtype == x.dtype
    size = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=ERRORS[x.dtype], atol=ERRORS[x.dtype] * size)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_reference(dtype, size, biased):
    x, weights, routed = _draw(*size, dtype, biased)
    got = experts(InterpretedLauncher(), x, weights, routed, Activation.SILU)
    _check(got, x, weights, routed, Activation.SILU)


def test_many_experts():
    arguments = (*_draw(10, 130, 8, 48, 16, torch.bfloat16), Activation.SILU)
    _check(experts(InterpretedLauncher(), *arguments), *arguments)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation(dtype, activation):
    x, weights, routed = _draw(7, 4, 2, 32, 24, dtype)
    x *= 4  # some gates beyond the clamp
    got = experts(_launcher(), x, weights, routed, activation)
    _check(got, x, weights, routed, activation)
    rounded = ReferenceOps().experts(x, weights, routed, activation)
    same = (got == rounded).double().mean()
    assert dtype == torch.float32 or same > 0.6, "intermediate results are rounded as the reference rounds them"


@pytest.mark.parametrize("tiles", [{"rows": 32}, {"pairs": 64}, {"GROUP": 1}, {"GROUP": 5, "DIES": 4}, {"INNER": 64}])
def test_any_tiles_in_any_order(tiles):
    arguments = (*_draw(37, 5, 3, 40, 24), Activation.GELU)
    _check(experts(_launcher(**tiles), *arguments), *arguments)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("num_tokens", [1, 6, 50])
def test_groups_hold_each_pair_once_with_its_expert(rows, num_tokens):
    torch.manual_seed(0)
    ids = torch.rand(num_tokens, 20).argsort(-1)[:, :3].contiguous()
    ids[0, 0] = 19
    groups = group_pairs(_launcher(rows=rows), ids, 20)
    tiles = groups.pairs.view(-1, rows)
    used = groups.tile_experts >= 0
    assert int(used.sum()) == sum(-(-int(count) // rows) for count in torch.bincount(ids.flatten()))
    assert not used[int(used.sum()) :].any(), "tiles that are not there come last"
    found = tiles[used]
    assert torch.equal(found[found >= 0].sort().values, torch.arange(3 * num_tokens, dtype=torch.int32))
    for pairs, expert in zip(found, groups.tile_experts[used], strict=True):
        assert (ids.flatten()[pairs[pairs >= 0].long()] == expert).all()


def test_all_tokens_may_choose_the_same_expert():
    x, weights, routed = _draw(40, 6, 2, 16, 16)
    routed.expert_ids[:] = torch.tensor([5, 0])
    _check(experts(_launcher(), x, weights, routed, Activation.SILU), x, weights, routed, Activation.SILU)


def test_a_sum_does_not_depend_on_other_tokens_or_the_order_of_ids():
    x, weights, routed = _draw(30, 6, 4, 32, 24, torch.bfloat16)
    launch = InterpretedLauncher()
    together = experts(launch, x, weights, routed, Activation.SILU, batch_invariant=True)
    for rows in (slice(0, 1), slice(7, 9), slice(3, 30)):
        part = RouterOutput(routed.weights[rows], routed.expert_ids[rows])
        alone = experts(launch, x[rows], weights, part, Activation.SILU, batch_invariant=True)
        assert torch.equal(alone, together[rows])
    turned = RouterOutput(routed.weights.flip(1), routed.expert_ids.flip(1))
    assert torch.equal(experts(launch, x, weights, turned, Activation.SILU, batch_invariant=True), together)


def test_sums_are_in_float32_and_in_the_order_of_ids():
    """1e8 + 1 - 1e8 is 0 in float32 in the order of ids, and 1 in others, whatever the order of the choices."""
    weights = ExpertWeights(torch.zeros(3, 2, 1), torch.zeros(3, 1, 1), None, torch.tensor([[1e8], [1.0], [-1e8]]))
    for ids in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        routed = RouterOutput(torch.ones(1, 3), torch.tensor([ids]))
        assert experts(_launcher(), torch.ones(1, 1), weights, routed, Activation.SILU) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_stays_in_its_row(value):
    x, weights, routed = _draw(20, 4, 2, 32, 24, torch.float16)
    clean = experts(_launcher(), x, weights, routed, Activation.SWIGLU_CLAMPED)
    for row in (0, 9):
        x[row, 5] = value
    dirty = experts(_launcher(), x, weights, routed, Activation.SWIGLU_CLAMPED)
    others = [row for row in range(20) if row not in (0, 9)]
    assert torch.equal(dirty[others], clean[others])
    if math.isnan(value):
        assert dirty[[0, 9]].isnan().all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**31, -(2**31), 2**40, 2**32 + 1])
def test_experts_that_do_not_exist_contribute_nothing(wrong):
    x, weights, routed = _draw(20, 4, 2, 32, 24)
    shares = routed.weights.clone()
    shares[3, 0], shares[7] = 0, 0
    expected = experts(_launcher(), x, weights, RouterOutput(shares, routed.expert_ids), Activation.SILU)
    routed.expert_ids[3, 0], routed.expert_ids[7] = wrong, wrong
    assert torch.equal(experts(_launcher(), x, weights, routed, Activation.SILU), expected)
    with pytest.raises(ValueError, match="must be from 0 to 3"):
        check_expert_ids(routed.expert_ids, 4)


def test_ids_that_exist_are_accepted():
    check_expert_ids(torch.tensor([[0, 3]]), 4)
    check_expert_ids(torch.empty(0, 2, dtype=torch.int64), 4)


def test_rows_of_all_arguments_may_be_strided():
    x, weights, routed = _draw(6, 3, 2, 32, 16)

    def wide(array):
        spread = torch.full((*array.shape[:-1], array.shape[-1] + 16), math.nan).to(array.dtype)
        spread[..., : array.shape[-1]] = array
        return spread[..., : array.shape[-1]]

    biases = wide(weights.gate_up_bias), wide(weights.down_bias)
    strided = ExpertWeights(wide(weights.gate_up), wide(weights.down), *biases)
    chosen = RouterOutput(wide(routed.weights), torch.cat((routed.expert_ids, -routed.expert_ids), 1)[:, :2])
    got = experts(_launcher(), wide(x), strided, chosen, Activation.SILU)
    assert torch.equal(got, experts(_launcher(), x, weights, routed, Activation.SILU))


def test_arguments_that_do_not_fit_are_refused():
    x, weights, routed = _draw(6, 3, 2, 32, 16)
    ids, shares = routed.expert_ids, routed.weights
    biases = weights.gate_up_bias, weights.down_bias

    def refused(message, x=x, weights=weights, routed=routed):
        with pytest.raises(ValueError, match=message):
            experts(_launcher(), x, weights, routed, Activation.SILU)

    refused("gate_up", x=x[:, 1:])
    refused("gate_up", weights=ExpertWeights(weights.gate_up[:, 2:], weights.down))
    refused("gate_up_bias", weights=ExpertWeights(weights.gate_up, weights.down, biases[0][1:], biases[1]))
    refused("down_bias", weights=ExpertWeights(weights.gate_up, weights.down, biases[0], biases[1][:, 1:]))
    refused("must be .* of torch.float16", x=x.half())
    refused("float64", x=x.double())
    refused("stride", x=x.repeat(1, 2)[:, ::2])
    refused("expert_ids", routed=RouterOutput(shares, ids[1:]))
    refused("expert_ids", routed=RouterOutput(shares[:, 1:], ids))
    refused("torch.int64", routed=RouterOutput(shares, ids.int()))
