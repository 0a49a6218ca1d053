"""Products against float64: shapes at the borders of tiles, split sums, rows apart from each other, wrong arguments."""

import math

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.linear import linear
from zif.kernels.tuning import INTERPRETER_FOLDER, LaunchConfig, Rule, Tuning

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 1, 1), (3, 7, 513), (16, 256, 64), (17, 300, 160), (65, 257, 255), (0, 64, 64), (5, 64, 0)]


def _launcher(**tiles):
    """Return a launcher whose products all have these tiles, or else those of the interpreter's table."""
    given = {"ROWS": 16, "COLUMNS": 16, "INNER": 16, "GROUP": 1, "DIES": 1, "SPLITS": 1} | tiles
    rules = {"linear": [Rule((), LaunchConfig(tuple(given.items())))]} if tiles else {}
    merge = {"merge_splits": [Rule((), LaunchConfig((("ELEMENTS", 64),)))]} if tiles else {}
    return InterpretedLauncher(Tuning([rules, merge]) if tiles else Tuning.read(INTERPRETER_FOLDER))


def _draw(rows, columns, inner, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner) / math.sqrt(max(inner, 1))
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


def _check(got, x, weight, bias=None):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == x.dtype
    error = DTYPES[x.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_equals_the_product_in_float64(dtype, shape, biased, batch_invariant):
    x, weight, bias = _draw(*shape, dtype)
    given = bias if biased else None
    _check(linear(_launcher(), x, weight, given, batch_invariant=batch_invariant), x, weight, given)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("dies", [1, 4, 8])
def test_every_tile_is_computed_in_any_order(group, dies):
    x, weight, _ = _draw(70, 50, 16)
    _check(linear(_launcher(GROUP=group, DIES=dies), x, weight, None), x, weight)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("inner", [16, 40, 97])
def test_splits_add_up_even_where_some_are_empty(splits, inner):
    x, weight, bias = _draw(5, 33, inner)
    _check(linear(_launcher(SPLITS=splits), x, weight, bias), x, weight, bias)


def test_splits_are_added_in_their_order():
    x = torch.tensor([[1e8] + [0.0] * 15 + [1.0] + [0.0] * 15 + [-1e8] + [0.0] * 15]).repeat(2, 1)
    got = linear(_launcher(SPLITS=3), x, torch.ones(16, 48), None)
    assert (got == 0).all(), "(1e8 + 1) - 1e8 is 0 in float32, and 1 in another order"


def test_rows_may_be_strided_and_of_any_leading_shape():
    x, weight, bias = _draw(6, 20, 192)
    wide = torch.full((20, 300), math.nan)
    wide[:, :64] = weight[:, :64]
    _check(linear(_launcher(), x[:, 64:128], wide[:, :64], bias), x[:, 64:128], weight[:, :64], bias)
    assert torch.equal(
        linear(_launcher(), x.view(2, 3, 192), weight, bias), linear(_launcher(), x, weight, bias).view(2, 3, 20)
    )


@pytest.mark.parametrize("rows", [6, 40])
def test_a_row_does_not_see_other_rows(rows):
    x, weight, bias = _draw(rows, 48, 200, torch.bfloat16)
    clean = linear(_launcher(), x, weight, bias)
    x[2, 3], x[4, 0], x[-1, 5] = math.nan, math.inf, math.nan
    dirty = linear(_launcher(), x, weight, bias)
    others = [row for row in range(rows) if row not in (2, 4, rows - 1)]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[2].isnan().all()
    assert not dirty[4].isfinite().any()


def test_batch_invariant_rows_have_the_same_bits_in_any_batch():
    x, weight, bias = _draw(90, 33, 300)
    together = linear(_launcher(), x, weight, bias, batch_invariant=True)
    for count in (1, 17, 64):
        assert torch.equal(linear(_launcher(), x[:count], weight, bias, batch_invariant=True), together[:count])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, w, b: (x, w[:, 1:], b), "inner sizes"),
        (lambda x, w, b: (x, w, b[1:]), r"bias of shape \[7\]"),
        (lambda x, w, b: (x, w.half(), b), "dtype of x"),
        (lambda x, w, b: (x.double(), w.double(), b), "float64"),
        (lambda x, w, b: (x.repeat(1, 2)[:, ::2], w, b), "stride 2"),
        (lambda x, w, b: (x, w.repeat(1, 2)[:, ::2], b), "stride 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        linear(_launcher(), *spoil(*_draw(4, 8, 6)))
