"""Loading plugins under guard, and choosing a platform. The entry points are made up, so nothing is installed."""

from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from zif.contract import Platform, Probe, hookimpl
from zif.errors import ContractError, PlatformNotFoundError, PlatformUnavailableError
from zif.null.platform import NullPlatform
from zif.plugins import PlatformRegistry

PRESENT = NullPlatform().probe()
ABSENT = Probe(devices=(), reason="no such device", steps=("looked under the table", "looked in the attic"))
_DEVICE = PRESENT.devices[0]
SIMULATED = Probe((replace(_DEVICE, capabilities=replace(_DEVICE.capabilities, simulated=True)),))


class FakePlatform(Platform):
    vendor = "acme"

    def __init__(self, name, probe=PRESENT, preference=None):
        self.name, self.preference, self._probe = name, preference, probe

    def probe(self):
        if isinstance(self._probe, BaseException):
            raise self._probe
        return self._probe

    def plan(self, workload):
        raise NotImplementedError

    def open(self, plan, rank):
        raise NotImplementedError


class EntryPoint:
    """What `importlib.metadata` would give; `plugin` is the module, or the exception that its import raises."""

    def __init__(self, name, plugin, distribution="acme-plugin"):
        self.name, self._plugin = name, plugin
        self.dist = None if distribution is None else SimpleNamespace(name=distribution, version="1.0")

    def load(self):
        if isinstance(self._plugin, BaseException):
            raise self._plugin
        return self._plugin


def module(**hooks):
    plugin = ModuleType("plugin")
    vars(plugin).update(hooks)
    return plugin


def module_of(platform, **hooks):
    """Return a plugin module whose `zif_platform` gives (or raises) `platform`."""

    @hookimpl
    def zif_platform():
        if isinstance(platform, BaseException):
            raise platform
        return platform

    return module(zif_platform=zif_platform, **hooks)


def registry_of(*platforms):
    return PlatformRegistry.load(EntryPoint(p.name, module_of(p), f"zif-{p.name}") for p in platforms)


@hookimpl
def zif_platfrom():
    """A hook with a slip of the pen."""


@hookimpl
def zif_scheduler(config, plan, blocks):
    """A hook whose last parameter is not in the specification."""


GOOD = EntryPoint("good", module_of(FakePlatform("good")), "zif-good")


class TestLoading:
    @pytest.mark.parametrize(
        ("plugin", "reason"),
        [
            (ImportError("libacme.so: cannot open"), "ImportError: libacme.so: cannot open"),
            (SystemExit("bye"), "SystemExit: bye"),
            (module(zif_platfrom=zif_platfrom), "zif_platfrom"),
            (module_of(FakePlatform("x"), zif_scheduler=zif_scheduler), "blocks"),
            (module_of(RuntimeError("driver too old")), "RuntimeError: driver too old"),
            (module_of(SystemExit(3)), "SystemExit: 3"),
            (module_of("a string"), "'a string'"),
            (module_of(FakePlatform), "FakePlatform"),
            (module_of(None), "None"),
        ],
        ids=[
            "import",
            "exit at import",
            "unknown hook",
            "unknown parameter",
            "hook raises",
            "hook exits",
            "no platform",
            "class",
            "none",
        ],
    )
    def test_a_broken_plugin_is_remembered_and_the_others_load(self, plugin, reason):
        registry = PlatformRegistry.load([EntryPoint("broken", plugin), GOOD])
        assert list(registry.platforms) == ["good"]
        (failure,) = registry.failures
        assert (failure.name, failure.distribution) == ("broken", "acme-plugin 1.0")
        assert reason in failure.reason
        assert "Traceback" in failure.trace
        assert len(registry.manager.get_plugins()) == 1, "the broken plugin's hooks are not called later"

    def test_asking_for_a_broken_plugin_says_why_it_failed(self):
        registry = PlatformRegistry.load([EntryPoint("broken", ImportError("libacme.so: cannot open")), GOOD])
        with pytest.raises(ContractError, match=r"'broken' of acme-plugin 1\.0 failed to load: ImportError: libacme"):
            registry.select("broken")

    def test_an_interrupt_from_the_keyboard_passes(self):
        with pytest.raises(KeyboardInterrupt):
            PlatformRegistry.load([EntryPoint("slow", KeyboardInterrupt())])

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_name_that_two_plugins_claim_belongs_to_neither(self, order):
        claims = [EntryPoint("acme", module_of(FakePlatform("acme")), f"zif-{who}") for who in ("first", "second")]
        registry = PlatformRegistry.load([*claims, GOOD][::order])
        assert list(registry.platforms) == ["good"]
        with pytest.raises(ContractError, match=r"zif-first 1\.0 and zif-second 1\.0 both claim .*'acme'; uninstall"):
            registry.select("acme")

    def test_plugins_that_claim_one_name_lose_their_hooks_too(self):
        plugins = [module_of(FakePlatform("acme")) for _ in range(2)]
        claims = [EntryPoint("acme", plugin, f"zif-{index}") for index, plugin in enumerate(plugins)]
        registry = PlatformRegistry.load([*claims, GOOD])
        assert not any(registry.manager.is_registered(plugin) for plugin in plugins)

    def test_one_plugin_under_two_entry_points_is_loaded_once_and_keeps_its_hooks(self):
        plugin = module_of(FakePlatform("acme"))
        registry = PlatformRegistry.load([EntryPoint("acme", plugin), EntryPoint("acme-again", plugin)])
        assert list(registry.platforms) == ["acme"]
        assert [failure.name for failure in registry.failures] == ["acme-again"]
        assert registry.manager.is_registered(plugin)

    def test_a_plugin_may_bring_hooks_without_a_platform(self):
        @hookimpl
        def zif_block_manager(config):
            return None

        registry = PlatformRegistry.load([EntryPoint("extra", module(zif_block_manager=zif_block_manager))])
        assert (registry.platforms, registry.failures) == ({}, ())
        assert len(registry.manager.hook.zif_block_manager.get_hookimpls()) == 1

    def test_an_entry_point_without_a_distribution_is_told_apart(self):
        registry = PlatformRegistry.load([EntryPoint("loose", ImportError("x"), distribution=None)])
        assert registry.failures[0].distribution == "unknown distribution"


class TestSelection:
    def test_the_named_platform_is_taken_whatever_others_prefer(self):
        registry = registry_of(FakePlatform("modest"), FakePlatform("loud", preference=100))
        assert registry.select("modest").name == "modest"

    def test_an_absent_platform_names_the_nearest_and_the_command_that_installs_it(self):
        registry = registry_of(FakePlatform("acme"), FakePlatform("other"))
        with pytest.raises(PlatformNotFoundError) as caught:
            registry.select("acmee")
        message = str(caught.value)
        assert "'acmee'" in message
        assert "did you mean 'acme'?" in message
        assert "installed: acme, other" in message
        assert "pip install zif-acmee" in message

    def test_an_absent_platform_of_this_project_is_installed_by_its_extra(self):
        with pytest.raises(PlatformNotFoundError, match=r"installed: none; to add it: pip install 'zif\[cpu\]'"):
            registry_of().select("cpu")

    def test_a_named_platform_without_a_device_is_never_replaced(self):
        registry = registry_of(FakePlatform("absent", probe=ABSENT), FakePlatform("present", preference=1))
        with pytest.raises(PlatformUnavailableError) as caught:
            registry.select("absent")
        assert str(caught.value).splitlines() == [
            "platform 'absent' has no device here: no such device",
            "  tried: looked under the table",
            "  tried: looked in the attic",
        ]

    @pytest.mark.parametrize("fault", [RuntimeError("boom"), SystemExit("boom")], ids=["error", "exit"])
    def test_a_probe_that_raises_is_a_fault_of_its_distribution(self, fault):
        registry = registry_of(FakePlatform("acme", probe=fault), FakePlatform("present", preference=1))
        with pytest.raises(PlatformUnavailableError, match=r"probe raised .*boom.*a fault of zif-acme 1\.0"):
            registry.select("acme")
        assert registry.select(None).name == "present"

    def test_a_probe_that_returns_something_else_is_a_fault_of_its_distribution(self):
        registry = registry_of(FakePlatform("acme", probe=None, preference=2), FakePlatform("present", preference=1))
        with pytest.raises(PlatformUnavailableError, match=r"probe returned None; this is a fault of zif-acme 1\.0"):
            registry.select("acme")
        assert registry.select(None).name == "present"

    def test_the_most_preferred_platform_with_a_device_is_chosen(self):
        registry = registry_of(
            FakePlatform("never", preference=None),
            FakePlatform("low", preference=-5),
            FakePlatform("middle", preference=0),
            FakePlatform("high", preference=9, probe=ABSENT),
        )
        assert registry.select(None).name == "middle"

    def test_a_simulated_device_serves_only_who_names_its_platform(self):
        simulated = FakePlatform("simulated", preference=9, probe=SIMULATED)
        assert registry_of(simulated, FakePlatform("low", preference=-5)).select(None).name == "low"
        assert registry_of(simulated).select("simulated") is simulated
        with pytest.raises(PlatformUnavailableError, match="simulated: its device is simulated on the host; name"):
            registry_of(simulated).select(None)

    def test_equally_preferred_platforms_are_not_chosen_between(self):
        registry = registry_of(FakePlatform("a", preference=1), FakePlatform("b", preference=1))
        with pytest.raises(PlatformUnavailableError, match="platforms a, b are equally preferred; name one"):
            registry.select(None)

    def test_a_tie_below_the_first_or_without_a_device_is_no_tie(self):
        low = [FakePlatform(name, preference=1) for name in "ab"]
        registry = registry_of(*low, FakePlatform("c", preference=2), FakePlatform("d", preference=2, probe=ABSENT))
        assert registry.select(None).name == "c"

    def test_a_platform_without_preference_runs_only_when_named(self):
        registry = registry_of(FakePlatform("shy"))
        with pytest.raises(PlatformUnavailableError, match="install one"):
            registry.select(None)
        assert registry.select("shy").name == "shy"

    def test_when_none_is_usable_every_reason_is_given(self):
        registry = PlatformRegistry.load(
            [
                EntryPoint("acme", module_of(FakePlatform("acme", probe=ABSENT, preference=1))),
                EntryPoint("broken", ImportError("libacme.so")),
            ]
        )
        with pytest.raises(PlatformUnavailableError) as caught:
            registry.select(None)
        assert str(caught.value).splitlines()[1:] == [
            "  acme: no such device",
            "  broken: failed to load: ImportError: libacme.so",
        ]


def test_the_null_platform_is_found_like_any_other():
    assert PlatformRegistry.discover().select("null").name == "null"


class TestAsking:
    """Who is asked for the parts of a plan."""

    @staticmethod
    def hooks(answer):
        @hookimpl
        def zif_scheduler(config, plan, block_manager):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return {"zif_scheduler": zif_scheduler}

    def ask(self, *entry_points):
        registry = PlatformRegistry.load(entry_points)
        return registry.ask("good", "zif_scheduler", config=None, plan=None, block_manager=None)

    def entry(self, name, answer):
        return EntryPoint(name, module_of(FakePlatform(name), **self.hooks(answer)), f"zif-{name}")

    def test_a_plugin_whose_platform_was_not_chosen_is_not_asked(self):
        assert self.ask(self.entry("good", "mine"), self.entry("other", ValueError("asked"))) == "mine"

    def test_nobody_answers_when_only_others_would(self):
        assert self.ask(GOOD, self.entry("other", "theirs")) is None

    def test_a_plugin_without_a_platform_is_asked(self):
        assert self.ask(GOOD, EntryPoint("extra", module(**self.hooks("extra's")), "zif-extra")) == "extra's"
