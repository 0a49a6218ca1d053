"""`NativeOps`: what the library serves, what falls back, and what torch.compile sees."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zif.contract import Activation, ExpertWeights, RouterOutput, Routing
from zif.reference.ops import ReferenceOps
from zif_cpu.library import Library, load_library
from zif_cpu.operators import MAX_TOKENS, NativeOps


class Noted(ReferenceOps):
    """The reference, noting what it serves."""

    def __init__(self):
        self.served = []

    def linear(self, *arguments):
        self.served.append("linear")
        return super().linear(*arguments)

    def rms_norm(self, *arguments):
        self.served.append("rms_norm")
        return super().rms_norm(*arguments)

    def add_rms_norm(self, *arguments):
        self.served.append("add_rms_norm")
        return super().add_rms_norm(*arguments)

    def rotate(self, *arguments):
        self.served.append("rotate")
        return super().rotate(*arguments)

    def gated_activation(self, *arguments):
        self.served.append("gated_activation")
        return super().gated_activation(*arguments)

    def experts(self, *arguments):
        self.served.append("experts")
        return super().experts(*arguments)


class Ops(NativeOps, Noted):
    def __init__(self, library):
        NativeOps.__init__(self, library, library.isas[-1])
        Noted.__init__(self)


@pytest.fixture
def ops(library):
    return Ops(library)


@pytest.fixture
def best():
    """The operators with the instruction set in use: tracing is the same for all."""
    library = load_library()
    if not isinstance(library, Library):
        pytest.skip(library)
    yield Ops(library)
    torch._dynamo.reset()


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(ops, name, dtype=torch.bfloat16, like=lambda array: array):
    """Call one operator with small arrays. like: what each array is passed through. Returns the results."""
    x, residual, weight = (like(random(*shape, dtype=dtype)) for shape in ((3, 32), (3, 32), (32,)))
    heads, angles = like(random(3, 2, 16, dtype=dtype)), like(random(3, 8, dtype=torch.float32))
    if name == "linear":
        return [ops.linear(x, like(random(5, 32, dtype=dtype)), like(random(5, dtype=dtype)))]
    if name == "rms_norm":
        return [ops.rms_norm(x, weight, 1e-5, 0.0)]
    if name == "add_rms_norm":
        output = ops.add_rms_norm(x, residual, weight, 1e-5, 0.0)
        return [output.normed, output.residual]
    if name == "rotate":
        rotated = ops.rotate(heads, heads, angles, angles, False)
        return [rotated.query, rotated.key]
    return [ops.gated_activation(x, Activation.SILU)]


NAMES = ("linear", "rms_norm", "add_rms_norm", "rotate", "gated_activation")


def mixture(dtype=torch.bfloat16, biases=True):
    weights = ExpertWeights(
        random(4, 2 * 24, 32, dtype=dtype),
        random(4, 32, 24, dtype=dtype, seed=1),
        random(4, 2 * 24, dtype=dtype, seed=2) if biases else None,
        random(4, 32, dtype=dtype, seed=3) if biases else None,
    )
    x = random(7, 32, dtype=dtype, seed=4)
    return x, weights, ReferenceOps().route(random(7, 4, dtype=torch.float32, seed=5), 2, Routing.SOFTMAX_TOPK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_library_serves_its_dtypes_parameters_too(ops, name, dtype):
    with torch.no_grad():
        parameters = call(ops, name, dtype, torch.nn.Parameter)
    for native, parameter, expected in zip(
        call(ops, name, dtype), parameters, call(ReferenceOps(), name, torch.float64), strict=True
    ):
        assert torch.equal(native, parameter)
        assert native.dtype == dtype
        torch.testing.assert_close(native.double(), expected, rtol=0.02, atol=0.02)
    assert ops.served == []


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_fall_back(ops, name):
    for native, expected in zip(call(ops, name, torch.float64), call(ReferenceOps(), name, torch.float64), strict=True):
        assert torch.equal(native, expected)
    assert ops.served[0] == name


@pytest.mark.parametrize("name", NAMES)
def test_arrays_with_gaps_fall_back(ops, name):
    def gapped(array):
        return torch.stack([array, array], -1)[..., 0]

    for native, expected in zip(call(ops, name, like=gapped), call(ReferenceOps(), name, like=gapped), strict=True):
        assert torch.equal(native, expected)
    assert ops.served[0] == name


@pytest.mark.parametrize("name", NAMES)
def test_arrays_without_memory_fall_back(ops, name):
    shapes = [result.shape for result in call(ReferenceOps(), name)]
    assert [result.shape for result in call(ops, name, like=lambda array: array.to("meta"))] == shapes
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [result.shape for result in call(ops, name, like=mode.from_tensor)] == shapes
    assert ops.served.count(name) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_float32_whoever_multiplies(ops, dtype):
    hidden, weight, bias = (random(*shape, dtype=dtype) for shape in ((3, 32), (5, 32), (5,)))
    expected = hidden.float() @ weight.float().T + bias.float()
    gapped = torch.stack([weight, weight], -1)[..., 0]
    for given in (weight, torch.nn.Parameter(weight, requires_grad=False), gapped):
        torch.testing.assert_close(ops.logits(hidden, given, bias), expected)
    assert ops.logits(hidden[:0], weight, None).shape == (0, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = ops.logits(mode.from_tensor(hidden), mode.from_tensor(weight), None)
    assert (logits.shape, logits.dtype) == ((3, 5), torch.float32)


def test_rows_without_rows_and_rows_that_overlap_fall_back(ops):
    weight = random(32)
    assert ops.rms_norm(random(0, 32), weight, 1e-5, 0.0).shape == (0, 32)
    assert ops.linear(random(0, 32), random(5, 32), None).shape == (0, 5)
    assert ops.gated_activation(random(0, 32), Activation.GELU).shape == (0, 16)
    assert ops.rotate(random(0, 2, 16), random(0, 1, 16), *2 * (torch.ones(0, 8),), False).key.shape == (0, 1, 16)
    x = random(32)
    assert torch.equal(ops.rms_norm(x.expand(4, 32), weight, 1e-5, 0.0)[2], ReferenceOps().rms_norm(x, weight, 1e-5, 0))
    assert torch.equal(ops.rms_norm(x, weight, 1e-5, 0.0), ReferenceOps().rms_norm(x, weight, 1e-5, 0))
    assert {"linear", "rms_norm", "rotate", "gated_activation"} <= set(ops.served)


def test_one_token_of_any_stride_is_a_row(ops):
    x, weight = random(1, 32).as_strided((1, 32), (5, 1)), random(32)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5, 0.0), ops.rms_norm(x.clone(), weight, 1e-5, 0.0))
    assert ops.served == []


def test_mixed_dtypes_and_shapes_that_do_not_fit_are_the_references_to_judge(ops):
    x, weight = random(3, 32), random(32, dtype=torch.float32)
    assert ops.rms_norm(x, weight, 1e-5, 0.0).dtype == torch.bfloat16
    assert ops.add_rms_norm(x, x, weight, 1e-5, 0.0).normed.dtype == torch.bfloat16
    heads, angles = random(3, 2, 16), torch.ones(3, 8)
    assert ops.rotate(heads, heads.float(), angles, angles, False).query.dtype == torch.bfloat16
    assert ops.rotate(heads, heads, angles[:1], angles[:1], False).query.shape == (3, 2, 16)
    assert ops.served == ["rms_norm", "add_rms_norm", "rms_norm", "rotate", "rotate"]
    for wrong in (
        lambda: ops.rms_norm(x, random(31), 1e-5, 0.0),
        lambda: ops.add_rms_norm(x, random(2, 32), random(32), 1e-5, 0.0),
        lambda: ops.rotate(heads, heads, torch.ones(3, 9), torch.ones(3, 9), False),
        lambda: ops.linear(x, random(5, 31), None),
        lambda: ops.linear(x, random(5, 32), random(4)),
        lambda: ops.linear(x, random(5, 32, dtype=torch.float32), None),
        lambda: ops.logits(x, random(5, 31), None),
        lambda: ops.logits(x, random(5, 32), random(4)),
        lambda: ops.gated_activation(random(3, 31), Activation.SILU),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            wrong()


def test_many_tokens_are_torchs_to_multiply(ops):
    weight = random(5, 32, dtype=torch.float32)
    for tokens in (1, MAX_TOKENS, MAX_TOKENS + 1):
        x = random(tokens, 40, dtype=torch.float32)[:, 8:]
        torch.testing.assert_close(ops.linear(x, weight, None), x @ weight.T)
    assert ops.served == ["linear"]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", list(Activation))
def test_experts(ops, activation, biases):
    x, weights, routed = mixture(torch.float32, biases)
    expected = ReferenceOps().experts(x, weights, routed, activation)
    torch.testing.assert_close(ops.experts(x, weights, routed, activation), expected, rtol=1e-4, atol=1e-4)
    assert ops.served == []


def test_an_expert_that_does_not_exist_is_refused(ops):
    x, weights, routed = mixture()
    with pytest.raises(ValueError, match="must be from 0 to 3"):
        ops.experts(x, weights, RouterOutput(routed.weights, routed.expert_ids + 3), Activation.SILU)


def layer(ops, x, residual, weights, angles):
    """A part of a decoder layer. Returns all results, so that none is left out of the graph."""
    state = ops.add_rms_norm(x, residual, weights["norm"], 1e-5, 1.0)
    qkv = ops.linear(state.normed, weights["qkv"], weights["bias"])
    query, key = (part.view(-1, 2, 16) for part in qkv.split([32, 32, 32], -1)[:2])
    rotated = ops.rotate(ops.rms_norm(query, weights["norm"][:16], 1e-5, 0.0), key, *angles, False)
    return state.residual, rotated.query, rotated.key, ops.gated_activation(qkv, Activation.GELU_TANH)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_are_one_graph_that_calls_the_library(best, backend):
    weights = {"norm": random(32), "qkv": random(96, 32), "bias": random(96)}
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    with torch.inference_mode():
        for tokens in (3, 5):
            x, residual, angles = random(tokens, 32), random(tokens, 32, seed=1), random(2, tokens, 8).float().unbind()
            expected = layer(best, x, residual, weights, angles)
            for actual, native in zip(compiled(best, x, residual, weights, angles), expected, strict=True):
                assert torch.equal(actual, native)
                assert actual.stride() == native.stride()
    assert best.served == []


def test_every_operator_is_one_node_of_the_graph(best):
    nodes = []

    def backend(module, _):
        nodes.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    weights = {"norm": random(32), "qkv": random(96, 32), "bias": random(96)}
    angles = random(2, 3, 8).float().unbind()
    torch.compile(layer, fullgraph=True, backend=backend)(best, random(3, 32), random(3, 32), weights, angles)
    called = [node.removeprefix("zif_cpu.") for node in nodes if node.startswith("zif_cpu.")]
    assert called == ["add_rms_norm", "linear", "rms_norm", "rotate", "gated_activation"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_experts_are_one_graph(best, backend):
    x, weights, routed = mixture()

    def mix(x, gate_up, shares, ids):
        held = ExpertWeights(gate_up, weights.down, None, weights.down_bias)
        return best.experts(x, held, RouterOutput(shares, ids), Activation.SILU)

    compiled = torch.compile(mix, fullgraph=True, backend=backend)
    arguments = x, weights.gate_up, routed.weights, routed.expert_ids
    assert torch.equal(compiled(*arguments), mix(*arguments))


def test_other_dtypes_compile_too(best):
    compiled = torch.compile(best.rms_norm, fullgraph=True, backend="eager")
    x, weight = random(3, 32, dtype=torch.float64), random(32, dtype=torch.float64)
    assert torch.equal(compiled(x, weight, 1e-5, 0.0), ReferenceOps().rms_norm(x, weight, 1e-5, 0.0))


@pytest.mark.parametrize("name", ["rms_norm", "gated_activation"])
def test_nodes_keep_torchs_rules(best, name):
    arguments = {"rms_norm": (random(3, 32), random(32), 1e-5, 0.0), "gated_activation": (random(3, 32), "silu")}
    node = getattr(torch.ops.zif_cpu, name).default
    torch.library.opcheck(node, arguments[name], test_utils=("test_schema", "test_faketensor"))
