"""What judges weights held as integers: the suite's own packing and rounding agree with core's, and see faults."""

import dataclasses

import pytest
import torch

from zif.contract import Capabilities, Feature, Numerics
from zif.reference import quantization as reference
from zif_conformance.bundle import judge
from zif_conformance.claims import capabilities_json, claim_name
from zif_conformance.gates import nmse_of_rows
from zif_conformance.oracle.inputs import Inputs, moved
from zif_conformance.oracle.quantization import draw_weight, exact_product, numbers_of_rows, rounded_weight
from zif_conformance.oracle.quantized_cases import SCHEMES, experts_cases, product_cases
from zif_conformance.profiles import PROFILE_NAMES, profile
from zif_conformance.tiny_models.checkpoints import VOCAB_SIZE
from zif_conformance.tiny_models.models import prompt_tokens
from zif_conformance.tiny_models.quantized import FORMATS, write_packed_codes, write_rounded

_CLAIMS = Capabilities(
    dtypes=(Numerics("float32", "float32"),),
    features=frozenset(Feature),
    kv_dtypes=("float32",),
    block_sizes=(8,),
    max_head_size=512,
)
_QUANTIZED = [feature for feature in Feature if feature.value.startswith("quantization.w")]


def _ignore(gate, error, limit, what=""):
    """Be a `Record` that does nothing."""


@pytest.mark.parametrize("name", SCHEMES)
def test_a_drawn_weight_is_what_the_contract_holds(name):
    scheme = SCHEMES[name]
    weight = draw_weight(Inputs("float32"), scheme, 2, 5, 2 * (scheme.group_size or 11))
    held = weight.held()
    assert torch.equal(reference.unpack(held).long(), weight.codes)
    assert torch.equal(reference.dequantize(held, torch.float64), weight.elements())
    assert (held.zeros is None) != scheme.zero_points


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_rounding_a_weight_leaves_at_most_a_code(name, scale_dtype):
    scheme = SCHEMES[name]
    weight = Inputs("float32").normal(7, 3 * (scheme.group_size or 10))
    rounded = rounded_weight(weight, scheme, scale_dtype)
    steps = rounded.scales.abs().repeat_interleave(rounded.group_size, -1)
    # Half a code, where codes go as far up as down. A scale in float16 may be too small by a rounding step.
    most = 0.5 if scheme.bits == 8 and not scheme.zero_points else 1.0
    slack = 1e-5 if scale_dtype == torch.float32 else 256 * 2.0**-11
    assert ((rounded.elements() - weight.double()).abs() <= (most + slack) * steps).all()
    assert torch.equal(rounded.scales.to(scale_dtype).float(), rounded.scales)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.zero_points])
def test_rounding_a_weight_is_what_core_says(name):
    weight = Inputs("float32").normal(9, 4 * (SCHEMES[name].group_size or 10))
    ours, theirs = rounded_weight(weight, SCHEMES[name], torch.float32), reference.quantize(weight, SCHEMES[name])
    assert torch.equal(ours.held().codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_rows_is_what_core_says(dtype):
    x = Inputs(dtype).special(64, 33)
    codes, scales = reference.quantize_rows(x)
    numbers = codes.double() * scales.double()
    assert torch.equal(numbers_of_rows(x).nan_to_num(0.5), numbers.nan_to_num(0.5))


def test_doubt_moves_what_lies_between_two_codes_alone():
    x = torch.tensor([[127.0, 0.499, 0.501, 0.4, 2.502, -3.499, 5.0]])
    assert numbers_of_rows(x, 0.01).tolist() == [[127.0, 1.0, 0.0, 0.0, 2.0, -4.0, 5.0]]
    assert numbers_of_rows(x).tolist() == [[127.0, 0.0, 1.0, 0.0, 3.0, -3.0, 5.0]]


@pytest.mark.parametrize("feature", _QUANTIZED, ids=str)
def test_every_feature_has_schemes_of_all_kinds(feature):
    schemes = [scheme for scheme in SCHEMES.values() if scheme.feature is feature]
    kinds = {(scheme.group_size is not None, scheme.zero_points) for scheme in schemes}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    for cases in (product_cases(), experts_cases()):
        assert {case.scheme.group_size is not None for case in cases if case.scheme.feature is feature} == {True, False}


@pytest.mark.parametrize("name", SCHEMES)
def test_one_wrong_row_of_many_is_seen(name):
    draw = Inputs("bfloat16")
    weight = draw_weight(draw, SCHEMES[name], 40, 2 * (SCHEMES[name].group_size or 24))
    x = draw.normal(300, weight.codes.shape[-1])
    wanted = exact_product(x, weight, None)
    assert nmse_of_rows(wanted.to(x.dtype), wanted, "bfloat16").passed
    wanted[17] = wanted[18].clone()
    assert not nmse_of_rows(exact_product(x, weight, None), wanted, "bfloat16").passed


def test_arguments_within_arguments_are_moved():
    call = experts_cases()[0].call(Inputs("float32"))
    seen = []
    (held,) = moved((call.weights.held(),), lambda tensor: seen.append(tensor) or tensor.clone())
    assert len(seen) == 4
    assert held.down.codes is not seen[2]
    assert torch.equal(held.down.codes, seen[2])
    assert moved((call.activation, None, 3), torch.Tensor.clone) == (call.activation, None, 3)


@pytest.mark.parametrize("name", [name for name in PROFILE_NAMES if name.startswith("quantized-")])
def test_a_profile_of_one_claim_selects_its_tests(name):
    chosen, core = profile(name), profile("core")
    assert chosen.claim == claim_name(Feature("quantization." + name.removeprefix("quantized-")))
    assert chosen.selection == set(chosen.must_pass) < set(core.must_pass)
    assert core.selection is None
    assert {test_id.partition(".")[0] for test_id in chosen.must_pass} == set(chosen.levels) == {"L2", "L5"}


@pytest.mark.parametrize("feature", _QUANTIZED, ids=str)
def test_a_platform_that_does_not_claim_it_is_not_conformant(feature):
    chosen = profile(feature.value.replace("quantization.", "quantized-"))
    without = dataclasses.replace(_CLAIMS, features=frozenset(Feature) - {feature})
    assert judge.profile_errors(chosen, capabilities_json(_CLAIMS)) == []
    assert judge.profile_errors(profile("core"), capabilities_json(without)) == []
    for declared in (capabilities_json(without), None):
        (error,) = judge.profile_errors(chosen, declared)
        assert f"{chosen.name} is about feature:{feature.value}" in error


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    names = ("compressed-w8a8", "awq-w4a16-zeros")
    return {
        **{name: write_packed_codes(root / name, _CLAIMS, name) for name in names},
        "int8": write_rounded(root / "int8", _CLAIMS, "dense", 8),
        "experts-int4": write_rounded(root / "experts-int4", _CLAIMS, "experts", 4),
    }


def _best(truth, prompt, length):
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(truth.exact_model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["compressed-w8a8", "awq-w4a16-zeros", "int8", "experts-int4"])
def test_choices_are_decided_and_wrong_ones_fail(checkpoints, name):
    truth, prompt, measured = checkpoints[name].truth("float32"), prompt_tokens(30), []
    right = _best(truth, prompt, 16)
    truth.hold_tokens(lambda *entry: measured.append(entry), prompt, right)
    assert int(measured[0][3].partition(" ")[0]) >= 3
    with pytest.raises(AssertionError, match="G7"):
        truth.hold_tokens(_ignore, prompt, [(token + 1) % VOCAB_SIZE for token in right])


@pytest.mark.parametrize("name", ["compressed-w8a8", "int8"])
def test_a_scale_for_all_tokens_shows_in_log_probabilities(checkpoints, name):
    truth, prompt = checkpoints[name].truth("float32"), prompt_tokens(40)
    wrong = checkpoints[name].truth("float32").exact_model
    for module in wrong.modules():
        for hook in list(module._forward_pre_hooks):
            del module._forward_pre_hooks[hook]
            module.register_forward_pre_hook(lambda _, given: (_rounded_together(given[0]),))
    with torch.inference_mode():
        exact, other = (
            model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
            for model in (truth.exact_model, wrong)
        )
    truth.hold_logprobs(_ignore, prompt, exact)
    with pytest.raises(AssertionError, match="G7"):
        truth.hold_logprobs(_ignore, prompt, other)


def _rounded_together(x):
    scale = x.abs().max() / 127
    return (x / scale).round() * scale


def test_formats_hold_the_numbers_in_different_orders():
    """The same weight packed by each format of 4 bits with zeros: no two files are alike, so none can be mixed up."""
    weight = draw_weight(Inputs("float32"), FORMATS["awq-w4a16-zeros"].scheme, 64, 64)
    weight.zeros.clamp_(1, 15)
    packed = {name: chosen.tensors(weight) for name, chosen in FORMATS.items() if name.endswith("w4a16-zeros")}
    words = {name: tensors.get("qweight", tensors.get("weight_packed")) for name, tensors in packed.items()}
    assert not torch.equal(words["gptq-w4a16-zeros"].flatten(), words["awq-w4a16-zeros"].flatten())
    assert not torch.equal(words["gptq-w4a16-zeros"].flatten(), words["compressed-w4a16-zeros"].flatten())
    assert not torch.equal(packed["gptq-w4a16-zeros"]["qzeros"], packed["gptq-v2-w4a16-zeros"]["qzeros"])
