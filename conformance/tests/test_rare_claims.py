"""Claims that the reference platform does not make: honest ones pass the tests of L2 and L4, false ones are caught."""

import pytest
import torch

from zif.contract import EagerGraphs, GraphRunner
from zif_conformance.claims import Claims
from zif_conformance.mutants.bank import Edit
from zif_conformance.mutants.patching import applied
from zif_conformance.plugin import ClaimsInTest
from zif_conformance.proof import Proof
from zif_conformance.subject import Subject
from zif_conformance.suite import test_l2_gated as gated
from zif_conformance.suite import test_l2_logits as logits
from zif_conformance.suite import test_l2_quantized_logits as quantized_logits
from zif_conformance.suite import test_l4_graphs as graphs
from zif_conformance.suite import test_l4_independence as independence
from zif_conformance.tiny_models.models import TinyModels

_PRODUCT = "product = x @ weight.float().T"
_CLAIM = "collectives=frozenset(Collective),"
_CLAIMED = Edit("platform.py", _CLAIM, "batch_invariant=True,\n    " + _CLAIM)
_ROW_BY_ROW = Edit("operators.py", _PRODUCT, "product = torch.stack([weight.float() @ row for row in x])")
_LOGITS = "return _linear(hidden.float(), weight, bias)"
_GATED = "return _gated(gate_up, activation).to(x.dtype)"
_LEFT = Edit("operators.py", _LOGITS, "return None")
_LEFT_CODES = Edit("operators.py", "return quantized_product(hidden.float(), weight, bias)", "return None")
_QUERY_BY_QUERY = Edit(
    "attention.py",
    "score(queries, keys, values, request.visible, params)",
    "torch.cat([score(queries[:, i : i + 1], keys[:, seen], values[:, seen], seen[None, seen], params)"
    " for i, seen in enumerate(request.visible)], 1)",
)


def _ignore(gate, error, limit, what=""):
    """Be a `Record` that does nothing."""


def _shapes(arguments):
    return tuple(argument.shape for argument in arguments)


class _ByShape(GraphRunner):
    """Know each shape from its first use on, and do the same for all calls."""

    def wrap(self, function):
        known = {}

        def call(*arguments):
            return known.setdefault(_shapes(arguments), function)(*arguments)

        return call


class _Replaying(GraphRunner):
    """Give what the first call of each shape gave."""

    def wrap(self, function):
        known = {}

        def call(*arguments):
            if _shapes(arguments) not in known:
                known[_shapes(arguments)] = function(*arguments)
            return known[_shapes(arguments)]

        return call


class _OneOutput(_ByShape):
    """Put the results of a shape into the same memory."""

    def wrap(self, function):
        outputs = {}

        def call(*arguments):
            result = function(*arguments)
            return outputs.setdefault(_shapes(arguments), torch.empty_like(result)).copy_(result)

        return call


class _FirstArguments(_ByShape):
    """Copy arguments into those of the first call of a shape, and write there."""

    def wrap(self, function):
        captured = {}

        def call(*arguments):
            kept = captured.setdefault(_shapes(arguments), arguments)
            for place, argument in zip(kept, arguments, strict=True):
                place.copy_(argument)
            return function(*kept)

        return call


class _Device:
    array_device = "cpu"

    def __init__(self, graph_runner):
        self.graphs = graph_runner


@pytest.fixture
def claims():
    return ClaimsInTest(Claims(frozenset({"graph_capture"}), (), 64), Proof([]))


def _all_tests(device, claims):
    graphs.test_who_claims_to_capture_does(device)
    graphs.test_a_wrapped_function_keeps_its_meaning(device, claims, _ignore)
    graphs.test_results_and_arguments_outlive_the_next_call(device, claims, _ignore, 3)
    graphs.test_what_a_function_writes_goes_where_this_call_says(device, claims, _ignore)
    graphs.test_an_error_reaches_the_caller_and_the_next_call_works(device, _ignore)


def test_graphs_that_keep_the_meaning_pass(claims):
    _all_tests(_Device(_ByShape()), claims)


def test_a_claim_to_capture_without_graphs_is_caught():
    with pytest.raises(AssertionError, match="run as they are"):
        graphs.test_who_claims_to_capture_does(_Device(EagerGraphs()))


@pytest.mark.parametrize("faulty", [_Replaying, _OneOutput, _FirstArguments])
def test_graphs_that_change_the_meaning_are_caught(claims, faulty):
    with pytest.raises(AssertionError, match="G1"):
        _all_tests(_Device(faulty()), claims)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("models"), Subject.find("reference"))


@pytest.mark.parametrize("family", independence._DECODED)
def test_rows_and_queries_one_by_one_do_not_depend_on_the_batch(tiny, family):
    with applied([_CLAIMED, _ROW_BY_ROW, _QUERY_BY_QUERY]):
        independence.test_not_a_bit_depends_on_the_batch(tiny, _ignore, family, 7)


def test_products_of_all_rows_at_once_do(tiny):
    with applied([_CLAIMED]), pytest.raises(AssertionError, match="G1"):
        independence.test_not_a_bit_depends_on_the_batch(tiny, _ignore, "dense", 7)


def _logits_by_batch(*edits):
    with applied([_CLAIMED, *edits]):
        logits.test_bits_do_not_depend_on_the_batch(Subject.find("reference"), "float32", True, 17, _ignore)


@pytest.mark.parametrize("edits", [(), (_LEFT,)], ids=["given", "left to linear"])
def test_logits_row_by_row_do_not_depend_on_the_batch(edits):
    _logits_by_batch(_ROW_BY_ROW, *edits)


@pytest.mark.parametrize("operator", ["logits", "linear"])
def test_logits_summed_otherwise_in_odd_batches_do(operator):
    with pytest.raises(AssertionError, match="G1"):
        _logits_by_batch(*_summed_otherwise(operator))


def _quantized_logits_by_batch(*edits):
    with applied([_CLAIMED, *edits]):
        quantized_logits.test_bits_do_not_depend_on_the_batch(Subject.find("reference"), "float32", "w8a16", _ignore)


def _by_rows(call, rows):
    """Return an edit by which a quantized product is taken row by row, and one where it differs in odd batches."""
    part = call.replace(rows, f"{rows}[i : i + 1]")
    by_row = f"torch.cat([{part} for i in range(len({rows}))])"
    return Edit("operators.py", call, by_row), Edit("operators.py", call, f"{by_row} * (1 + len({rows}) % 2 * 2**-20)")


@pytest.mark.parametrize(
    ("call", "rows", "edits"),
    [
        ("quantized_product(hidden.float(), weight, bias)", "hidden", ()),
        ("quantized_product(x.float(), weight, bias).to(x.dtype)", "x", (_LEFT_CODES,)),
    ],
    ids=["given", "left to quantized_linear"],
)
def test_logits_of_codes_row_by_row_do_not_depend_on_the_batch_and_others_do(call, rows, edits):
    by_row, by_batch = _by_rows(call, rows)
    _quantized_logits_by_batch(by_row, *edits)
    with pytest.raises(AssertionError, match="G1"):
        _quantized_logits_by_batch(by_batch, *edits)


def _gated_by_batch(*edits):
    with applied([_CLAIMED, *edits]):
        gated.test_bits_do_not_depend_on_the_batch(Subject.find("reference"), "float32", 17, _ignore)


def _gated_codes_by_batch(*edits):
    with applied([_CLAIMED, *edits]):
        gated.test_bits_of_codes_do_not_depend_on_the_batch(Subject.find("reference"), "float32", "w8a16", _ignore)


def test_gated_products_row_by_row_do_not_depend_on_the_batch():
    _gated_by_batch(_ROW_BY_ROW)
    codes = "gate_up = torch.cat([quantized_product(x[i : i + 1].float(), weight, bias) for i in range(len(x))])"
    _gated_codes_by_batch(Edit("operators.py", "gate_up = quantized_product(x.float(), weight, bias)", codes))


@pytest.mark.parametrize("run", [_gated_by_batch, _gated_codes_by_batch], ids=["numbers", "codes"])
def test_gated_products_of_odd_batches_that_differ_do(run):
    turned = "if len(x) % 2:\n            gate_up = gate_up * (1 + 2**-20)\n        "
    with pytest.raises(AssertionError, match="G1"):
        run(_ROW_BY_ROW, Edit("operators.py", _GATED, turned + _GATED))


def _summed_otherwise(operator):
    """Return edits by which batches of an odd number of rows are summed from the last channel to the first."""
    if operator == "logits":
        turned = "return _linear(hidden.float().flip(1), weight.flip(1), bias) if len(hidden) % 2 else "
        return [Edit("operators.py", _LOGITS, _LOGITS.replace("return ", turned))]
    product = "product = x.flip(1) @ weight.float().T.flip(0) if len(x) % 2 else x @ weight.float().T"
    return [_LEFT, Edit("operators.py", _PRODUCT, product)]
