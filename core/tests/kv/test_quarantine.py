"""What a request computed is not found once it is not to be trusted: on the device, in lower tiers, of every kind."""

import pytest

from support.control_plane import chunked, cut, full, new_request, recurrent, sliding
from support.tiers import TieredEngine

ARENAS = {
    "full": cut((full(4),), 12),
    "sliding": cut((full(4), sliding(5, 4)), 30),
    "only sliding": cut((sliding(5, 4),), 14),
    "chunked": cut((full(2), chunked(8, 4)), 14, 8),
    "recurrent": cut((full(4), recurrent(4)), 30),
}
PROMPTS = [[seed * 50 + i % 13 for i in range(17)] for seed in range(6)]


def run(engine, request_id, prompt, **fields):
    request = new_request(request_id, prompt, **fields)
    engine.add(request)
    engine.run()
    assert request.error is None
    return request


def start(engine, request_id, prompt):
    request = new_request(request_id, prompt)
    engine.add(request)
    engine.step()
    return request


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
@pytest.mark.parametrize("kind", ARENAS)
def test_what_a_running_request_found_and_wrote_is_forgotten_and_nothing_else(kind, host_bytes):
    engine = TieredEngine(ARENAS[kind], host_bytes=host_bytes)
    for request_id, prompt in enumerate(PROMPTS[:2]):
        run(engine, request_id, prompt)
    distrusted = start(engine, 10, PROMPTS[0])
    assert distrusted.num_cached_tokens == 16
    engine.blocks.quarantine(distrusted)
    assert run(engine, 11, PROMPTS[1]).num_cached_tokens == 16, "what others wrote is gone as well"
    engine.run()
    assert start(engine, 12, PROMPTS[0]).num_cached_tokens == 0


def test_copies_below_the_device_are_forgotten():
    engine = TieredEngine(ARENAS["full"], host_bytes=1 << 20)
    for request_id, prompt in enumerate(PROMPTS):
        run(engine, request_id, prompt)
    distrusted = start(engine, 10, PROMPTS[0])
    assert dict(distrusted.prefix.by_tier)["host"] > 0
    engine.blocks.quarantine(distrusted)
    engine.run()
    for request_id, prompt in enumerate(PROMPTS[1:]):
        run(engine, 20 + request_id, prompt)
    assert run(engine, 30, PROMPTS[0]).num_cached_tokens == 0


def test_a_request_that_distrusts_the_cache_finds_nothing_and_its_blocks_are_found():
    engine = TieredEngine(ARENAS["full"])
    run(engine, 0, PROMPTS[0])
    assert run(engine, 1, PROMPTS[0], distrusts_cache=True).num_cached_tokens == 0
    assert run(engine, 2, PROMPTS[0]).num_cached_tokens == 16
