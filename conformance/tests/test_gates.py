"""Each gate sees the fault that it is there for, and passes what is legitimate."""

import math

import pytest
import torch

from zif_conformance.gates import (
    GateResult,
    borders,
    exact,
    guarded,
    hold,
    model_divergence,
    model_top1,
    nmse,
    nmse_of_rows,
    proof,
    prove,
    ratio,
    scaling,
    specials,
    ulp,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nothing(*_):
    """Record nothing."""


class TestResult:
    def test_headroom_is_how_often_the_measured_value_fits(self):
        assert GateResult("G3", 0.5, 2.0).headroom == 4.0
        assert GateResult("G3", 0.0, 2.0).headroom == math.inf

    def test_nan_never_passes(self):
        assert not GateResult("G3", math.nan, 1.0).passed
        assert not GateResult("G3", 1.0, math.nan).passed

    def test_hold_records_all_and_names_each_failure(self):
        seen = []
        results = [GateResult("G1", 0, 0, "first"), GateResult("G2", 2, 1, "second"), GateResult("G3", 3, 1, "third")]
        with pytest.raises(AssertionError, match=r"(?s)G2: second: measured 2, limit 1.*G3: third"):
            hold(lambda *what: seen.append(what), *results)
        assert [what[0] for what in seen] == ["G1", "G2", "G3"]
        hold(nothing, results[0])


class TestExact:
    def test_one_bit_is_seen(self):
        tensor = normal(3, 5)
        other = tensor.clone()
        other.view(torch.int32)[1, 2] ^= 1
        result = exact(other, tensor)
        assert (result.measured, result.passed) == (1.0, False)
        assert "element 7" in result.message

    def test_zeros_of_other_sign_and_nan_payloads_differ_and_equal_nan_do_not(self):
        assert not exact(torch.tensor([-0.0]), torch.tensor([0.0])).passed
        assert exact(torch.tensor([math.nan]), torch.tensor([math.nan])).passed

    @pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, 1), torch.zeros(3).double(), torch.zeros(0)])
    def test_other_shapes_and_dtypes_fail(self, wrong):
        assert not exact(wrong, torch.zeros(3)).passed

    def test_empty_and_strided_tensors_are_compared(self):
        assert exact(torch.zeros(0, 3), torch.zeros(0, 3)).passed
        assert exact(normal(4, 6)[:, ::2], normal(4, 6)[:, ::2].contiguous()).passed

    @pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1,)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8])
    def test_sentinels_see_writes_on_either_side(self, shape, dtype):
        content = torch.ones(shape, dtype=dtype)
        guard = guarded(content, "cpu")
        guard.tensor.fill_(7)
        assert guard.untouched().passed
        guard.memory[255] = 0
        guard.memory[-256] = 0
        assert guard.untouched().measured == 2


class TestUlp:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_correct_rounding_passes_and_two_steps_do_not(self, dtype):
        wide = normal(1000).double()
        rounded = wide.to(dtype)
        assert ulp(rounded, wide, 1).passed
        limits = torch.finfo(dtype)
        assert not ulp((wide * (1 + 2 * limits.eps)).to(dtype), wide, 1).passed

    def test_operations_in_float32_are_allowed_for_and_no_more(self):
        wide = torch.full((8,), 1.5, dtype=torch.float64)
        eps = torch.finfo(torch.float32).eps
        assert ulp((wide + 3 * eps).float(), wide, 4).passed
        assert not ulp((wide + 8 * eps).float(), wide, 4).passed

    def test_cancelled_terms_count_by_their_size(self):
        got, wide = torch.tensor([1e-7]), torch.tensor([2e-8]).double()
        assert not ulp(got, wide, 2).passed
        assert ulp(got, wide, 2, torch.tensor([1.0])).passed

    def test_flushed_subnormals_pass_except_in_float16(self):
        for dtype, passes in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False)):
            tiny = torch.tensor([torch.finfo(dtype).tiny / 2], dtype=torch.float64)
            assert ulp(torch.zeros(1, dtype=dtype), tiny, 1).passed is passes

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_no_numbers_fail(self, bad):
        assert not ulp(torch.tensor([bad]), torch.tensor([1.0]).double(), 100).passed
        assert not ulp(torch.zeros(2), torch.zeros(3), 1).passed


class TestRatio:
    def product(self, dtype, tokens=16, inner=512, outer=32):
        left, right = normal(tokens, inner).to(dtype), normal(inner, outer, seed=1).to(dtype)
        return left, right, left.double() @ right.double(), (left.float() @ right.float()).to(dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tile", [16, 64, 512])
    def test_other_tiles_and_orders_pass(self, dtype, tile):
        left, right, wide, declared = self.product(dtype)
        parts = [left[:, k : k + tile].float() @ right[k : k + tile].float() for k in range(0, left.shape[1], tile)]
        for order in (parts, parts[::-1]):
            assert ratio(torch.stack(order).sum(0).to(dtype), wide, [declared]).passed

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_dropped_term_is_seen(self, dtype):
        left, right, wide, declared = self.product(dtype)
        dropped = (left[:, :-1].float() @ right[:-1].float()).to(dtype)
        result = ratio(dropped, wide, [declared], "product")
        assert not result.passed
        assert "row" in result.message

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sums_in_few_bits_are_seen(self, dtype):
        left, right, wide, declared = self.product(dtype, inner=2048)
        total = torch.zeros_like(declared)
        for k in range(left.shape[1]):
            total = total + left[:, k, None] * right[k]
        assert not ratio(total, wide, [declared]).passed

    def test_one_bad_row_among_large_ones_is_seen(self):
        wide = torch.cat((normal(9, 8) * 1e6, normal(1, 8))).double()
        got = wide.float()
        assert ratio(got, wide, [wide.float()]).passed
        got[9, 3] += 1e-3
        assert not ratio(got, wide, [wide.float()]).passed

    def test_nan_and_other_shapes_fail_and_empty_passes(self):
        wide = normal(3, 4).double()
        got = wide.float()
        got[1, 1] = math.nan
        assert not ratio(got, wide, [wide.float()]).passed
        assert not ratio(wide.float()[:2], wide, [wide.float()]).passed
        assert ratio(torch.zeros(0, 4), torch.zeros(0, 4).double(), [torch.zeros(0, 4)]).passed


class TestNmse:
    @pytest.mark.parametrize(("stored", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
    def test_rounding_passes_and_a_lost_element_does_not(self, stored, dtype):
        expected = normal(100)
        assert nmse(expected.to(dtype), expected, stored).passed
        wrong = expected.clone()
        wrong[7] = 5.0
        assert not nmse(wrong, expected, stored).passed

    def test_a_scale_applied_twice_is_seen_in_every_format(self):
        for stored in ("int8", "fp8", "fp4"):
            assert not nmse(normal(100) * 0.5, normal(100), stored).passed

    def test_zeros_nan_shapes_and_unknown_formats(self):
        assert nmse(torch.zeros(3), torch.zeros(3), "fp4").passed
        assert not nmse(torch.ones(3), torch.zeros(3), "fp4").passed
        assert not nmse(torch.full((3,), math.nan), torch.ones(3), "fp4").passed
        assert not nmse(torch.ones(2), torch.ones(3), "fp4").passed
        with pytest.raises(KeyError):
            nmse(torch.ones(3), torch.ones(3), "int3")

    def test_one_wrong_row_of_many_is_seen_and_one_that_cancels_is_not(self):
        expected = normal(400, 16)
        wrong = expected.clone()
        wrong[399] = expected[398]
        assert nmse(wrong, expected, "bfloat16").measured < 6e-3
        assert nmse_of_rows(wrong, expected, "bfloat16").measured > 0.5
        expected[7] = 1e-12
        assert nmse_of_rows(expected + 1e-6, expected, "float32").passed

    def test_rows_of_zeros_nan_and_shapes(self):
        assert nmse_of_rows(torch.zeros(3, 2), torch.zeros(3, 2), "fp4").passed
        assert nmse_of_rows(torch.zeros(0, 2), torch.zeros(0, 2), "fp4").passed
        assert not nmse_of_rows(torch.ones(3, 2), torch.zeros(3, 2), "fp4").passed
        assert not nmse_of_rows(torch.full((3, 2), math.nan), torch.ones(3, 2), "fp4").passed
        assert not nmse_of_rows(torch.ones(2, 2), torch.ones(3, 2), "fp4").passed


class TestScaling:
    def test_borders_are_around_blocks_and_powers_of_two(self):
        assert borders(16, 40) == (1, 2, 4, 8, 15, 16, 17, 31, 32, 33, 39, 40)
        assert borders(1, 3) == (1, 2, 3)

    def test_growth_like_the_square_root_passes_and_linear_growth_does_not(self):
        lengths = [2**k for k in range(14)]
        slow = {n: GateResult("G3", 1e-7 * n**0.5, 1.0) for n in lengths}
        assert scaling(slow).passed
        linear = {n: GateResult("G3", 1e-7 * n, 2e-7 * n) for n in lengths}
        assert all(result.passed for result in linear.values())
        assert not scaling(linear).passed

    def test_one_length_beyond_its_gate_fails_and_is_named(self):
        results = {n: GateResult("G3", 2e-7 if n == 17 else 1e-8, 1e-7) for n in (1, 15, 16, 17, 4096)}
        result = scaling(results)
        assert not result.passed
        assert "length 17" in result.message

    def test_exact_results_pass_and_one_length_is_an_error(self):
        assert scaling({n: GateResult("G1", 0.0, 0.0) for n in (1, 2)}).passed
        assert not scaling({1: GateResult("G1", 0.0, 0.0), 2: GateResult("G1", 1.0, 0.0)}).passed
        with pytest.raises(ValueError, match="at least two"):
            scaling({1: GateResult("G1", 0.0, 0.0)})


class TestSpecials:
    VALUES = torch.tensor([1.0, 0.0, math.inf, -math.inf, math.nan])

    def test_equal_kinds_pass_whatever_the_values(self):
        assert specials(torch.tensor([2.0, 5.0, math.inf, -math.inf, math.nan]), self.VALUES).passed

    @pytest.mark.parametrize("place", range(5))
    @pytest.mark.parametrize("value", [7.0, math.inf, -math.inf, math.nan])
    def test_every_other_kind_is_seen(self, place, value):
        got = self.VALUES.clone()
        got[place] = value
        same = (value == 7.0 and place < 2) or (value == got[place].item() == self.VALUES[place].item())
        same = same or (math.isnan(value) and place == 4)
        assert specials(got, self.VALUES).passed is same

    def test_the_sign_of_zero_counts_when_asked(self):
        assert specials(torch.tensor([-0.0]), torch.tensor([0.0])).passed
        assert not specials(torch.tensor([-0.0]), torch.tensor([0.0]), signed_zero=True).passed
        assert not specials(torch.zeros(2), torch.zeros(3)).passed


class TestStructure:
    def test_visible_faults_prove_and_hidden_ones_do_not(self):
        correct = torch.ones(2, 4).double()
        assert proof(correct, 1e-3, {"large": correct + 1, "nan": correct * math.nan}).passed
        hidden = proof(correct, 1e-3, {"large": correct + 1, "small": correct + 0.05})
        assert not hidden.passed
        assert "'small'" in hidden.message
        assert not proof(correct, 1e-3, {"none": correct}).passed

    def test_random_inputs_prove_nothing_at_length_4096(self):
        """The reason for needles: among random keys the last one is invisible to half precision."""
        keys, values, query = normal(4096, 64, seed=1), normal(4096, 64, seed=2), normal(1, 64, seed=3)
        weights = (query @ keys.T / 8).double().softmax(-1)
        correct = weights @ values.double()
        dropped = weights[:, :-1] / weights[:, :-1].sum() @ values[:-1].double()
        with pytest.raises(AssertionError, match="proves nothing"):
            prove(correct, [correct.bfloat16()], torch.bfloat16, {"last key dropped": dropped})

    def test_no_fault_is_no_proof(self):
        with pytest.raises(AssertionError, match="at least one"):
            prove(torch.ones(1, 2), [torch.ones(1, 2)], torch.float32, {})


class TestModel:
    def test_near_ties_may_flip_and_clear_choices_may_not(self):
        wide = torch.tensor([[1.0, 0.999, 0.0], [3.0, 1.0, 0.0]]).double()
        declared = wide + torch.tensor([0.0, 0.01, 0.0])
        assert model_top1(wide + torch.tensor([0.0, 0.002, 0.0]), wide, declared).passed
        result = model_top1(wide + torch.tensor([0.0, 2.5, 0.0]), wide, declared)
        assert (result.measured, result.passed) == (1.0, False)

    def test_divergence_of_the_reference_passes_and_ten_times_that_does_not(self):
        wide = normal(20, 50).double()
        noise = normal(20, 50, seed=1) * 0.01
        assert model_divergence(wide - noise, wide, wide + noise).passed
        assert not model_divergence(wide + 10 * noise, wide, wide + noise).passed
        assert not model_divergence(wide * math.nan, wide, wide + noise).passed
