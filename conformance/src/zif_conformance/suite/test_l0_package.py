"""L0, the package: how it is found, what importing it does, what its source imports and rebinds."""

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from zif.contract import ENTRY_POINT_GROUP, Platform, hookimpl
from zif.plugins import PlatformRegistry
from zif_conformance.marks import conforms, exercises
from zif_conformance.package.fresh import run_fresh
from zif_conformance.package.names import plugin_package
from zif_conformance.package.source import PackageSource
from zif_conformance.subject import Subject

_PROBE_MODULE = "zif_conformance_l0_probe"


@pytest.fixture
def source(subject: Subject) -> PackageSource:
    """The plugin's source, parsed."""
    return PackageSource(plugin_package(subject.plugin))


@pytest.fixture
def twin(subject: Subject) -> Iterator[ModuleType]:
    """A second plugin that brings the platform under test, to be spoiled by a test."""
    module = ModuleType(_PROBE_MODULE)

    @hookimpl
    def zif_platform() -> Platform:
        return subject.platform

    module.zif_platform = zif_platform  # type: ignore[attr-defined]
    sys.modules[_PROBE_MODULE] = module
    yield module
    del sys.modules[_PROBE_MODULE]


def _points(*names: str) -> list[importlib.metadata.EntryPoint]:
    return [importlib.metadata.EntryPoint(name, _PROBE_MODULE, ENTRY_POINT_GROUP) for name in names]


@conforms(level="L0", clause="1.1")
def test_found_through_its_entry_point(subject: Subject) -> None:
    found = PlatformRegistry.discover().platforms
    assert subject.name in found
    assert found[subject.name].distribution == subject.distribution
    assert subject.distribution != "unknown distribution", "the entry point belongs to no installed distribution"


@conforms(level="L0", clause="2.2")
def test_platform_says_who_it_is(subject: Subject) -> None:
    platform = subject.platform
    assert isinstance(platform, Platform)
    assert platform.name == platform.name.strip().lower() != "", f"name {platform.name!r} must be lower-case"
    assert not set(platform.name) & set(" /:,="), f"name {platform.name!r} is typed on command lines"
    assert isinstance(platform.vendor, str)
    assert platform.vendor
    assert platform.preference is None or isinstance(platform.preference, int)


@conforms(level="L0", clause="1.1")
def test_source_can_be_read(source: PackageSource) -> None:
    assert source.num_files > 0, f"package {source.own!r} holds no source file"


@conforms(level="L0", clause="1.3", negative=True)
def test_import_brings_no_array_library(subject: Subject) -> None:
    assert run_fresh("imported_array_libraries", subject.name, "import") == []


@conforms(level="L0", clause="1.3", negative=True)
def test_import_changes_no_process_state(subject: Subject) -> None:
    assert run_fresh("changed_process_state", subject.name, "import") == []


@conforms(level="L0", clause="1.3", negative=True)
def test_import_reads_no_environment(subject: Subject) -> None:
    assert run_fresh("environment_reads_at_import", subject.name) == []


@conforms(level="L0", clause="1.3", negative=True)
def test_loads_without_array_library(subject: Subject) -> None:
    assert run_fresh("load_without_array_library", subject.name) == subject.name


@conforms(level="L0", clause=("1.3", "12.2"), negative=True)
@pytest.mark.parametrize("stage", ["import", "use"])
def test_rebinds_nothing(subject: Subject, stage: str) -> None:
    if stage == "use":
        subject.device_info()
    assert run_fresh("rebound_names", subject.name, stage) == []


@conforms(level="L0", clause=("1.7", "2.3"), negative=True)
def test_unchosen_plugin_answers_no_hook(subject: Subject) -> None:
    assert run_fresh("answers_of_unchosen", subject.name) == []


@conforms(level="L0", clause="1.4", negative=True)
@pytest.mark.parametrize("hook", ["zif_plattform", "zif_attention", "zif_"])
def test_unknown_hook_is_an_error(twin: ModuleType, hook: str) -> None:
    setattr(twin, hook, hookimpl(lambda: None))
    registry = PlatformRegistry.load(_points("twin"))
    assert registry.platforms == {}
    assert hook in registry.failures[0].reason


@conforms(level="L0", clause="1.4", negative=True)
def test_unknown_hook_argument_is_an_error(twin: ModuleType) -> None:
    twin.zif_model_runner = hookimpl(lambda plan, nonsense: None)  # type: ignore[attr-defined]
    registry = PlatformRegistry.load(_points("twin"))
    assert registry.platforms == {}
    assert "nonsense" in registry.failures[0].reason


@conforms(level="L0", clause="1.5", negative=True)
def test_broken_neighbour_is_remembered_and_stops_nobody(subject: Subject) -> None:
    broken = importlib.metadata.EntryPoint("broken", "zif_conformance_no_such_module", ENTRY_POINT_GROUP)
    registry = PlatformRegistry.load([broken, *importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)])
    assert subject.name in registry.platforms
    failure = next(failure for failure in registry.failures if failure.name == "broken")
    assert "zif_conformance_no_such_module" in failure.trace


@conforms(level="L0", clause="1.6", negative=True)
def test_two_claimants_of_the_name_are_both_set_aside(subject: Subject, twin: ModuleType) -> None:
    points = [*_points("twin"), *importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]
    registry = PlatformRegistry.load(points)
    assert subject.name not in registry.platforms
    assert any(subject.name in failure.reason and "both claim" in failure.reason for failure in registry.failures)


@conforms(level="L0", clause="12.1", negative=True)
def test_imports_no_private_name_of_core(source: PackageSource) -> None:
    assert list(map(str, source.foreign_core_imports())) == []


@conforms(level="L0", clause="12.1", negative=True)
def test_imports_no_other_plugin(source: PackageSource) -> None:
    modules = {point.value.partition(".")[0] for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    others = frozenset(modules - {source.own.partition(".")[0], "zif"})
    assert list(map(str, source.imports_of(others))) == []


@conforms(level="L0", clause="12.2", negative=True)
def test_source_rebinds_no_foreign_attribute(source: PackageSource) -> None:
    assert list(map(str, source.rebound_attributes())) == []


@conforms(level="L0", clause="12.3", negative=True)
def test_settings_are_read_in_one_module(source: PackageSource) -> None:
    assert len(source.environment_modules()) <= 1, source.environment_modules()


@conforms(level="L0", clause="3.4")
@pytest.mark.parametrize("how", [pytest.param(how, marks=exercises(f"{how}_safe")) for how in ("spawn", "fork")])
def test_claims_are_the_same_in_another_process(subject: Subject, how: str) -> None:
    from zif_conformance.claims import capabilities_json

    assert run_fresh("claims_here", subject.name, how) == capabilities_json(subject.device_info().capabilities)
