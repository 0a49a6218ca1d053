"""L0, the plan: every feature asked for is answered, and what cannot run is refused with reasons and a next step."""

import re
from dataclasses import replace

import pytest

from zif.contract import AttentionSpec, Capabilities, DeviceInfo, Feature, Outcome, Plan, Refusal, Workload, slab_arena
from zif_conformance.describe import module_fingerprint, names_code
from zif_conformance.marks import conforms
from zif_conformance.package.fresh import run_fresh
from zif_conformance.subject import Subject

_NEXT_STEP = re.compile(
    r"\b(choose|use|set|lower|raise|do without|install|reduce|increase|pick|try|free)\b", re.IGNORECASE
)
_HUGE = 1 << 62


def _refused(subject: Subject, workload: Workload) -> Refusal:
    """Return the refusal; every reason of it must say what to do."""
    answer = subject.platform.plan(workload)
    assert isinstance(answer, Refusal), f"planned what it cannot run: {answer!r}"
    assert answer.platform == subject.name
    assert answer.reasons, "a refusal without a reason"
    for reason in answer.reasons:
        assert _NEXT_STEP.search(reason), f"reason {reason!r} names no next step"
    return answer


def _with_spec(subject: Subject, **changes: object) -> Workload:
    workload = subject.workload()
    spec = workload.kv_specs[0]
    return replace(workload, kv_specs=(replace(spec, **changes),))  # type: ignore[type-var]


@conforms(level="L0", clause=("4.1", "4.2"))
@pytest.mark.parametrize("feature", list(Feature), ids=str)
def test_feature_is_answered(subject: Subject, capabilities: Capabilities, feature: Feature) -> None:
    size = 2 if feature is Feature.TENSOR_PARALLEL else 1
    workload = subject.workload(features=frozenset({feature}), tensor_parallel_size=size)
    answer = subject.platform.plan(workload)
    if isinstance(answer, Refusal):
        assert feature not in capabilities.features, f"claims {feature}, and refuses it: {answer.reasons!r}"
        assert any(feature.value in reason for reason in _refused(subject, workload).reasons)
        return
    decisions = {decision.feature: decision for decision in answer.decisions}
    assert feature.value in decisions, f"nothing in the plan answers {feature}"
    decision = decisions[feature.value]
    assert decision.outcome is not Outcome.REFUSED, "a plan holds a refused feature"
    assert decision.detail, f"nothing says how {feature} is served"
    assert feature in capabilities.features or decision.outcome is Outcome.EMULATED, "served without being claimed"


@conforms(level="L0", clause="4.2")
def test_kinds_of_state_are_answered_without_being_named(subject: Subject) -> None:
    workload = subject.workload(features=frozenset())
    decided = {decision.feature for decision in subject.plan(workload).decisions}
    assert {spec.feature.value for spec in workload.kv_specs} <= decided


@conforms(level="L0", clause=("4.2", "4.3"), negative=True)
def test_unclaimed_features_are_refused_all_at_once(subject: Subject, capabilities: Capabilities) -> None:
    asked = frozenset(Feature)
    answer = subject.platform.plan(subject.workload(features=asked, tensor_parallel_size=2))
    if isinstance(answer, Plan):
        decided = {decision.feature for decision in answer.decisions if decision.outcome is not Outcome.REFUSED}
        assert {feature.value for feature in asked} <= decided
        return
    refused = {feature for feature in asked if any(feature.value in reason for reason in answer.reasons)}
    assert not refused & capabilities.features
    unserved = asked - capabilities.features - refused
    emulated = {
        f for f in unserved if isinstance(subject.platform.plan(subject.workload(features=frozenset({f}))), Plan)
    }
    assert unserved == emulated, f"no reason names {sorted(unserved - emulated)!r}"


@conforms(level="L0", clause="4.3", negative=True)
@pytest.mark.parametrize("dtype", ["int3", "float8_e4m3fnuz", ""])
def test_unclaimed_dtype_is_refused(subject: Subject, capabilities: Capabilities, dtype: str) -> None:
    if capabilities.numerics(dtype) is None:
        reasons = _refused(subject, subject.workload(dtype=dtype)).reasons
        assert any(repr(dtype) in reason for reason in reasons), reasons
    else:
        assert isinstance(subject.platform.plan(subject.workload(dtype=dtype)), Plan)


@conforms(level="L0", clause="4.3", negative=True)
def test_unclaimed_kv_dtype_is_refused(subject: Subject) -> None:
    reasons = _refused(subject, _with_spec(subject, dtype="int3")).reasons
    assert any("int3" in reason for reason in reasons), reasons


@conforms(level="L0", clause="4.3", negative=True)
@pytest.mark.parametrize("wrong", ["above the largest", "zero", "negative"])
def test_unclaimed_head_size_is_refused(subject: Subject, capabilities: Capabilities, wrong: str) -> None:
    largest = max(capabilities.head_sizes, default=capabilities.max_head_size)
    size = {"above the largest": largest + 1, "zero": 0, "negative": -64}[wrong]
    reasons = _refused(subject, subject.workload(head_sizes=(size,))).reasons
    assert any(str(size) in reason for reason in reasons), reasons


@conforms(level="L0", clause="4.3", negative=True)
def test_unclaimed_head_size_of_a_layer_group_is_refused(subject: Subject, capabilities: Capabilities) -> None:
    spec = subject.workload().kv_specs[0]
    too_large = capabilities.max_head_size + 1
    if isinstance(spec, AttentionSpec):
        workload = _with_spec(subject, head_dim=too_large)
    else:
        workload = subject.workload(head_sizes=(too_large,))
    assert any(str(too_large) in reason for reason in _refused(subject, workload).reasons)


@conforms(level="L0", clause="4.3", negative=True)
def test_unclaimed_block_size_is_refused(subject: Subject, capabilities: Capabilities) -> None:
    size = next(size for size in range(3, 1 << 20) if size not in capabilities.block_sizes)
    reasons = _refused(subject, _with_spec(subject, block_size=size)).reasons
    assert any(str(size) in reason for reason in reasons), reasons


@conforms(level="L0", clause="4.3", negative=True)
def test_every_reason_comes_at_once(subject: Subject, capabilities: Capabilities) -> None:
    size = next(size for size in range(3, 1 << 20) if size not in capabilities.block_sizes)
    workload = replace(_with_spec(subject, block_size=size, dtype="int3"), dtype="int5", head_sizes=(_HUGE,))
    reasons = _refused(subject, workload).reasons
    for wrong in ("int3", "int5", str(size), str(_HUGE)):
        assert any(wrong in reason for reason in reasons), f"{wrong!r} is missing in {reasons!r}"


@conforms(level="L0", clause="4.3", negative=True)
@pytest.mark.parametrize("too_much", ["weights", "activations", "limit"])
def test_memory_is_refused_with_its_bytes(subject: Subject, device_info: DeviceInfo, too_much: str) -> None:
    small = subject.workload()
    changes = {
        "weights": {"weight_bytes": device_info.memory_bytes + 1},
        "activations": {"activation_bytes": device_info.memory_bytes + 1},
        "limit": {"memory_limit_bytes": small.weight_bytes // 2},
    }[too_much]
    workload = subject.workload(**changes)
    text = " ".join(_refused(subject, workload).reasons)
    assert str(workload.weight_bytes) in text, f"the bytes of the weights are missing: {text}"
    assert str(workload.activation_bytes) in text, f"the bytes of the activations are missing: {text}"
    assert "KV" in text, f"the bytes of the KV blocks are missing: {text}"


@conforms(level="L0", clause=("4.3", "4.4"), negative=True)
@pytest.mark.parametrize("kv_bytes", [1, 4096])
def test_cache_too_small_for_one_request_is_refused(subject: Subject, kv_bytes: int) -> None:
    reasons = _refused(subject, subject.workload(kv_bytes=kv_bytes, max_model_len=1 << 20)).reasons
    assert any(str(1 << 20) in reason for reason in reasons), reasons


@conforms(level="L0", clause="4.3", negative=True)
def test_endless_context_is_refused(subject: Subject) -> None:
    _refused(subject, subject.workload(max_model_len=1 << 50))


@conforms(level="L0", clause="4.1")
def test_plan_repeats_itself(subject: Subject) -> None:
    workload = subject.workload(memory_limit_bytes=64 << 20)
    assert subject.plan(workload) == subject.plan(workload)


@conforms(level="L0", clause="4.1", negative=True)
def test_plan_opens_no_device(subject: Subject) -> None:
    assert run_fresh("opened_device_files", subject.name) == []


@conforms(level="L0", clause=("1.7", "4.1"), negative=True)
def test_plan_changes_no_process_state(subject: Subject) -> None:
    assert run_fresh("changed_process_state", subject.name, "plan") == []


@conforms(level="L0", clause="4.1", negative=True)
def test_refusal_leaves_the_next_plan_alone(subject: Subject) -> None:
    workload = subject.workload(memory_limit_bytes=64 << 20)
    before = subject.plan(workload)
    _refused(subject, replace(workload, dtype="int3"))
    assert subject.plan(workload) == before


@conforms(level="L0", clause="4.4")
@pytest.mark.parametrize("max_model_len", [1, 255, 4096])
def test_cache_holds_one_request(subject: Subject, max_model_len: int) -> None:
    plan = subject.plan(subject.workload(max_model_len=max_model_len))
    arena = slab_arena(plan.memory.kv_bytes, plan.kv_groups)
    for index, group in enumerate(plan.kv_groups):
        lent = sum(len(arena.slab_blocks(index, slab)) for slab in range(1, arena.num_slabs))
        needed = min(group.spec.num_blocks(max_model_len), group.spec.peak_blocks(max_model_len, 1))
        assert lent >= needed, f"{lent} blocks for a request that needs {needed}"


@conforms(level="L0", clause="4.4")
def test_memory_of_the_plan_fits(subject: Subject) -> None:
    limit = 96 << 20
    memory = subject.plan(subject.workload(memory_limit_bytes=limit)).memory
    assert memory.available_bytes <= limit
    assert memory.weight_bytes + memory.activation_bytes + memory.kv_bytes <= memory.available_bytes


@conforms(level="L0", clause="4.1")
def test_plan_is_for_a_device_of_the_probe(subject: Subject) -> None:
    plan = subject.plan(subject.workload())
    assert plan.platform == subject.name
    assert plan.device_id in {device.device_id for device in subject.platform.probe().devices}


@conforms(level="L0", clause="9.1")
def test_implementations_can_be_found(subject: Subject) -> None:
    implementations = subject.plan(subject.workload()).implementations
    assert implementations, "the plan names nothing that serves it"
    services = [service for service, _ in implementations]
    assert len(set(services)) == len(services), f"a service is named twice: {services!r}"
    for service, code in implementations:
        found = code == "core" or (module_fingerprint(code)["sha256"] and names_code(code))
        assert found, f"{service}: {code!r} is no code that can be found"


@conforms(level="L0", clause="4.5")
def test_constraints_can_be_met(subject: Subject) -> None:
    constraints = subject.plan(subject.workload()).constraints
    for buckets in (constraints.token_buckets, constraints.batch_buckets):
        assert list(buckets) == sorted(set(buckets)), f"buckets {buckets!r} must rise"
        assert all(bucket >= 1 for bucket in buckets)
    assert constraints.token_alignment >= 1
    assert not constraints.token_buckets or constraints.token_buckets[-1] >= constraints.token_alignment
