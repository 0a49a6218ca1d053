"""L0, the probe: what it says, how often it says it, and what it does where hardware or software is absent."""

import re

import pytest

from zif.contract import Capabilities, Collective, DeviceInfo, Feature, Numerics
from zif.errors import PlatformUnavailableError
from zif.plugins import PlatformRegistry
from zif_conformance.claims import capabilities_json
from zif_conformance.marks import conforms
from zif_conformance.package.fresh import run_fresh
from zif_conformance.subject import Subject

_DTYPE = re.compile(r"(float|bfloat|int|uint|complex)\d+[a-z0-9_]*|bool")
_REPEATS = 10


@conforms(level="L0", clause="3.1")
def test_devices_are_described(subject: Subject) -> None:
    probe = subject.platform.probe()
    ids = [device.device_id for device in probe.devices]
    assert len(set(ids)) == len(ids), f"device ids {ids!r} are not distinct"
    for device in probe.devices:
        assert device.device_id, "a device has no id"
        assert device.name, f"device {device.device_id!r} has no name"
        assert device.architecture, f"device {device.device_id!r} has no architecture"
        assert all(isinstance(text, str) for pair in device.runtime for text in pair), "runtime holds pairs of text"


@conforms(level="L0", clause="3.3")
def test_available_memory_is_part_of_the_whole(device_info: DeviceInfo) -> None:
    assert 0 < device_info.available_bytes <= device_info.memory_bytes


@conforms(level="L0", clause="3.1")
def test_probe_repeats_itself(subject: Subject) -> None:
    first = subject.device_info()
    for _ in range(_REPEATS):
        again = subject.device_info()
        assert (again.device_id, again.name, again.memory_bytes) == (first.device_id, first.name, first.memory_bytes)
        assert capabilities_json(again.capabilities) == capabilities_json(first.capabilities)


@conforms(level="L0", clause="3.2", negative=True)
def test_probe_brings_no_array_library(subject: Subject) -> None:
    assert run_fresh("imported_array_libraries", subject.name, "probe") == []


@conforms(level="L0", clause=("1.7", "3.2"), negative=True)
def test_probe_changes_no_process_state(subject: Subject) -> None:
    assert run_fresh("changed_process_state", subject.name, "probe") == []


@conforms(level="L0", clause="3.1", negative=True)
@pytest.mark.parametrize(
    "absent", ["array libraries", "other packages", "shared libraries", "programs", "device files"]
)
def test_absence_is_an_answer(subject: Subject, absent: str) -> None:
    answer = run_fresh("probe_without", subject.name, absent)
    if not answer["devices"]:
        assert len(answer["reason"].split()) >= 3, f"reason {answer['reason']!r} helps nobody"
        assert answer["steps"], "nothing says what was tried"


@conforms(level="L0", clause=("3.1", "3.6"), negative=True)
def test_named_platform_without_device_is_refused_with_its_reason(subject: Subject) -> None:
    answer = run_fresh("select_without_devices", subject.name)
    assert answer["error"] == PlatformUnavailableError.__name__
    assert "nothing here, said the suite" in answer["message"]


@conforms(level="L0", clause="3.6", negative=True)
def test_misspelt_name_is_never_replaced(subject: Subject) -> None:
    registry = PlatformRegistry.discover()
    with pytest.raises(Exception, match=re.escape(repr(f"{subject.name}x"))) as raised:
        registry.select(f"{subject.name}x")
    assert subject.name in str(raised.value)


@conforms(level="L0", clause="3.5")
def test_claims_are_of_the_closed_vocabulary(capabilities: Capabilities) -> None:
    assert isinstance(capabilities, Capabilities)
    assert all(isinstance(feature, Feature) for feature in capabilities.features)
    assert all(isinstance(collective, Collective) for collective in capabilities.collectives)
    assert all(isinstance(numerics, Numerics) for numerics in capabilities.dtypes)
    stored = [numerics.storage for numerics in capabilities.dtypes]
    assert len(set(stored)) == len(stored), f"a dtype is claimed twice: {stored!r}"
    computed = [name for n in capabilities.dtypes for name in (n.compute, n.accumulate)]
    names = (*stored, *computed, *capabilities.kv_dtypes, *capabilities.collective_dtypes)
    assert [name for name in names if not _DTYPE.fullmatch(name)] == []


@conforms(level="L0", clause="3.4")
def test_claims_are_possible(capabilities: Capabilities) -> None:
    assert capabilities.dtypes, "no dtype is claimed: nothing can run"
    assert capabilities.block_sizes, "no block size is claimed: nothing can be cached"
    assert min(capabilities.block_sizes) >= 1
    assert len(set(capabilities.block_sizes)) == len(capabilities.block_sizes)
    assert capabilities.max_head_size >= 1
    assert all(1 <= size <= capabilities.max_head_size for size in capabilities.head_sizes)
    assert capabilities.kv_dtypes, "no KV dtype is claimed"


@conforms(level="L0", clause="3.4", negative=True)
def test_collectives_and_their_dtypes_come_together(capabilities: Capabilities) -> None:
    reducing = capabilities.collectives - {Collective.BARRIER}
    assert bool(reducing) == bool(capabilities.collective_dtypes)
    if Feature.TENSOR_PARALLEL in capabilities.features:
        assert Collective.ALL_REDUCE in capabilities.collectives, "tensor parallelism needs all_reduce"
