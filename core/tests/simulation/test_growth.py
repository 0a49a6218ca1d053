"""Nothing in scheduler and block manager grows with the number of requests that have come and gone."""

import pytest

from zif.scheduling import policies
from zif.scheduling.deadlines import Deadlines
from zif.simulation.growth import Churn, container_sizes, grown

pytestmark = pytest.mark.slow

NUM_REQUESTS = 20_000
NUM_SAMPLES = 20


def halves(churn, num_requests):
    """Let requests come; return the largest size of every container in each half of the run."""
    largest = ({}, {})
    for sample in range(NUM_SAMPLES):
        churn.run((sample + 1) * num_requests // NUM_SAMPLES)
        sizes = container_sizes({"scheduler": churn.scheduler, "blocks": churn.blocks})
        half = largest[2 * sample // NUM_SAMPLES]
        half.update({way: max(size, half.get(way, 0)) for way, size in sizes.items()})
    return largest


@pytest.fixture(autouse=True)
def few_tenants_are_remembered(monkeypatch):
    monkeypatch.setattr(policies, "MAX_TENANTS_KEPT", 128)


def test_no_container_grows_with_the_number_of_requests():
    churn = Churn()
    first, second = halves(churn, NUM_REQUESTS)
    assert len(second) > 50
    assert grown(first, second) == []
    churn.drain()
    assert sum(churn.ends.values()) == NUM_REQUESTS
    assert churn.num_preemptions > 20
    assert churn.ends["abort"] > 1000
    churn.blocks.reset_prefix_cache()
    left = container_sizes({"scheduler": churn.scheduler})
    assert left["scheduler._requests.requests"] == left["scheduler._requests.running"] == 0
    assert all(usage.num_owned == usage.num_cached == 0 for usage in churn.blocks.usage())


def test_what_grows_is_named(monkeypatch):
    monkeypatch.setattr(Deadlines, "remove", lambda self, request: None)
    first, second = halves(Churn(), 2000)
    assert any("_deadlines._heap:" in line for line in grown(first, second))


def test_sizes_are_counted_by_the_way_that_leads_to_them():
    sizes = container_sizes({"a": {"x": [1, 2], "y": [3]}, "b": (bytearray(5), {1, 2})})
    assert sizes == {"a": 2, "a[]": 3, "b": 2, "b[]": 7}
