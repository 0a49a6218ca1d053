"""Steps as programs: what is repeated is what would have been computed, for steps that differ in all that may."""

import gc

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from zif.contract import Activation
from zif_cpu import programs
from zif_cpu.operators import NativeOps
from zif_cpu.programs import MAX_TOKENS, MAX_TORCH_CALLS_OF_MANY, StepPrograms
from zif_cpu.recording import NotRecordableError, Recorder, Slab


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Attend:
    """In place of the runner's: attention of no layer."""

    def __init__(self, repeatable=True):
        self.prepared = {0: Prepared(repeatable)}


class Prepared:
    def __init__(self, repeatable):
        self.repeatable = repeatable


class Forward:
    """A small network of native calls and torch's operations; counts how often it runs as it is."""

    def __init__(self, library, extra=None):
        self.ops = NativeOps(library, library.isas[-1], batch_invariant=True)  # products are native at any number
        self.extra = extra or (lambda x: x)
        self.embedding = random(50, 64)
        self.up, self.down, self.norm = random(256, 64, seed=1), random(64, 128, seed=2), random(64, seed=3)
        self.num_calls = 0

    def __call__(self, token_ids, positions, attend, *states):
        self.num_calls += 1
        x = functional.embedding(token_ids, self.embedding)
        x = x * positions[:, None].float().cos().to(torch.bfloat16)
        normed = self.ops.rms_norm(x, self.norm, 1e-5, 0.0)
        inner = self.ops.gated_activation(self.ops.linear(normed, self.up, None), Activation.SILU)
        state = self.ops.add_rms_norm(self.ops.linear(inner, self.down, None), x, self.norm, 1e-5, 1.0)
        return self.extra(state.normed + state.residual.flip(1))


def inputs(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (num_tokens,), generator=generator), torch.arange(num_tokens) + seed


class ThreadsOfCosine(TorchDispatchMode):
    """Notes how many threads torch has when it computes a cosine."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten.cos.default:
            self.seen.append(torch.get_num_threads())
        return function(*arguments, **(named or {}))


@pytest.fixture
def forward(library):
    return Forward(library)


@pytest.mark.parametrize("inference", [True, False])
def test_repeated_steps_give_what_the_function_gives(forward, library, inference):
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    with torch.inference_mode(inference):
        for seed, num_tokens in enumerate([3, 1, 3, 1, 8, 3, 1, 8, 8, 3, 1, MAX_TOKENS, MAX_TOKENS, MAX_TOKENS]):
            expected = forward(*inputs(num_tokens, seed), Attend())
            result = wrapped(*inputs(num_tokens, seed), Attend())
            assert torch.equal(result, expected)
    # Once as it is and once recorded for each of four sizes; the other calls are those made here.
    assert forward.num_calls == 14 + 2 * 4


def test_results_stay_what_they_are_when_the_next_step_runs(forward, library):
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    results = [wrapped(*inputs(4, seed), Attend()) for seed in range(6)]
    gc.collect()
    for seed, result in enumerate(results):
        assert torch.equal(result, forward(*inputs(4, seed), Attend()))


def test_rows_picked_by_numbers_are_picked_anew(library):
    forward = Forward(library, lambda x: x[:, torch.tensor([3, 1, 1])])
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for seed in range(5):
        assert torch.equal(wrapped(*inputs(6, seed), Attend()), forward(*inputs(6, seed), Attend()))
    assert forward.num_calls == 5 + 2


@pytest.mark.parametrize("num_tokens", [3, MAX_TOKENS + 1])
@pytest.mark.parametrize(("repeatable", "states"), [(False, ()), (True, (object(),))])
def test_other_steps_run_as_they_are(forward, library, num_tokens, repeatable, states):
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for _ in range(4):
        wrapped(*inputs(num_tokens, 0), Attend(repeatable), *states)
    assert forward.num_calls == 4


def test_many_tokens_share_a_program_between_the_numbers_that_were_recorded(forward, library):
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    sizes = [
        100,
        100,
        100,
        80,
        80,
        99,
        85,
        80,
        100,
        128,
        127,
        66,
        120,
        119,
        121,
        3,
        101,
        3,
        3,
        200,
        129,
        140,
        256,
        255,
        90,
    ]
    as_they_are = [True, True, False, True, True, *[False] * 4, *[True] * 4, False, True, True, False, True, False]
    as_they_are += [*[True] * 4, False, False]
    for seed, (num_tokens, is_run) in enumerate(zip(sizes, as_they_are, strict=True)):
        expected = forward(*inputs(num_tokens, seed), Attend())
        before = forward.num_calls
        assert torch.equal(wrapped(*inputs(num_tokens, seed), Attend()), expected)
        assert forward.num_calls - before == is_run, f"step {seed}"


@pytest.mark.parametrize(
    "extra",
    [
        lambda x: x * (len(x) // 2),
        lambda x: x * float(len(x)),
        lambda x: x + x[len(x) - 1],
        lambda x: x + x[: len(x) // 2].sum(),
        lambda x: x.t().contiguous().t() + 1,
        lambda x: torch.stack([x, x + 1])[1] * 2,
        lambda x: (x.view(len(x), 2, 32).transpose(1, 2) * 2).flatten(1),
        lambda x: torch.topk(x.float(), 3).values,
        lambda x: x[:-1].contiguous(),
        lambda x: x[:, torch.tensor([3, 1, 1])],
        lambda x: x + 1 if len(x) % 3 else x * 2,
        lambda x: x + 1 if len(x) % 3 else x,
    ],
    ids=[
        "half",
        "float",
        "last",
        "some",
        "columns",
        "stacked",
        "transposed",
        "largest",
        "fewer",
        "constant",
        "other",
        "more",
    ],
)
def test_what_depends_on_the_number_of_many_tokens_runs_as_it_is(library, extra):
    forward, plain = Forward(library, extra), Forward(library)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for seed, num_tokens in enumerate([100, 99, 97, 128, 110, 111, 127, 100, 3, 3, 3]):
        expected = extra(plain(*inputs(num_tokens, seed), Attend()))
        assert torch.equal(wrapped(*inputs(num_tokens, seed), Attend()), expected)


@pytest.mark.parametrize(
    "extra",
    [
        lambda x: x + torch.arange(len(x))[:, None],
        lambda x: x * torch.zeros(len(x), 1).add_(len(x)),
        lambda x: torch.cat([x, x.split(32, dim=1)[1]], dim=1),
    ],
    ids=["numbers of rows", "the number", "in pieces"],
)
def test_what_torch_computes_of_many_tokens_is_computed_anew(library, extra):
    forward, plain = Forward(library, extra), Forward(library)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for seed, num_tokens in enumerate([100, 97, 109, 109, 99, 108, 97, 109, 100]):
        expected = extra(plain(*inputs(num_tokens, seed), Attend()))
        assert torch.equal(wrapped(*inputs(num_tokens, seed), Attend()), expected)
    assert forward.num_calls == 4


def test_of_many_tokens_torch_keeps_what_takes_it_long(library):
    forward = Forward(library, lambda x: sum([x + i for i in range(MAX_TORCH_CALLS_OF_MANY)]))
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for seed, num_tokens in enumerate([100, 100, 100, 300, 300, 3, 3, 3, 3]):
        expected = forward(*inputs(num_tokens, seed), Attend())
        assert torch.equal(wrapped(*inputs(num_tokens, seed), Attend()), expected)
    # As it is: each of many tokens, and two of the four of few. What could not be kept was not computed again.
    assert forward.num_calls == 9 + 5 + 2


def test_a_product_of_many_tokens_that_torch_makes_is_not_recorded(library):
    forward = Forward(library, lambda x: functional.linear(x, torch.eye(64, dtype=x.dtype)))
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for num_tokens in (100, 100, 100, 3, 3, 3):
        wrapped(*inputs(num_tokens, 0), Attend())
    assert forward.num_calls == 3 + 2


def test_products_that_torch_makes_from_some_number_of_tokens_on_are_not_recorded(library):
    forward = Forward(library, lambda x: functional.linear(x, torch.eye(64, dtype=x.dtype)) if len(x) > 128 else x)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for num_tokens in (100, 100, 100, 200, 200, 200, 100):
        wrapped(*inputs(num_tokens, 0), Attend())
    assert forward.num_calls == 2 + 3


def test_numbers_that_fall_one_by_one_are_seldom_recorded(forward, library, monkeypatch):
    recorded = []

    def noted(slab, num_tokens, room):
        recorded.append(num_tokens)
        return Recorder(slab, num_tokens, room)

    monkeypatch.setattr(programs, "Recorder", noted)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for num_tokens in range(128, 64, -1):
        wrapped(*inputs(num_tokens, 0), Attend())
    assert recorded == [127, 125, 121, 113, 97, 65]


def test_what_torch_computes_of_few_tokens_may_be_kept(library):
    kept = {}

    def extra(x):
        return x + kept.setdefault("table", torch.arange(64) * 0.5)

    forward = Forward(library, extra)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    plain = Forward(library, lambda x: x + torch.arange(64) * 0.5)
    for seed, num_tokens in enumerate([3, 3, 4, 4, 5, 5, 3, 4]):
        if seed == 1:
            kept.clear()  # made anew while the step is recorded
        assert torch.equal(wrapped(*inputs(num_tokens, seed), Attend()), plain(*inputs(num_tokens, seed), Attend()))


@pytest.mark.parametrize(
    "extra",
    [
        lambda x: x * float(x[0, 0]),
        lambda x: x[x[:, 0] > 0],
        lambda x: x + x.max().item(),
    ],
    ids=["reads a value", "a shape by values", "reads the largest"],
)
def test_a_pass_that_depends_on_values_is_not_recorded(library, extra):
    forward = Forward(library, extra)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for seed in range(5):
        result = wrapped(*inputs(6, seed), Attend())
        assert torch.equal(result, extra(Forward(library)(*inputs(6, seed), Attend())))


def test_an_error_of_the_function_is_its_own(library):
    def fail(x):
        raise ArithmeticError("of the function")

    forward = Forward(library, fail)
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="of the function"):
            wrapped(*inputs(2, 0), Attend())
    forward.extra = lambda x: x
    assert torch.equal(wrapped(*inputs(2, 1), Attend()), forward(*inputs(2, 1), Attend()))


def test_pieces_of_the_slab_are_used_again_when_no_array_holds_them():
    slab = Slab(1 << 16)
    first = slab.empty((100,), torch.float32)
    place = first.data_ptr()
    view = first[10:20]
    del first
    assert slab.empty((100,), torch.float32).data_ptr() != place
    kept = slab.empty((8,), torch.int64)
    assert kept.data_ptr() % 64 == 0
    assert not place <= kept.data_ptr() < place + 400
    del view
    gc.collect()
    assert slab.empty((100,), torch.float32).data_ptr() == place


def test_a_pass_that_needs_too_much_memory_is_refused():
    recorder = Recorder(Slab(1 << 16))
    with pytest.raises(NotRecordableError, match="more than"), recorder:
        torch.empty(1 << 15)


def test_torchs_part_of_a_program_has_one_thread(forward, library):
    """Threads of two pools would wait for each other on the same processors."""
    wrapped = StepPrograms(library, (forward.ops,)).wrap(forward)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in range(2):
            wrapped(*inputs(3, seed), Attend())
        with ThreadsOfCosine() as cosines:
            wrapped(*inputs(3, 2), Attend())
        assert cosines.seen == [1]
    finally:
        torch.set_num_threads(before)
