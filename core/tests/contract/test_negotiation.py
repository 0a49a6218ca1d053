"""Negotiation: every feature decided, every reason at once, the cache sized; and the arena's slabs."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zif.contract import (
    Capabilities,
    DeviceInfo,
    Feature,
    FullAttentionSpec,
    KVGroup,
    KVLayout,
    KVSizing,
    Numerics,
    Offer,
    Outcome,
    Plan,
    Refusal,
    SchedulerConstraints,
    SlidingWindowSpec,
    Workload,
    format_bytes,
    negotiate,
    slab_arena,
)
from zif.errors import ConfigError

MIB = 1 << 20
FULL = FullAttentionSpec((0, 2), 2, 64, 16, "float32")
SLIDING = SlidingWindowSpec((1, 3), 2, 64, 16, "float32", window=100)
BLOCK_BYTES = 2 * 2 * 2 * 64 * 16 * 4

DEVICE = DeviceInfo(
    device_id="dev0",
    name="a device",
    architecture="any",
    memory_bytes=512 * MIB,
    available_bytes=256 * MIB,
    capabilities=Capabilities(
        dtypes=(Numerics("float32", "float32"),),
        features=frozenset({Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW, Feature.PREFIX_CACHING}),
        kv_dtypes=("float32",),
        block_sizes=(16, 32),
        max_head_size=128,
    ),
)
OFFER = Offer(
    platform="some",
    device=DEVICE,
    layout_of=lambda spec: layout(len(spec.layers) * 2 * spec.num_kv_heads * spec.head_dim * spec.block_size * 4),
    implementations=(("attention", "vendor.attention"), ("kv.prefix_caching", "vendor.blocks")),
    emulated=((Feature.MIXTURE_OF_EXPERTS, "one product per expert"),),
    constraints=SchedulerConstraints(token_alignment=8),
    notes=("a note",),
)
WORKLOAD = Workload(
    dtype="float32",
    kv_specs=(FULL,),
    head_sizes=(64,),
    features=frozenset({Feature.ATTENTION_FULL}),
    weight_bytes=100 * MIB,
    activation_bytes=20 * MIB,
    max_model_len=1600,
    max_num_seqs=4,
    max_num_batched_tokens=512,
)


def layout(block_bytes):
    return KVLayout(block_bytes, ("byte",), (block_bytes,), "uint8")


def groups_of(*block_bytes):
    return tuple(KVGroup(FULL, layout(size)) for size in block_bytes)


def refusal_of(**changes):
    answer = negotiate(replace(WORKLOAD, **changes), OFFER)
    assert isinstance(answer, Refusal)
    return answer.reasons


def plan_of(offer=OFFER, **changes):
    answer = negotiate(replace(WORKLOAD, **changes), offer)
    assert isinstance(answer, Plan), answer
    return answer


def test_each_feature_is_decided_with_what_serves_it():
    features = frozenset({Feature.ATTENTION_FULL, Feature.MIXTURE_OF_EXPERTS, Feature.PREFIX_CACHING})
    decisions = {d.feature: (d.outcome, d.detail) for d in plan_of(features=features).decisions}
    assert decisions == {
        "attention.full": (Outcome.SUPPORTED, "vendor.attention"),
        "moe": (Outcome.EMULATED, "one product per expert"),
        "kv.prefix_caching": (Outcome.SUPPORTED, "vendor.blocks"),
    }


def test_specs_imply_their_feature():
    names = [d.feature for d in plan_of(kv_specs=(FULL, SLIDING), features=frozenset()).decisions]
    assert names == ["attention.full", "attention.sliding_window"]


def test_the_plan_carries_the_offer():
    plan = plan_of()
    assert (plan.platform, plan.device_id, plan.notes) == ("some", "dev0", ("a note",))
    assert plan.implementations == OFFER.implementations
    assert plan.constraints == OFFER.constraints
    assert [(g.spec, g.layout.block_bytes) for g in plan.kv_groups] == [(FULL, BLOCK_BYTES)]


def test_a_refusal_has_all_reasons_at_once():
    spec = replace(FULL, head_dim=300, block_size=8, dtype="float16")
    reasons = refusal_of(
        dtype="int4",
        kv_specs=(spec,),
        head_sizes=(300, 256),
        features=frozenset({Feature.ATTENTION_SINKS}),
        tensor_parallel_size=2,
        weight_bytes=1000 * MIB,
    )
    needles = ["attention.sinks", "parallel.tensor", "'int4'", "head size 256", "head size 300", "block size 8"]
    needles += ["KV dtype 'float16'", f"weights {format_bytes(1000 * MIB)}"]
    assert len(reasons) == len(needles)
    for needle in needles:
        assert sum(needle in reason for reason in reasons) == 1, needle


def test_layouts_are_not_asked_about_specs_that_are_not_served():
    offer = replace(OFFER, layout_of=lambda spec: pytest.fail("asked"))
    assert isinstance(negotiate(replace(WORKLOAD, kv_specs=(replace(FULL, dtype="int3"),)), offer), Refusal)


def test_tensor_parallelism_runs_where_it_is_claimed():
    claimed = replace(DEVICE.capabilities, features=DEVICE.capabilities.features | {Feature.TENSOR_PARALLEL})
    offer = replace(OFFER, device=replace(DEVICE, capabilities=claimed))
    assert isinstance(negotiate(replace(WORKLOAD, tensor_parallel_size=2), offer), Plan)
    assert isinstance(negotiate(replace(WORKLOAD, tensor_parallel_size=2), OFFER), Refusal)


def test_batch_invariance_is_planned_where_it_is_claimed():
    offer = replace(OFFER, device=replace(DEVICE, capabilities=replace(DEVICE.capabilities, batch_invariant=True)))
    assert plan_of(offer, batch_invariant=True).batch_invariant
    assert not plan_of(offer).batch_invariant


def test_batch_invariance_is_refused_where_it_is_not_claimed():
    (reason,) = refusal_of(batch_invariant=True)
    assert reason.startswith("batch_invariant: device 'dev0'")
    assert "turn it off" in reason


def test_batch_invariance_is_refused_where_the_array_library_multiplies():
    features = DEVICE.capabilities.features | {Feature.TRANSFORMERS_BACKEND}
    claimed = replace(DEVICE.capabilities, batch_invariant=True, features=features)
    workload = replace(WORKLOAD, batch_invariant=True, features=frozenset({Feature.TRANSFORMERS_BACKEND}))
    answer = negotiate(workload, replace(OFFER, device=replace(DEVICE, capabilities=claimed)))
    assert isinstance(answer, Refusal)
    assert "order of sums" in answer.reasons[0]


def test_too_large_a_model_is_refused_with_the_bytes():
    (reason,) = refusal_of(weight_bytes=300 * MIB)
    for part in (f"weights {format_bytes(300 * MIB)}", f"activations {format_bytes(20 * MIB)}"):
        assert part in reason
    assert f"available {format_bytes(256 * MIB)}" in reason
    assert f"KV blocks {format_bytes(101 * BLOCK_BYTES)}" in reason


def test_the_memory_limit_caps_what_the_device_has():
    assert plan_of(memory_limit_bytes=200 * MIB).memory.available_bytes == 200 * MIB
    assert plan_of(memory_limit_bytes=999 * MIB).memory.available_bytes == 256 * MIB
    assert f"available {format_bytes(110 * MIB)}" in refusal_of(memory_limit_bytes=110 * MIB)[0]


def test_the_cache_holds_all_requests_when_there_is_room():
    assert plan_of().memory.kv_bytes == (4 * 100 + 1) * BLOCK_BYTES


def test_the_cache_takes_its_share_when_room_is_short():
    assert plan_of(max_num_seqs=1000).memory.kv_bytes == (256 - 120) * MIB // 2
    greedy = replace(OFFER, sizing=KVSizing(max_share=0.9, request_multiple=None))
    assert plan_of(greedy).memory.kv_bytes == int((256 - 120) * MIB * 0.9)


def test_the_cache_never_holds_less_than_one_request():
    stingy = replace(OFFER, sizing=KVSizing(max_share=0.01))
    assert plan_of(stingy).memory.kv_bytes == 101 * BLOCK_BYTES


def test_a_cache_too_small_for_one_request_says_what_would_fit():
    (reason,) = refusal_of(kv_bytes=51 * BLOCK_BYTES)
    assert "800 tokens would fit" in reason
    assert format_bytes(101 * BLOCK_BYTES) in reason
    assert plan_of(kv_bytes=51 * BLOCK_BYTES, max_model_len=800).memory.kv_bytes == 51 * BLOCK_BYTES
    assert "801" in refusal_of(kv_bytes=51 * BLOCK_BYTES, max_model_len=801)[0]
    assert "0 tokens would fit" in refusal_of(kv_bytes=1)[0]


def test_a_cache_too_large_for_the_device_says_what_it_could_be():
    (reason,) = refusal_of(kv_bytes=200 * MIB)
    assert f"set kv_bytes to at most {136 * MIB}" in reason
    assert plan_of(kv_bytes=136 * MIB).memory.kv_bytes == 136 * MIB


def test_the_length_that_a_refusal_proposes_is_the_longest_that_runs():
    (reason,) = refusal_of(max_model_len=100_000)
    fitting = int(reason.split("lower max_model_len to ")[1].split(",")[0])
    assert plan_of(max_model_len=fitting)
    assert refusal_of(max_model_len=fitting + 1)


def test_a_window_bounds_what_a_request_needs():
    # 99 positions behind the first query and 512 new ones: 39 blocks, and one for a window that starts inside a block.
    assert SLIDING.peak_blocks(100_000, 512) == 40
    assert SLIDING.peak_blocks(160, 512) == 10
    assert FULL.peak_blocks(1601, 512) == 101
    assert plan_of(kv_specs=(SLIDING,), max_model_len=10**9, max_num_seqs=1).memory.kv_bytes == 41 * BLOCK_BYTES


@given(
    first=st.integers(0, 500),
    length=st.integers(1, 64),
    window=st.integers(1, 80),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_no_step_needs_more_blocks_than_a_window_is_said_to(first, length, window, block_size):
    spec = SlidingWindowSpec((0,), 1, 8, block_size, "float32", window=window)
    first_visible = max(0, first - window + 1)
    used = len({p // block_size for p in range(first_visible, first + length)})
    assert used <= spec.peak_blocks(first + length, length)


def test_a_model_without_kv_plans_without_cache():
    plan = plan_of(kv_specs=(), features=frozenset())
    assert plan.memory.kv_bytes == 0
    assert plan.kv_groups == ()


@settings(deadline=None)
@given(
    lengths=st.integers(1, 4000),
    num_seqs=st.integers(1, 8),
    layers=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    available=st.integers(50, 600),
)
def test_what_is_planned_holds_one_request(lengths, num_seqs, layers, available):
    specs = tuple(
        replace(FULL if i % 2 else SLIDING, layers=tuple(range(count)), num_kv_heads=1)
        for i, count in enumerate(layers)
    )
    offer = replace(OFFER, device=replace(DEVICE, available_bytes=available * MIB))
    workload = replace(WORKLOAD, kv_specs=specs, max_model_len=lengths, max_num_seqs=num_seqs, weight_bytes=MIB)
    answer = negotiate(workload, offer)
    assume(isinstance(answer, Plan))
    memory = answer.memory
    assert memory.weight_bytes + memory.activation_bytes + memory.kv_bytes <= memory.available_bytes
    arena = slab_arena(memory.kv_bytes, answer.kv_groups)
    slabs = iter(range(1, arena.num_slabs))
    for index, spec in enumerate(specs):
        needed = spec.peak_blocks(lengths, workload.max_num_batched_tokens)
        while needed > 0:
            needed -= len(arena.slab_blocks(index, next(slabs)))


def test_a_lone_group_gets_slabs_of_one_block():
    arena = slab_arena(1000 * 96 + 5, groups_of(96))
    assert (arena.slab_bytes, arena.num_slabs) == (96, 1000)
    assert list(arena.slab_blocks(0, 1)) == [1]


def test_an_arena_without_room_or_groups_is_refused():
    with pytest.raises(ConfigError, match="raise it to"):
        slab_arena(0, groups_of(96, 64))
    with pytest.raises(ConfigError, match="no layer groups"):
        slab_arena(1000, ())


def test_the_size_that_a_refused_arena_names_is_enough():
    groups = groups_of(96, 64, 7)
    with pytest.raises(ConfigError, match="raise it to") as caught:
        slab_arena(200, groups)
    assert slab_arena(int(str(caught.value).rsplit(" ", 1)[1]), groups).num_slabs >= 4


BLOCKS = st.lists(st.integers(1, 400).map(lambda n: n * 64), min_size=1, max_size=4)


@given(block_bytes=BLOCKS, num_bytes=st.integers(1, 1 << 24))
def test_slabs_never_overlap_and_never_lend_the_null_block(block_bytes, num_bytes):
    groups = groups_of(*block_bytes)
    try:
        arena = slab_arena(num_bytes, groups)
    except ConfigError:
        assume(False)
    assert arena.num_bytes <= num_bytes
    for slab in [*range(1, min(arena.num_slabs, 40)), arena.num_slabs - 1]:
        start, end = slab * arena.slab_bytes, (slab + 1) * arena.slab_bytes
        for index, size in enumerate(block_bytes):
            blocks = arena.slab_blocks(index, slab)
            assert len(blocks) >= 1
            assert blocks.start > 0
            assert start <= blocks.start * size
            assert blocks.stop * size <= end
            assert blocks.stop <= arena.num_cells(index)


@given(block_bytes=BLOCKS)
def test_large_arenas_waste_little(block_bytes):
    arena = slab_arena(20_000 * max(block_bytes), groups_of(*block_bytes))
    assert arena.slab_bytes <= arena.num_bytes / 50
    for index, size in enumerate(block_bytes):
        lent = sum(len(arena.slab_blocks(index, slab)) for slab in range(1, arena.num_slabs))
        assert lent * size >= 0.95 * arena.num_bytes


def test_groups_whose_blocks_have_a_small_common_multiple_waste_nothing():
    arena = slab_arena(10_000 * 22, groups_of(22, 4))
    assert arena.slab_bytes == 44
    assert [len(arena.slab_blocks(index, 7)) for index in (0, 1)] == [2, 11]


def test_bytes_are_printed_for_people_and_exactly():
    assert [format_bytes(n) for n in (3, 2048, 3 * MIB, 5 << 29)] == [
        "3 bytes",
        "2.00 KiB (2048 bytes)",
        "3.00 MiB (3145728 bytes)",
        "2.50 GiB (2684354560 bytes)",
    ]
