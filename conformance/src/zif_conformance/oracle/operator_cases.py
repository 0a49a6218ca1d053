"""One table of operator calls: how their arguments are drawn, and the gate of their results. No test, no platform.

Read by the level of operators; a new operator of the contract needs an entry here (a meta test compares the names).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zif.contract import Activation, ExpertWeights, RouterOutput, Routing
from zif_conformance.gates import GateResult, exact, ratio, tolerance, ulp
from zif_conformance.oracle.inputs import Inputs, strided
from zif_conformance.oracle.operators import declared_run, exact_run, sequential_product

Arguments = tuple[object, ...]

_ACTIVATION_ROUNDINGS = 16


@dataclass(frozen=True, slots=True)
class Runs:
    """The results of one call: of the device, of the reference in float64, and in the declared dtype."""

    got: Sequence[torch.Tensor]
    exact: Sequence[torch.Tensor]
    declared: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class OperatorCase:
    """A call of `operator`. `reuses` are the arguments, by index, whose storage the operator may overwrite."""

    operator: str
    name: str
    arguments: Callable[[Inputs], Arguments]
    judge: Callable[[Arguments, Runs], list[GateResult]]
    reuses: tuple[int, ...] = ()

    @property
    def case_id(self) -> str:
        """Name the case in test ids."""
        return f"{self.operator}-{self.name}"


def operator_cases() -> list[OperatorCase]:
    """Return every case, the odd and empty shapes among them."""
    return [*_linear(), *_gated_products(), *_norms(), *_rotations(), *_activations(), *_routes(), *_experts()]


def _product_ratio(arguments: Arguments, runs: Runs) -> list[GateResult]:
    in_sequence = sequential_product(*arguments)  # type: ignore[arg-type]
    return [ratio(runs.got[0], runs.exact[0], [runs.declared[0], in_sequence], "result")]


def _ratio(_: Arguments, runs: Runs) -> list[GateResult]:
    return [ratio(runs.got[0], runs.exact[0], [runs.declared[0]], "result")]


def _linear() -> list[OperatorCase]:
    shapes = ((1, 1, 1), (1, 64, 64), (3, 65, 33), (17, 128, 130), (64, 1000, 7), (5, 4097, 16), (0, 16, 8))
    return [_linear_case(shape, bias) for shape in shapes for bias in (False, True)]


def _linear_case(shape: tuple[int, int, int], has_bias: bool) -> OperatorCase:
    tokens, inner, outer = shape

    def arguments(draw: Inputs) -> Arguments:
        weight = draw.normal(outer, inner, scale=inner**-0.5)
        return strided(draw.normal(tokens, inner)), weight, draw.normal(outer) if has_bias else None

    name = f"{tokens}x{inner}x{outer}" + ("-bias" if has_bias else "")
    return OperatorCase("linear", name, arguments, _product_ratio)


def _gated_products() -> list[OperatorCase]:
    # A single element is too lucky a sample of what rounding between the product and its activation costs.
    shapes = ((1, 64, 64), (17, 1, 3), (19, 65, 1), (3, 131, 33), (33, 128, 100), (5, 4097, 24), (0, 16, 8))
    kinds = list(Activation)
    cases = [(shape, kinds[index % len(kinds)], index % 2 == 1) for index, shape in enumerate(shapes)]
    cases += [((17, 96, 40), kind, bias) for kind in kinds for bias in (False, True)]
    return [_gated_product_case(*case) for case in cases]


def _gated_product_case(shape: tuple[int, int, int], activation: Activation, has_bias: bool) -> OperatorCase:
    tokens, channels, inner = shape

    def arguments(draw: Inputs) -> Arguments:
        # Gates and ups of a few units: on both sides of where activations bend and clamp.
        weight = draw.normal(2 * inner, channels, scale=4 * channels**-0.5)
        return strided(draw.normal(tokens, channels)), weight, draw.normal(2 * inner) if has_bias else None, activation

    def judge(arguments: Arguments, runs: Runs) -> list[GateResult]:
        product = arguments[:3]
        gated = exact_run("linear", *product)[0]
        runs_of_product = [*declared_run("linear", *product), sequential_product(*product)]  # type: ignore[arg-type]
        off = _spread(gated, tolerance(gated, runs_of_product, runs.got[0].dtype), activation)
        return [ulp(runs.got[0], runs.exact[0], _ACTIVATION_ROUNDINGS, _gated_size(gated), inherited=off)]

    name = f"{activation.value}-{tokens}x{channels}x{inner}" + ("-bias" if has_bias else "")
    return OperatorCase("gated_linear", name, arguments, judge)


def _spread(gate_up: torch.Tensor, off: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return how far off an activation is where its gates and ups are. gate_up: [T, 2I], off: [T, 1]; both float64."""
    (right,) = exact_run("gated_activation", gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    corners = [torch.cat((gate + a * off, up + b * off), -1) for a in (-1, 1) for b in (-1, 1)]
    return torch.stack([(exact_run("gated_activation", at, activation)[0] - right).abs() for at in corners]).amax(0)


def _norms() -> list[OperatorCase]:
    shapes = ((1, 1), (1, 64), (5, 63), (33, 1000), (0, 8))
    return [case(shape, offset) for shape in shapes for offset in (0.0, 1.0) for case in (_norm_case, _add_norm_case)]


def _norm_case(shape: tuple[int, int], offset: float) -> OperatorCase:
    tokens, channels = shape

    def arguments(draw: Inputs) -> Arguments:
        return strided(draw.normal(tokens, channels)), draw.normal(channels), 1e-6, offset

    def judge(_: Arguments, runs: Runs) -> list[GateResult]:
        return [ulp(runs.got[0], runs.exact[0], _norm_roundings(channels))]

    return OperatorCase("rms_norm", f"{tokens}x{channels}-offset{offset:g}", arguments, judge)


def _add_norm_case(shape: tuple[int, int], offset: float) -> OperatorCase:
    tokens, channels = shape

    def arguments(draw: Inputs) -> Arguments:
        added = strided(draw.normal(tokens, channels)), strided(draw.normal(tokens, channels))
        return *added, draw.normal(channels), 1e-6, offset

    def judge(_: Arguments, runs: Runs) -> list[GateResult]:
        # The sum is rounded to the model's dtype before it is normalized, in the reference and everywhere.
        total = runs.declared[1]
        return [
            exact(runs.got[1], total, "residual"),
            ulp(runs.got[0], _normalized(runs, total), _norm_roundings(channels)),
        ]

    def _normalized(runs: Runs, total: torch.Tensor) -> torch.Tensor:
        """Take the truth from the sum that was rounded."""
        wide = total.double()
        # exact[0] / normalized(exact[1]) is weight + offset; only the normalization is made again.
        old = runs.exact[1] * torch.rsqrt(runs.exact[1].square().mean(-1, keepdim=True) + 1e-6)
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (runs.exact[0] / old).nan_to_num(0.0)

    return OperatorCase("add_rms_norm", f"{tokens}x{channels}-offset{offset:g}", arguments, judge, reuses=(1,))


def _norm_roundings(channels: int) -> int:
    """Bound the roundings of a mean of squares summed in any order, halved by the root, and of what follows."""
    return 6 + channels // 2


def _rotations() -> list[OperatorCase]:
    shapes = ((1, 1, 1, 2, 1), (1, 4, 2, 64, 32), (5, 3, 1, 80, 16), (17, 2, 2, 6, 3), (0, 2, 1, 8, 4))
    return [_rotation_case(shape, interleaved) for shape in shapes for interleaved in (False, True)]


def _rotation_case(shape: tuple[int, int, int, int, int], interleaved: bool) -> OperatorCase:
    tokens, heads, kv_heads, head_dim, pairs = shape

    def arguments(draw: Inputs) -> Arguments:
        angles = draw.integers(0, 4096, tokens, 1).float() * torch.logspace(0, -4, pairs)
        query, key = strided(draw.normal(tokens, heads, head_dim)), strided(draw.normal(tokens, kv_heads, head_dim))
        return query, key, angles.cos(), angles.sin(), interleaved

    def judge(arguments: Arguments, runs: Runs) -> list[GateResult]:
        results = []
        for index, what in enumerate(("query", "key")):
            source = arguments[index]
            assert isinstance(source, torch.Tensor)
            kept = source[..., 2 * pairs :]
            results.append(exact(runs.got[index][..., 2 * pairs :], kept, f"{what} beyond the rotated part"))
            size = _pair_size(source[..., : 2 * pairs], interleaved)
            turned = runs.exact[index][..., : 2 * pairs]
            results.append(ulp(runs.got[index][..., : 2 * pairs], turned, 3, size))
        return results

    name = f"{tokens}x{heads}x{kv_heads}x{head_dim}-{pairs}" + ("-interleaved" if interleaved else "")
    return OperatorCase("rotate", name, arguments, judge, reuses=(0, 1))


def _pair_size(heads: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return the length of each element's pair: the size of the terms that are added."""
    size = heads.shape[-1] // 2
    first, second = (heads[..., 0::2], heads[..., 1::2]) if interleaved else (heads[..., :size], heads[..., size:])
    length = torch.hypot(first.double(), second.double())
    return length.repeat_interleave(2, -1) if interleaved else torch.cat((length, length), -1)


def _activations() -> list[OperatorCase]:
    return [_activation_case(shape, kind) for shape in ((1, 2), (5, 66), (33, 1024), (0, 8)) for kind in Activation]


def _activation_case(shape: tuple[int, int], activation: Activation) -> OperatorCase:
    def arguments(draw: Inputs) -> Arguments:
        return strided(draw.normal(*shape, scale=3.0)), activation

    def judge(arguments: Arguments, runs: Runs) -> list[GateResult]:
        source = arguments[0]
        assert isinstance(source, torch.Tensor)
        return [ulp(runs.got[0], runs.exact[0], _ACTIVATION_ROUNDINGS, _gated_size(source))]

    return OperatorCase("gated_activation", f"{activation.value}-{shape[0]}x{shape[1]}", arguments, judge)


def _gated_size(gate_up: torch.Tensor) -> torch.Tensor:
    """Return the size of the terms of an activation, which may cancel. gate_up: [T, 2I]."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * (up.abs() + 1)


def _routes() -> list[OperatorCase]:
    shapes = ((1, 1, 1), (5, 8, 2), (17, 33, 4), (3, 128, 8), (0, 8, 2))
    return [_route_case(shape, routing) for shape in shapes for routing in Routing]


def _route_case(shape: tuple[int, int, int], routing: Routing) -> OperatorCase:
    tokens, experts, chosen = shape

    def arguments(draw: Inputs) -> Arguments:
        logits = draw.normal(tokens, experts, scale=2.0)
        if tokens > 1:
            logits[0] = 0.5  # all equal: the lowest ids win
            logits[1, ::2] = logits[1, 0]
        return strided(logits), chosen, routing

    def judge(_: Arguments, runs: Runs) -> list[GateResult]:
        return [
            exact(runs.got[1], runs.exact[1], "expert ids"),
            ulp(runs.got[0], runs.exact[0], 16 + experts),
        ]

    return OperatorCase("route", f"{routing.value}-{tokens}x{experts}x{chosen}", arguments, judge)


def _experts() -> list[OperatorCase]:
    shapes = ((1, 4, 1, 16, 8), (7, 5, 2, 33, 17), (24, 8, 4, 64, 32), (0, 4, 2, 8, 8))
    kinds = (Activation.SILU, Activation.SWIGLU_CLAMPED)
    return [_experts_case(shape, activation) for shape in shapes for activation in kinds]


def _experts_case(shape: tuple[int, int, int, int, int], activation: Activation) -> OperatorCase:
    tokens, experts, chosen, channels, inner = shape

    def arguments(draw: Inputs) -> Arguments:
        biases = (draw.normal(experts, 2 * inner), draw.normal(experts, channels))
        weights = ExpertWeights(
            draw.normal(experts, 2 * inner, channels, scale=channels**-0.5),
            draw.normal(experts, channels, inner, scale=inner**-0.5),
            *(biases if activation is Activation.SWIGLU_CLAMPED else ()),
        )
        ids = (
            torch.stack([torch.arange(chosen) + token for token in range(tokens)]) if tokens else torch.zeros(0, chosen)
        )
        shares = draw.normal(tokens, chosen).float().softmax(-1)
        return strided(draw.normal(tokens, channels)), weights, RouterOutput(shares, ids.long() % experts), activation

    name = f"{activation.value}-{tokens}x{experts}x{chosen}x{channels}x{inner}"
    return OperatorCase("experts", name, arguments, _ratio)
