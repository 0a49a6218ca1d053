"""L2: every operator of the contract, by dtype and shape: values, special values, ties, bad input."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zif.contract import Activation, Device, ExpertWeights, Feature, RouterOutput, Routing
from zif_conformance.gates import borders, exact, guarded, hold, ratio, scaling, specials, ulp
from zif_conformance.marks import Safety, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.operator_cases import OperatorCase, Runs, operator_cases
from zif_conformance.oracle.operators import declared_run, device_run, exact_run, results_of
from zif_conformance.suite.operator_calls import REFUSALS, by_dtype

CASES = operator_cases()
PLAIN = [case for case in CASES if case.operator not in ("route", "experts")]
EXPERTS = [case for case in CASES if case.operator in ("route", "experts")]
STRIDED = [case for case in PLAIN if "0x" not in case.name]


def by_case(found: list[OperatorCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=lambda case: case.case_id)


@conforms(level="L2", gate="G3", clause=("9.1", "9.3", "9.10"))
@by_dtype
@by_case(PLAIN)
def test_value(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    _check_value(device, dtype, case, record_gate)


@conforms(level="L2", gate="G3", clause=("9.1", "9.3", "9.4"), claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@by_case(EXPERTS)
def test_expert_value(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    _check_value(device, dtype, case, record_gate)


@conforms(level="L2", gate="G1", clause="9.2", negative=True, safety=Safety.MEMORY)
@by_dtype
@by_case(PLAIN)
def test_nothing_around_arguments_is_written(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    _check_untouched(device, dtype, case, record_gate)


@conforms(
    level="L2", gate="G1", clause="9.2", negative=True, safety=Safety.MEMORY, claims=(Feature.MIXTURE_OF_EXPERTS,)
)
@by_dtype
@by_case(EXPERTS)
def test_nothing_around_expert_arguments_is_written(
    device: Device, dtype: str, case: OperatorCase, record_gate: Any
) -> None:
    _check_untouched(device, dtype, case, record_gate)


@conforms(level="L2", gate="G5", clause="9.1")
@by_dtype
def test_error_of_a_product_grows_slowly(device: Device, dtype: str, record_gate: Any) -> None:
    results = {}
    for inner in borders(64, 4096):
        draw = Inputs(dtype, inner)
        x, weight = draw.normal(32, inner), draw.normal(64, inner, scale=inner**-0.5)
        runs = _runs(device, "linear", (x, weight, None))
        # The order of the sum is open: a few products in a single order are too lucky a sample.
        declared = [*runs.declared, *declared_run("linear", x.flip(1), weight.flip(1), None)]
        results[inner] = ratio(runs.got[0], runs.exact[0], declared, f"inner size {inner}")
    hold(record_gate, scaling(results))


@conforms(level="L2", gate="G6", clause=("9.1", "9.10"), negative=True)
@by_dtype
@pytest.mark.parametrize(
    "operator", ["linear", "gated_linear", "rms_norm", "add_rms_norm", "rotate", "gated_activation"]
)
def test_nan_stays_in_its_row(device: Device, dtype: str, operator: str, record_gate: Any) -> None:
    draw = Inputs(dtype)
    rows = draw.normal(6, 4, 32) if operator == "rotate" else draw.normal(6, 32)
    clean = _device_run(device, operator, *_arguments_of(operator, rows, Inputs(dtype, 1)))
    rows[2].view(-1)[3], rows[4].view(-1)[0] = math.nan, math.inf
    dirty = _device_run(device, operator, *_arguments_of(operator, rows, Inputs(dtype, 1)))
    expected = exact_run(operator, *_arguments_of(operator, rows, Inputs(dtype, 1)))
    others = [0, 1, 3, 5]
    for before, after, wanted in zip(clean, dirty, expected, strict=True):
        hold(record_gate, exact(after[others], before[others], f"{operator}: rows without NaN"))
        if len(after) == len(rows):
            hold(record_gate, specials(after[[2, 4]], wanted[[2, 4]].to(after.dtype), operator))


@conforms(level="L2", gate="G6", clause="9.1", negative=True, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
def test_nan_stays_in_its_row_of_experts(device: Device, dtype: str, record_gate: Any) -> None:
    def arguments(value: float) -> tuple[object, ...]:
        draw = Inputs(dtype)
        x, gate_up, down = draw.normal(4, 16), draw.normal(3, 16, 16), draw.normal(3, 16, 8)
        x[1, 5] = value
        routed = RouterOutput(torch.full((4, 2), 0.5), torch.tensor([[0, 1], [0, 1], [1, 2], [0, 2]]))
        return x, ExpertWeights(gate_up, down), routed, Activation.SILU

    (clean,), (dirty,) = (_device_run(device, "experts", *arguments(value)) for value in (1.0, math.nan))
    hold(record_gate, exact(dirty[[0, 2, 3]], clean[[0, 2, 3]], "rows without NaN"))
    assert dirty[1].isnan().all(), "a NaN in a row was swallowed"


@conforms(level="L2", gate="G6", clause="9.1", negative=True)
@by_dtype
@pytest.mark.parametrize("activation", list(Activation))
def test_special_values_of_activations(device: Device, dtype: str, activation: Activation, record_gate: Any) -> None:
    # A gate of -inf is left out: the limit is 0, the product of its factors NaN, and both are in use.
    gate_up = Inputs(dtype).special(16, 64)
    gate_up[:, :32] = gate_up[:, :32].nan_to_num(nan=math.nan, posinf=math.inf, neginf=-1.0).clamp(-1e4, 1e4)
    gate_up[:, 32:] = gate_up[:, 32:].clamp(-1e3, 1e3)
    (got,) = _device_run(device, "gated_activation", gate_up, activation)
    (wanted,) = exact_run("gated_activation", gate_up, activation)
    hold(record_gate, specials(got, wanted.to(got.dtype), activation.value))


@conforms(level="L2", gate="G6", clause="9.1", negative=True)
@by_dtype
def test_norm_of_zeros_and_tiny_values(device: Device, dtype: str, record_gate: Any) -> None:
    tiny = torch.finfo(Inputs(dtype).dtype).tiny
    rows = torch.stack([torch.zeros(32), -torch.zeros(32), torch.full((32,), tiny), torch.full((32,), 1e-3)])
    arguments = (rows.to(Inputs(dtype).dtype), torch.ones(32, dtype=Inputs(dtype).dtype), 1e-6, 0.0)
    (got,), (wanted,) = _device_run(device, "rms_norm", *arguments), exact_run("rms_norm", *arguments)
    hold(record_gate, specials(got, wanted.to(got.dtype), "rms_norm"))
    assert (got[:2] == 0).all(), "the norm of zeros is zero"


@conforms(level="L2", gate="G1", clause="9.4", negative=True, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("num_experts", [8, 33, 129])
def test_ties_go_to_the_lowest_expert(
    device: Device, dtype: str, routing: Routing, num_experts: int, record_gate: Any
) -> None:
    draw = Inputs(dtype)
    logits = draw.integers(0, 3, 32, num_experts).to(draw.dtype)  # three different values only
    got, wanted = _device_run(device, "route", logits, 5, routing), exact_run("route", logits, 5, routing)
    hold(record_gate, exact(got[1], wanted[1], "expert ids"))


@conforms(level="L2", gate="G6", clause="9.4", negative=True, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@pytest.mark.parametrize("routing", list(Routing))
def test_large_logits_do_not_overflow(device: Device, dtype: str, routing: Routing, record_gate: Any) -> None:
    logits = Inputs(dtype).normal(9, 33) + 2000.0 * torch.tensor([1.0, -1.0, 1.0] * 3)[:, None].to(Inputs(dtype).dtype)
    got, wanted = _device_run(device, "route", logits, 4, routing), exact_run("route", logits, 4, routing)
    hold(record_gate, exact(got[1], wanted[1], "expert ids"), ulp(got[0], wanted[0], 16 + 33))


@conforms(level="L2", gate="G1", clause="9.1", claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
def test_tokens_and_experts_are_not_mixed_up(device: Device, dtype: str, record_gate: Any) -> None:
    """Expert e multiplies by 2 to the e, exactly, so that a wrong expert, token or share shows in the bits."""
    draw = Inputs(dtype)
    x = draw.integers(1, 5, 9, 8).to(draw.dtype)
    gate_up = torch.zeros(4, 16, 8, dtype=draw.dtype)
    gate_up[:, 8:] = torch.eye(8, dtype=draw.dtype)
    down = torch.stack([torch.eye(8, dtype=draw.dtype) * 2.0**e for e in range(4)])
    bias = torch.zeros(4, 16, dtype=draw.dtype)
    bias[:, :8] = 64.0  # the gate: its sigmoid is 1, and 64 is a power of two
    ids = torch.tensor([[token % 4, (token + 1 + token // 4) % 4] for token in range(9)])
    ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], (ids[:, 0] + 2) % 4, ids[:, 1])
    shares = torch.tensor([0.75, 0.25]).repeat(9, 1)
    weights = ExpertWeights(gate_up, down, bias, torch.zeros(4, 8, dtype=draw.dtype))
    (got,) = _device_run(device, "experts", x, weights, RouterOutput(shares, ids), Activation.SILU)
    factors = (shares.double() * 2.0 ** ids.double()).sum(-1, keepdim=True)
    hold(record_gate, exact(got, (x.double() * 64 * factors).to(draw.dtype), "outputs"))


@conforms(level="L2", gate="G3", clause="9.3", claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
def test_small_shares_of_experts_are_not_lost(device: Device, dtype: str, record_gate: Any) -> None:
    """One expert gives much, 16 others each too little to count beside it in a 16-bit sum."""
    draw = Inputs(dtype)
    gate_up = torch.cat((torch.full((17, 8, 8), 8.0), torch.eye(8).expand(17, -1, -1)), dim=1).to(draw.dtype)
    down = torch.eye(8).repeat(17, 1, 1) / 64  # what a gate of 64 gives
    down[0] *= 2.0 / max(torch.finfo(draw.dtype).eps, 2.0**-10)
    weights = ExpertWeights(gate_up, down.to(draw.dtype))
    routed = RouterOutput(torch.ones(5, 17), torch.arange(17).repeat(5, 1))
    arguments = (torch.ones(5, 8, dtype=draw.dtype), weights, routed, Activation.SILU)
    runs = _runs(device, "experts", arguments)
    hold(record_gate, ratio(runs.got[0], runs.exact[0], [runs.declared[0]], "outputs"))


@conforms(level="L2", gate="G0", clause="9.1")
@by_dtype
@pytest.mark.parametrize("place", [0, 1, 63, 64, 511, 512])
def test_one_element_carries_a_product(device: Device, dtype: str, place: int, record_gate: Any) -> None:
    """All inputs are 0 but one column: a product that drops or repeats a column is wrong by all of its value."""
    draw = Inputs(dtype)
    x, weight = torch.zeros(5, 513, dtype=draw.dtype), draw.normal(7, 513)
    x[:, place] = draw.signs(5)
    (got,) = _device_run(device, "linear", x, weight, None)
    hold(record_gate, exact(got, x[:, place, None] * weight[:, place], f"column {place}"))


@conforms(level="L2", clause=("9.1", "9.10"), negative=True)
@by_dtype
@pytest.mark.parametrize(
    ("operator", "spoil"),
    [
        ("linear", lambda a: (a[0], a[1][:, 1:], a[2])),
        ("linear", lambda a: (a[0], a[1], a[0].new_zeros(a[1].shape[0] + 1))),
        ("gated_linear", lambda a: (a[0], a[1][:, 1:], *a[2:])),
        ("gated_linear", lambda a: (*a[:2], a[2][2:], a[3])),
        ("gated_linear", lambda a: (a[0], a[1][1:], a[2][1:], a[3])),
        ("gated_linear", lambda a: (a[0], a[1][:3], a[2][:3], a[3])),
        ("rms_norm", lambda a: (a[0], a[1][1:], *a[2:])),
        ("add_rms_norm", lambda a: (a[0], a[1][1:], *a[2:])),
        ("add_rms_norm", lambda a: (a[0], a[1][:, 1:], *a[2:])),
        ("rotate", lambda a: (*a[:3], a[3][:, 1:], a[4])),
        ("rotate", lambda a: (*a[:2], a[2][1:], a[3][1:], a[4])),
        ("rotate", lambda a: (*a[:2], a[2].repeat(1, 4), a[3].repeat(1, 4), a[4])),
        ("gated_activation", lambda a: (a[0][:, 1:], *a[1:])),
        ("gated_activation", lambda a: (a[0][:, :3], *a[1:])),
    ],
    ids=[
        "inner-size",
        "bias-size",
        "gated-inner-size",
        "gated-bias-size",
        "odd-rows-of-gates",
        "three-rows-of-gates",
        "norm-weight",
        "residual-rows",
        "residual-columns",
        "sine-pairs",
        "angle-rows",
        "angle-pairs",
        "odd-width",
        "width-of-three",
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    device: Device, dtype: str, operator: str, spoil: Callable[[Any], tuple[object, ...]]
) -> None:
    arguments = _arguments_of(operator, Inputs(dtype).normal(6, 4, 32), Inputs(dtype, 1))
    if operator != "rotate":
        arguments = _arguments_of(operator, Inputs(dtype).normal(6, 32), Inputs(dtype, 1))
    _refuses_and_goes_on(device, operator, arguments, spoil(arguments))


@conforms(level="L2", clause="9.1", negative=True, safety=Safety.MEMORY, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@pytest.mark.parametrize("expert", [-1, 3, 2**31, -(2**31)])
def test_experts_that_do_not_exist_are_refused(device: Device, dtype: str, expert: int) -> None:
    draw = Inputs(dtype)
    weights = ExpertWeights(draw.normal(3, 16, 16), draw.normal(3, 16, 8))

    def arguments(last: int) -> tuple[object, ...]:
        routed = RouterOutput(torch.full((4, 2), 0.5), torch.tensor([[0, 1], [1, 2], [0, 2], [1, last]]))
        return Inputs(dtype).normal(4, 16), weights, routed, Activation.SILU

    _refuses_and_goes_on(device, "experts", arguments(0), arguments(expert))


@conforms(level="L2", gate="G1", clause=("9.1", "9.2", "9.10"), negative=True)
@by_dtype
@by_case(STRIDED)
def test_strides_do_not_matter(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    """The same values as rows of a wider tensor of NaN, on the device: a row read at the wrong place shows."""
    arguments = case.arguments(Inputs(dtype))
    dense = _device_run(device, case.operator, *arguments)
    first, *others = moved(arguments, lambda tensor: tensor.to(device.array_device, copy=True))
    assert isinstance(first, torch.Tensor)
    apart = results_of(getattr(device.ops, case.operator)(strided(first), *others))
    device.synchronize()
    for got, wanted in zip(apart, dense, strict=True):
        hold(record_gate, ratio(got.cpu().flatten(1), wanted.double().flatten(1), [wanted.flatten(1)]))


@conforms(level="L2", gate="G2", clause="9.1")
@by_dtype
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("size", [0.0, 1e-3, 3e-2])
def test_epsilon_counts_in_small_rows(device: Device, dtype: str, eps: float, size: float, record_gate: Any) -> None:
    """Rows whose mean square is about epsilon, or below: its value and its place in the formula show."""
    draw = Inputs(dtype)
    arguments = (draw.normal(5, 64, scale=size), draw.normal(64), eps, 0.0)
    (got,) = _device_run(device, "rms_norm", *arguments)
    (wanted,) = exact_run("rms_norm", *arguments)
    hold(record_gate, ulp(got, wanted, 6 + 64 // 2))
    if size == 0.0:
        hold(record_gate, exact(got.abs(), torch.zeros_like(got), "the norm of zeros"))


def _check_value(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    arguments = case.arguments(Inputs(dtype))
    runs = _runs(device, case.operator, arguments)
    assert [r.dtype for r in runs.got] == [r.dtype for r in runs.declared], "dtypes of results"
    hold(record_gate, *case.judge(arguments, runs))


def _check_untouched(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    guards = []

    def guard(tensor: torch.Tensor) -> torch.Tensor:
        guards.append((guarded(tensor, device.array_device), tensor))
        return guards[-1][0].tensor

    getattr(device.ops, case.operator)(*moved(case.arguments(Inputs(dtype)), guard))
    device.synchronize()
    for index, (kept, before) in enumerate(guards):
        hold(record_gate, kept.untouched(f"argument {index}"))
        if index not in case.reuses:
            hold(record_gate, exact(kept.tensor, before, f"argument {index}"))


def _runs(device: Device, operator: str, arguments: tuple[object, ...]) -> Runs:
    return Runs(
        _device_run(device, operator, *arguments), exact_run(operator, *arguments), declared_run(operator, *arguments)
    )


def _device_run(device: Device, operator: str, *arguments: object) -> list[torch.Tensor]:
    results = device_run(device.ops, device.array_device, operator, *arguments)
    device.synchronize()
    return [result.cpu() for result in results]


def _call(device: Device, operator: str, arguments: tuple[object, ...]) -> None:
    getattr(device.ops, operator)(*arguments)
    device.synchronize()


def _arguments_of(operator: str, rows: torch.Tensor, draw: Inputs) -> tuple[Any, ...]:
    """Return arguments whose rows of tokens are `rows`."""
    width = rows.shape[-1]
    match operator:
        case "linear":
            return rows, draw.normal(24, width), draw.normal(24)
        case "gated_linear":
            return rows, draw.normal(48, width), draw.normal(48), Activation.SILU
        case "rms_norm":
            return rows, draw.normal(width), 1e-6, 0.0
        case "add_rms_norm":
            return rows, draw.normal(*rows.shape), draw.normal(width), 1e-6, 0.0
        case "rotate":
            angles = torch.arange(len(rows) * 8.0).view(len(rows), 8)
            return rows, draw.normal(*rows.shape), angles.cos(), angles.sin(), False
        case _:
            return rows, Activation.SILU


def _refuses_and_goes_on(device: Device, operator: str, good: tuple[object, ...], bad: tuple[object, ...]) -> None:
    """Assert that `bad` raises, leaves its arguments alone, and that the next good call is right."""
    before = [tensor.clone() for tensor in _tensors(bad)]
    on_device = moved(bad, lambda tensor: tensor.to(device.array_device))
    with pytest.raises(REFUSALS):
        _call(device, operator, on_device)
    for kept, tensor in zip(before, _tensors(bad), strict=True):
        assert torch.equal(kept, tensor), "a refused call changed its arguments"
    after, expected = _device_run(device, operator, *good), exact_run(operator, *good)
    for got, wanted, declared in zip(after, expected, declared_run(operator, *good), strict=True):
        result = ratio(got, wanted, [declared]) if got.is_floating_point() else exact(got, wanted)
        assert result.passed, result.message


def _tensors(arguments: tuple[object, ...]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    moved(arguments, lambda tensor: (found.append(tensor), tensor)[1])  # type: ignore[func-returns-value]
    return found
