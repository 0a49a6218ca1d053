"""Weights in 12 bits: the numbers and the products are those of the matrix, to the bit."""

from struct import Struct

import pytest
import torch

from zif.contract import Activation
from zif.errors import OutOfMemoryError
from zif_cpu.compact import CompactWeight
from zif_cpu.library import DTYPE_CODES, Library, load_library
from zif_cpu.operators import COMPACT_OUTPUTS, NativeOps
from zif_cpu.recording import NativeCall, Recorder, Slab

# Outputs, inputs: borders of tiles, panels and pieces, and odd numbers of each.
SHAPES = {
    "amx": ((1, 128), (2, 128), (16, 256), (33, 384), (64, 512), (100, 640), (48, 1152), (1000, 1024), (70, 3072)),
    "avx512": ((32, 128), (64, 256), (96, 384), (32, 1152), (992, 1024), (64, 3072)),
}
TOKENS = (0, 1, 2, 15, 16, 17, 32, 33, 48, 70, 129, 400, 1030)
RARE = (0.0, -0.0, 1e-40, -1e-40, 1e-30, 3e38, -2e38, torch.inf, -torch.inf, torch.nan)


def of_instruction_sets(shapes):
    """Parameters (instruction set, shape): each way to hold a matrix with shapes of its own."""
    return [(isa, shape) for isa in COMPACT_OUTPUTS for shape in shapes["amx" if isa == "amx" else "avx512"]]


@pytest.fixture(params=COMPACT_OUTPUTS)
def ops(request):
    yield from using(request.param)


@pytest.fixture
def shaped(request):
    """Operators of an instruction set, and a shape."""
    isa, shape = request.param
    for ops in using(isa):
        yield ops, shape


def using(isa):
    library = load_library()
    if not isinstance(library, Library) or isa not in library.isas:
        pytest.skip(f"no {isa} here")
    library.use(isa, 2)
    yield NativeOps(library, isa)
    library.use(library.isas[-1], 1)


def test_which_instruction_sets_have_them(library, request):
    isa = request.node.callspec.params["library"]
    prepared = NativeOps(library, isa).prepare_weight(drawn(32, 128), lend)
    assert isinstance(prepared, CompactWeight) == (isa in COMPACT_OUTPUTS)


@pytest.mark.parametrize("ops", [isa for isa in COMPACT_OUTPUTS if isa != "amx"], indirect=True)
@pytest.mark.parametrize("outputs", [1, 16, 33, 48, 100])
def test_halves_of_broken_groups_stay_as_they_are(ops, outputs):
    assert ops.prepare_weight(drawn(outputs, 128), lambda num_bytes: pytest.fail("memory was asked for")) is None


def lend(num_bytes):
    """Memory as an allocator lends it, with something in it: nothing may rely on zeros."""
    return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)


def drawn(outputs, inputs, rare=0):
    """Return a matrix with `rare` numbers that its table of upper bytes lacks."""
    weight = (torch.randn(outputs, inputs) * 0.03).bfloat16()
    places = torch.randperm(weight.numel())[:rare]
    weight.view(-1)[places] = torch.tensor(RARE).bfloat16()[torch.arange(rare) % len(RARE)]
    return weight


def bits(array):
    return array.view(torch.int32 if array.dtype == torch.float32 else torch.int16)


def same(got, want):
    """NaN has one place, not one payload: instructions may choose among those of their operands."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        bits(got.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)),
        bits(want.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)),
    )


@pytest.mark.parametrize("shaped", of_instruction_sets(SHAPES), indirect=True, ids=str)
@pytest.mark.parametrize("share", [0, 1000, 300])
def test_numbers_come_back(shaped, share):
    ops, shape = shaped
    torch.manual_seed(1)
    outputs, inputs = shape
    weight = drawn(outputs, inputs, outputs * inputs // share if share else 0)
    compact = ops.prepare_weight(weight, lend)
    assert isinstance(compact, CompactWeight)
    assert compact.shape == weight.shape
    assert torch.equal(bits(ops._plain(compact)), bits(weight))


@pytest.mark.parametrize("shaped", of_instruction_sets(SHAPES), indirect=True, ids=str)
@pytest.mark.parametrize("share", [0, 400, 260])
def test_products_are_those_of_the_matrix(shaped, share):
    ops, shape = shaped
    torch.manual_seed(2)
    outputs, inputs = shape
    weight = drawn(outputs, inputs, outputs * inputs // share if share else 0)
    compact = ops.prepare_weight(weight, lend)
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs + 5).bfloat16()[:, :inputs]
        for bias in (None, torch.randn(outputs).bfloat16()):
            assert same(ops.linear(x, compact, bias), ops.linear(x, weight, bias)), tokens
            assert same(ops.logits(x, compact, bias), ops.logits(x, weight, bias)), tokens
            if outputs % 2 == 0:
                got, want = (ops.gated_linear(x, w, bias, Activation.SILU) for w in (compact, weight))
                assert same(got, want), tokens


def test_another_instruction_set_in_use_changes_nothing(ops):
    weight = drawn(64, 256, 20)
    compact, x = ops.prepare_weight(weight, lend), torch.randn(9, 256).bfloat16()
    want = ops.linear(x, weight, None)
    load_library().use("portable", 2)
    assert same(ops.linear(x, compact, None), want)
    assert torch.equal(bits(ops._plain(compact)), bits(weight))


def test_a_recorded_step_unpacks_anew(ops):
    weights = [drawn(64, 256, 20) for _ in range(2)]
    forms = [ops.prepare_weight(weight, lend) for weight in weights]
    recorder = Recorder(Slab())
    gaps = torch.randn(3, 512).bfloat16()[:, ::2]
    with ops.recording(recorder), recorder:
        outputs = [ops.linear(gaps, form, None) for form in forms]
    assert sum(isinstance(item, NativeCall) for item in recorder.items) == 2
    for output, weight in zip(outputs, weights, strict=True):
        assert same(output, ops.linear(gaps, weight, None))


@pytest.mark.parametrize("tokens", [5, 20, 40, 70, 129])
@pytest.mark.parametrize(
    "shaped", of_instruction_sets({"amx": (7, 32, 100), "avx512": (32, 96)}), indirect=True, ids=str
)
def test_nothing_around_the_result_is_written(shaped, tokens):
    """The result lies in the middle of memory whose rest must stay as it is."""
    ops, outputs = shaped
    weight, x = drawn(outputs, 256, 6), torch.randn(tokens, 256).bfloat16()
    compact, want = ops.prepare_weight(weight, lend), ops.linear(x, weight, None)
    memory = torch.full((tokens * outputs + 256,), 7.0).bfloat16()
    y = memory[128:-128]
    sizes = 256, tokens, 256, outputs, DTYPE_CODES["bfloat16"]
    ops._linear_kernel(Struct("4P4q2iP").pack(x.data_ptr(), 0, 0, y.data_ptr(), *sizes, 0, compact.address))
    assert same(y.view(tokens, outputs), want)
    assert bool((memory[:128] == 7).all() and (memory[-128:] == 7).all())


def test_what_torch_computes_gets_the_matrix(ops):
    weight = drawn(64, 256, 12)
    compact = ops.prepare_weight(weight, lend)
    x = torch.randn(3, 256)
    with pytest.raises(RuntimeError):
        ops.linear(x, compact, None)
    with pytest.raises(RuntimeError):
        ops.linear(x.bfloat16()[:, :128], compact, None)
    gaps = torch.randn(3, 512).bfloat16()[:, ::2]
    assert same(ops.linear(gaps, compact, None), ops.linear(gaps, weight, None))
    assert same(ops.logits(gaps, compact, None), ops.logits(gaps, weight, None))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randint(-32768, 32767, (64, 256), dtype=torch.int16).view(torch.bfloat16),
        torch.randn(64, 130).bfloat16(),
        torch.randn(64, 256),
        torch.randn(64, 256).half(),
        torch.randn(256, 128).bfloat16().t(),
        torch.randn(0, 128).bfloat16(),
        torch.randn(8, 4, 128).bfloat16(),
        torch.empty(64, 256, dtype=torch.bfloat16, device="meta"),
    ],
    ids=["any bits", "odd inputs", "float32", "float16", "turned", "empty", "stack", "meta"],
)
def test_some_matrices_stay_as_they_are(ops, weight):
    assert ops.prepare_weight(weight, lend) is None


def test_memory_that_is_refused_shows(ops):
    def refuse(num_bytes):
        raise OutOfMemoryError(f"no {num_bytes} bytes")

    with pytest.raises(OutOfMemoryError, match="bytes"):
        ops.prepare_weight(drawn(32, 128), refuse)


def test_three_quarters_of_the_bytes(ops):
    lent = []
    ops.prepare_weight(drawn(1024, 1024), lambda num_bytes: lent.append(num_bytes) or lend(num_bytes))
    assert sum(lent) < 0.77 * 1024 * 1024 * 2
