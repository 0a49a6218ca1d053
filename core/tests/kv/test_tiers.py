"""KV below the device: what the device evicts is found again, nothing lost or late is ever used, bounds hold."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.control_plane import chunked, cut, expected_output, full, new_request, recurrent, sliding
from support.tiers import FlakyRemote, TieredEngine
from zif.contract import CacheKey, FinishReason, SamplingParams
from zif.kv import TierSetup
from zif.kv.tiers import TierIndex

ARENAS = {
    "full": cut((full(4),), 12),
    "sliding": cut((full(4), sliding(5, 4)), 14),
    "chunked": cut((full(2), chunked(8, 4)), 14, 8),
    "recurrent": cut((full(4), recurrent(4)), 14),
}
PROMPTS = [[seed * 50 + i % 13 for i in range(17)] for seed in range(6)]


def by_tier(request):
    return dict(request.prefix.by_tier)


def run_one(engine, request_id, prompt, **fields):
    request = new_request(request_id, prompt, **fields)
    engine.add(request)
    engine.run()
    assert request.error is None
    assert request.output_token_ids == expected_output(request, engine.specs)
    return request


@pytest.mark.parametrize("kind", ARENAS)
def test_what_the_device_evicts_is_found_in_host_memory(kind):
    engine = TieredEngine(ARENAS[kind], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        assert by_tier(run_one(engine, request_id, prompt))["host"] == 0
    again = run_one(engine, 10, PROMPTS[0])
    assert again.num_cached_tokens == 16
    assert by_tier(again)["host"] > 0
    assert sum(by_tier(again).values()) == 16


def test_without_tiers_the_same_traffic_finds_nothing():
    engine = TieredEngine(ARENAS["full"])
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    assert run_one(engine, 10, PROMPTS[0]).num_cached_tokens == 0
    assert engine.plans[-1].transfers is None


def test_a_loaded_prefix_is_found_on_the_device_next_time():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    assert by_tier(run_one(engine, 10, PROMPTS[0])) == {"device": 0, "host": 16}
    assert by_tier(run_one(engine, 11, PROMPTS[0])) == {"device": 16, "host": 0}


def test_host_memory_overflows_to_disk_in_order_of_use(tmp_path):
    block = 4 * 8
    engine = TieredEngine(ARENAS["full"], host_bytes=6 * block, disk_bytes=1 << 20, folder=tmp_path)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    oldest, newer = run_one(engine, 10, PROMPTS[0]), run_one(engine, 11, PROMPTS[2])
    assert by_tier(oldest) == {"device": 0, "host": 0, "disk": 16}
    assert newer.num_cached_tokens == 16


def test_a_full_host_tier_without_disk_drops_what_was_used_least_recently():
    engine = TieredEngine(ARENAS["full"], host_bytes=6 * 32)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    assert run_one(engine, 10, PROMPTS[0]).num_cached_tokens == 0
    assert any(plan.transfers and plan.transfers.drops for plan in engine.plans)


def test_a_request_that_ends_before_it_begins_leaves_no_load():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    request = new_request(20, PROMPTS[0])
    engine.blocks.begin(request)
    assert request.num_computed_tokens == 16
    engine.blocks.check_integrity([request])
    engine.blocks.release(request)
    engine.blocks.check_integrity([])
    transfers = engine.blocks.take_transfers()
    assert transfers is None or not transfers.loads


def test_without_blocks_for_loads_the_prefix_on_the_device_is_used():
    engine = TieredEngine(cut((full(4),), 12), host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    holder = new_request(20, [99] * 44)
    engine.blocks.begin(holder)
    assert engine.blocks.reserve(holder, 44)
    request = new_request(21, PROMPTS[0])
    engine.blocks.begin(request)
    assert request.num_computed_tokens == 0
    assert by_tier(request) == {}
    engine.blocks.check_integrity([holder, request])


def test_lost_copies_are_computed_again_and_never_indexed():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    engine.host.pop_all()
    victim = run_one(engine, 10, PROMPTS[0])
    assert (victim.num_preemptions, victim.num_recoveries) == (0, 1)
    assert by_tier(victim)["host"] == 16
    assert run_one(engine, 11, PROMPTS[0]).num_cached_tokens == 16


def test_a_lost_copy_is_forgotten_by_all_who_would_load_it():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    engine.host.pop_all()
    pair = [new_request(10, PROMPTS[0]), new_request(11, PROMPTS[0])]
    engine.add(*pair)
    engine.run()
    for request in pair:
        assert request.output_token_ids == expected_output(request, engine.specs)


def test_reset_forgets_every_tier():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    engine.blocks.reset_prefix_cache()
    assert run_one(engine, 10, PROMPTS[0]).num_cached_tokens == 0


def test_emptying_the_device_for_one_request_leaves_the_other_tiers():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt)
    engine.blocks.free_cached_blocks()
    assert not any(usage.num_cached for usage in engine.blocks.usage())
    assert by_tier(run_one(engine, 10, PROMPTS[0])) == {"device": 0, "host": 16}


def test_a_salted_prefix_is_not_found_by_others_in_any_tier():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(engine, request_id, prompt, cache_key=CacheKey(salt="mine"))
    assert run_one(engine, 10, PROMPTS[0]).num_cached_tokens == 0
    assert run_one(engine, 11, PROMPTS[1], cache_key=CacheKey(salt="mine")).num_cached_tokens == 16


@pytest.mark.parametrize("kind", ARENAS)
@pytest.mark.parametrize("caching", [True, False])
def test_swapped_requests_go_on_where_they_were(kind, caching):
    engine = TieredEngine(ARENAS[kind], caching=caching, host_bytes=1 << 20)
    requests = [new_request(i, PROMPTS[i][:9], max_total_tokens=33) for i in range(4)]
    engine.add(*requests)
    engine.run()
    for request in requests:
        assert request.output_token_ids == expected_output(request, engine.specs)
    swapped = [r for r in requests if r.num_preemptions]
    assert swapped
    if caching:
        return  # Who is preempted just when all blocks are full is found by prefix, and not swapped.
    assert any(s.name == b"" for plan in engine.plans if plan.transfers for s in plan.transfers.saves)
    for request in swapped:
        # Nothing is computed twice: every token but the last, once.
        assert sum(engine.planned(request)) == request.num_tokens - 1
    assert not engine.host.num_bytes


def test_copying_that_is_slower_than_computing_is_not_done():
    engine = TieredEngine(ARENAS["full"], caching=False, host_bytes=1 << 20, setup={"host_bytes_per_s": 1})
    requests = [new_request(i, PROMPTS[i][:9], max_total_tokens=33) for i in range(4)]
    engine.add(*requests)
    engine.run()
    assert any(r.num_preemptions for r in requests)
    assert not any(plan.transfers for plan in engine.plans)


def test_prompt_logprobs_survive_a_swap_without_a_second_look():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    sampling = SamplingParams(prompt_logprobs=0)
    requests = [new_request(i, PROMPTS[i][:9], max_total_tokens=33, sampling=sampling) for i in range(4)]
    engine.add(*requests)
    engine.run()
    for request in filter(lambda r: r.num_preemptions, requests):
        assert sum(engine.planned(request)) == request.num_tokens - 1


def test_an_aborted_request_gives_its_copies_back():
    engine = TieredEngine(ARENAS["full"], caching=False, host_bytes=1 << 20)
    requests = [new_request(i, PROMPTS[i][:9], max_total_tokens=33) for i in range(4)]
    engine.add(*requests)
    while not any(r.num_preemptions for r in requests):
        engine.step()
    for request in requests:
        engine.scheduler.finish(request.request_id, FinishReason.ABORT)
    engine.blocks.check_integrity([])
    while engine.scheduler.has_requests():
        engine.step()
    assert engine.host.num_bytes == 0


def test_a_remote_tier_serves_other_engines_and_may_fail(caplog):
    remote = FlakyRemote()
    first = TieredEngine(ARENAS["full"], host_bytes=4 * 32, remote=remote)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(first, request_id, prompt)
    second = TieredEngine(ARENAS["full"], host_bytes=4 * 32, remote=remote)
    assert by_tier(run_one(second, 10, PROMPTS[0])) == {"device": 0, "host": 0, "remote": 16}
    remote.fails = True
    assert run_one(second, 11, PROMPTS[1]).num_cached_tokens == 0
    num_calls = remote.num_calls
    assert run_one(second, 12, PROMPTS[2]).num_cached_tokens == 0
    assert remote.num_calls == num_calls, "a remote that failed is asked again at once"
    remote.fails, second.now_s = False, 11.0
    assert run_one(second, 13, PROMPTS[0]).num_cached_tokens == 16
    assert len([r for r in caplog.records if "remote" in r.message]) == 1


def test_a_remote_that_loses_or_damages_blocks_costs_time_only():
    remote = FlakyRemote()
    first = TieredEngine(ARENAS["full"], host_bytes=4 * 32, remote=remote)
    for request_id, prompt in enumerate(PROMPTS):
        run_one(first, request_id, prompt)
    for name, entry in remote.entries.items():
        remote.entries[name] = entry[:-1] + bytes([entry[-1] ^ 1])
    second = TieredEngine(ARENAS["full"], host_bytes=4 * 32, remote=remote)
    assert run_one(second, 10, PROMPTS[0]).num_recoveries == 1
    second.now_s = 11.0
    remote.contains = lambda names, timeout_s: [True] * len(names)
    assert run_one(second, 11, PROMPTS[1]).num_recoveries == 1
    remote.entries.clear()
    second.now_s = 22.0
    assert run_one(second, 12, PROMPTS[2]).num_recoveries == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(ARENAS)),
    seed=st.integers(0, 2**20),
    host=st.sampled_from([0, 64, 200, 1000, 1 << 20]),
    disk=st.sampled_from([0, 1300, 1 << 20]),
    caching=st.booleans(),
)
def test_any_traffic_gives_the_expected_text(tmp_path_factory, kind, seed, host, disk, caching):
    folder = tmp_path_factory.mktemp("disk") if disk else None
    draw = random.Random(seed)
    engine = TieredEngine(
        ARENAS[kind], caching=caching, host_bytes=host, disk_bytes=disk, folder=folder, remote=FlakyRemote()
    )
    requests = []
    for request_id in range(14):
        prompt = PROMPTS[draw.randrange(4)][: draw.randint(1, 17)] + [draw.randrange(5)] * draw.randint(0, 4)
        requests.append(new_request(request_id, prompt, max_total_tokens=len(prompt) + draw.randint(1, 12)))
        engine.add(requests[-1])
        for _ in range(draw.randint(0, 6)):
            if engine.scheduler.has_requests():
                engine.step()
        if draw.random() < 0.2 and engine.host:
            engine.host.pop_all()
        if draw.random() < 0.2:
            engine.blocks.reset_prefix_cache()
    engine.run()
    for request in requests:
        assert request.error is None
        assert request.output_token_ids == expected_output(request, engine.specs)


def test_the_integrity_check_sees_damage():
    index = TierIndex(TierSetup(host_bytes=100), [10])
    index.keep(0, 3, b"name")
    index.check_integrity(set(), [set()])
    with pytest.raises(AssertionError, match="private"):
        index.check_integrity({7}, [set()])
    index._tiers[0].num_bytes += 1
    with pytest.raises(AssertionError, match="bytes drifted"):
        index.check_integrity(set(), [set()])


def test_a_burst_larger_than_the_tier_keeps_the_last_and_withdraws_the_rest():
    index = TierIndex(TierSetup(host_bytes=30), [10])
    for block in range(1, 8):
        index.keep(0, block, bytes([block]))
        index.check_integrity(set(), [set()])
    transfers = index.take()
    assert [save.block_id for save in transfers.saves] == [5, 6, 7]
    assert not transfers.drops
